"""The twenty steps: what they are, and what is said of those that are off."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import predicted_measured as tool


def result(**changes) -> dict:
    predicted = {"ledger": 100 * tool.MIB, "resident": 900 * tool.MIB, "seconds": 10.0}
    measured = {"ledger": 101 * tool.MIB, "resident": 870 * tool.MIB, "seconds": 9.0, "cpu_seconds": 8.0, "unattributed": 0}
    return {"predicted": predicted, "measured": measured | changes, "case": "a step"}


def test_the_twenty_are_always_the_same_and_of_many_kinds():
    cases = tool.cases()
    assert cases == tool.cases() and len(cases) == 20
    assert sum(case.disk for case in cases) >= 5 and sum(case.family != "own" for case in cases) >= 5
    assert (
        {case.tokens for case in cases} >= {4096, 131072}
        and max(case.layers for case in cases) == 16
        and min(case.layers for case in cases) == 2
    )


@pytest.mark.parametrize("changes, broken", [
    ({}, 0), ({"ledger": 97 * tool.MIB}, 1), ({"resident": 860 * tool.MIB}, 1), ({"unattributed": 3 * tool.MIB}, 1), ({"seconds": 8.0}, 1),
])  # fmt: skip
def test_a_bound_that_is_not_kept_is_counted_and_marked(changes, broken):
    text = tool.table({"0": result(**changes)}, tool.cases()[:2])
    assert text.endswith(f"\n{broken} bounds not kept") and text.count("!") == broken and "not run yet" in text


def test_times_alone_replace_times_alone():
    before, after = result(), result(seconds=5.0, ledger=1)
    found = tool.with_times(before, after)
    assert found["measured"]["seconds"] == 5.0 and found["measured"]["ledger"] == before["measured"]["ledger"]
    assert tool.with_times(before, {"error": "died"}) == before | {"error": "died"}
