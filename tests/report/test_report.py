"""The report page: what it says, what it survives, and that a real browser draws it without a complaint."""

import json
import re
import shutil
import subprocess

import pytest

from longtrain import cli
from longtrain.report.charts import MOST_POINTS, charts
from longtrain.report.read import read_run, sentence

CONFIG = """\
model: {vocab_size: 256, num_layers: 2, hidden_size: 128, intermediate_size: 384, num_heads: 2, num_kv_heads: 1, head_dim: 32}
data: {source: stdlib, seq_len: 512}  # </script><b id=escaped>
train: {steps: 6, grad_clip: 1.0}
"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def step(number: int, loss: float | None = 2.0, **others) -> dict:
    return {"kind": "step", "step": number, "loss": loss, "lr": 1e-3, "tokens_per_second": 12_345.6, "peak_bytes": 2**30, "seq_len": 512,
            "tokens": 512, "seconds": 60.0, "grad_norm": 0.5, **others}  # fmt: skip


def validation(number: int, loss: float) -> dict:
    positions = [
        {"start": 0, "stop": 64, "loss": loss + 0.1, "error": 0.01, "targets": 900},
        {"start": 64, "stop": 512, "loss": loss, "error": 0.02, "targets": 100},
    ]
    probes = [{"probe": "recall", "distance": d, "accuracy": 0.9, "chance": 0.031, "answers": 64, "examples": 64} for d in (16, 64)]
    sources = [{"source": name, "loss": loss, "error": 0.01, "targets": 500} for name in ("code", "books")]
    return {
        "kind": "validation",
        "step": number,
        "loss": loss,
        "targets": 1000,
        "positions": positions,
        "probes": probes,
        "sources": sources,
    }


RUN = {
    "kind": "run",
    "unigram": 3.1,
    "bigram": 2.4,
    "budget_bytes": 3 * 2**29,
    "plan": {"chunk_tokens": 128, "predicted_peak": 2**30},
    "torch": "2.13",
    "device": "cpu",
}
RESUMED = [
    RUN, step(1), step(2, seq_len=256), validation(2, 2.5), step(3, 9.0),
    {"kind": "resume", "step": 2, "notes": ["going on from step 2"], "torch": "2.14"},
    step(3, 1.9), step(4), validation(4, 2.0), {"kind": "checkpoint", "step": 4, "bytes": 10**6, "seconds": 1.0},
    {"kind": "spike", "step": 5, "found": "loss 9"}, step(6, 1.5), {"kind": "result", "step": 6, "seconds": 360.0},
]  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "first <run>"
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG)
    return path


def write(directory, records, tail="") -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_one_sentence_says_what_the_run_did(directory, capsys):
    write(directory, RESUMED)
    assert cli.main(["report", str(directory)]) == 0
    assert sentence(read_run(directory)) == (
        "A model of 410 thousand parameters learned from 2,560 tokens of the Python standard library's source code in 6 updates, in "
        "sequences of up to 512 tokens, in 6m00s (taken up again 1 time); its validation loss went from 2.500 to 2.000 nats a token, where "
        "counting pairs of tokens gives 2.400; a step took 1.00 GiB at most of the 1.50 GiB allowed."
    )
    page = (directory / "report.html").read_text()
    for part in ("2.0000", "12,346", "1.00 GiB", "books", "90.0%", "3.1%", "2.14", "first &lt;run&gt;", "0 to 63"):
        assert part in page, part


def test_the_page_asks_no_network_and_no_text_of_the_run_becomes_markup(directory):
    hostile = "</script><img src=http://x>"
    asked = {**validation(6, 1.0)["probes"][0], "probe": hostile}
    write(directory, [*RESUMED, {**validation(6, 1.0), "probes": [asked]}, {"kind": "stopped", "step": 6, "reason": hostile}])
    assert cli.main(["report", str(directory), "--out", str(directory / "page.html")]) == 0
    page = (directory / "page.html").read_text()
    assert set(re.findall(r"https?://[^\"'\s<&)]*", page.replace("src=http://x", ""))) == {"http://www.w3.org/2000/svg"}
    assert page.count("</script>") == 2 and "<b id" not in page and "<img" not in page


def test_a_step_that_was_done_again_is_shown_once_as_it_was_last(directory):
    write(directory, RESUMED)
    found = read_run(directory)
    assert [(r["step"], r["loss"]) for r in found.steps] == [(1, 2.0), (2, 2.0), (3, 1.9), (4, 2.0), (6, 1.5)]
    assert found.first["torch"] == "2.14" and found.first["unigram"] == 3.1
    (loss,) = (chart for chart in charts(found) if chart["id"] == "loss")
    assert [p[0] for p in loss["series"][0]["points"]] == [1, 2, 3, 4, 6]
    assert [m["label"] for m in loss["marks"]] == ["T = 256", "T = 512"]


@pytest.mark.parametrize(
    "records, tail, said",
    [
        ([], "", "no update is recorded"),
        ([RUN], "", "no update is recorded"),
        ([step(1)], "", "1 of 6 updates"),
        ([{"kind": "step", "step": 1}, {"kind": "step", "step": 2, "loss": 1.0}], "", "The run has not ended: 2 of 6"),
        ([RUN, step(1)], '{"kind": "step", "st', "line 3 of the metrics file"),
        ([RUN, step(1, float("nan")), step(2)], "", "2 of 6"),
        ([RUN, step(1), {"kind": "memory", "step": 1}], "", "1 memory"),
        ([RUN, {"kind": "validation", "step": 2, "loss": None}], "7\nnull\n", "line 3, 4"),
    ],
)  # fmt: skip
def test_whatever_is_missing_or_unknown_is_said_and_the_rest_shown(records, tail, said, directory):
    write(directory, records, tail)
    assert cli.main(["report", str(directory)]) == 0
    assert said in (directory / "report.html").read_text()


def test_built_data_is_named_in_the_sentence(directory):
    (directory / "config.yaml").write_text("data: {source: tokens, tokens: [{path: built/books}, {path: built/code}]}\n")
    write(directory, [RUN, step(1)])
    assert "tokens of built/books, built/code in 1" in sentence(read_run(directory))


def test_without_a_config_the_page_still_tells(directory):
    (directory / "config.yaml").unlink()
    write(directory, RESUMED)
    assert cli.main(["report", str(directory)]) == 0


def test_a_directory_without_metrics_is_one_clear_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds no metrics.jsonl" in error and error.count("\n") == 1


def test_a_long_run_is_thinned_without_losing_its_memory_peak(directory):
    write(directory, [step(n, peak_bytes=2**31 if n == 7777 else 2**30) for n in range(1, 10_001)])
    found = read_run(directory)
    assert all(len(s["points"]) <= MOST_POINTS for chart in charts(found) for s in chart["series"])
    (memory,) = (chart for chart in charts(found) if chart["id"] == "memory")
    assert max(y for _, y in memory["series"][0]["points"]) == 2.0 and "largest of 7 updates" in memory["note"]


@pytest.mark.parametrize("width", [500, pytest.param(1280, marks=pytest.mark.slow)])
def test_a_browser_draws_every_chart_without_a_complaint(width, directory, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"NO BROWSER: the report page was not opened; install one of {', '.join(BROWSERS)} to have this tested")
    write(directory, RESUMED)
    assert cli.main(["report", str(directory)]) == 0
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         "--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=3000", "--dump-dom", (directory / "report.html").as_uri()],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    complaints = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert shown.returncode == 0 and complaints == []
    drawn = {figure.split('"')[0]: figure.split("</figure>")[0] for figure in shown.stdout.split('<figure id="')[1:]}
    assert set(drawn) == {"loss", "positions", "probe-recall", "throughput", "memory", "lr", "grad-norm"}
    for name, figure in drawn.items():
        paths = re.findall(r'<path d="(M[^"]*)"', figure)
        assert paths and "NaN" not in figure and "Infinity" not in figure and "undefined" not in figure, name
