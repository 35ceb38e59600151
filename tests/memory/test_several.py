"""`longtrain profile` on two processes: each says what it holds of a step that they share."""

from __future__ import annotations

import json

import pytest

from tests.memory.test_report import CONFIG
from tests.train.ranks import Ranks

LAYER = 4 * (7 * 64 * 64 + 2 * 64)
"""Bytes of a layer whole: FSDP2 gathers it into a storage that no operation makes."""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["cp_ulysses: 2", "dp_shard: 2"])
def test_two_processes_share_the_step_that_is_profiled(parallel, tmp_path, allocators):
    config = tmp_path / "tiny.yaml"
    settings = CONFIG.replace("OUT", str(tmp_path / "out")).replace("hidden_size: 32", "hidden_size: 64").replace("256", "4096")
    config.write_text(settings.replace("num_kv_heads: 1", "num_kv_heads: 2") + f"parallel: {{{parallel}}}\n")
    ranks = Ranks(2, tmp_path, config, "train.tokens_per_update=8192", command="profile")
    assert ranks.wait() == [0, 0], ranks.said(0) + ranks.said(1)
    whole, half = (json.loads((tmp_path / "out" / "memory" / f"{name}profile.json").read_text()) for name in ("", "rank1-"))
    assert [rank["bytes"] for rank in whole["ranks"]] == [whole["peak"]["bytes"], half["peak"]["bytes"]]
    assert "rank 1" in (tmp_path / "out" / "memory" / "profile.html").read_text()
    for result in (whole, half):
        assert result["peak"]["unattributed"] <= LAYER + 0.02 * result["peak"]["bytes"]
        assert any(row["predicted"] and row["measured"] for row in result["phases"])
