"""What is made of a profile: table, page, picture, comparison, commands; and what a program that fails leaves behind."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import longtrain as lt
from longtrain import cli
from longtrain.commands import profile as command
from longtrain.commands.profile import predictable
from longtrain.config import load_config
from longtrain.memory.account import row_name
from longtrain.memory.advice import changes_that_fit, single_changes
from longtrain.memory.compare import difference, items_of
from longtrain.memory.page import page
from longtrain.memory.table import table
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.offload import DeviceStore
from longtrain.planner import measure_model, peak, step_memory
from longtrain.planner.asked import Asked
from longtrain.planner.cost import Phase
from longtrain.planner.rates import usual_rates
from longtrain.span import Span
from tests.browser import open_page
from tests.processes import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import memory_profiler

HOSTILE = "</script><img src=http://x>"

CONFIG = """\
model: {vocab_size: 64, num_layers: 2, hidden_size: 32, intermediate_size: 64, num_heads: 2, num_kv_heads: 1}
memory: {chunk_tokens: 64}
data: {source: recall, seq_len: 256}
train: {steps: 4, lr: 1e-3, device: cpu, kernel_fallback: warn}
metrics: {peak_tflops: 1.0}
eval: {probes: []}
output: {dir: OUT}
"""


def profiled(path, width: int = 128, rows: int = 2048, **options) -> dict:
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    with lt.profile(path, quiet=True, **options) as watched:
        model(torch.randn(rows, 64)).square().sum().backward()
        optimizer.step()
    return watched.result


def test_the_first_sentence_names_the_largest_consumer_and_what_to_change(tmp_path, source):
    other = DeviceStore()  # another model's, which is not the one that is profiled
    other.put("layer 0", Span(0, 64), torch.ones(1, 64))
    result = profiled(tmp_path, rows=65536)  # more than what other tests may have left in this process
    said = result["sentence"]
    by_category = result["peak"]["by_category"]
    assert f"the largest part is {max(by_category, key=by_category.get)}" in said and "To change: lt.apply" in said
    text = table(result)
    assert said in text and "unattributed" in text
    for column in ("phase", "predicted", "measured", "error %", "largest item", "what would reduce it"):
        assert column in text


def test_the_page_is_one_file_that_asks_no_network_and_speaks_of_gib(tmp_path, source):
    result = profiled(tmp_path / "a", title=HOSTILE, budget="1GiB")
    text = (tmp_path / "a" / "profile.html").read_text()
    assert set(re.findall(r"https?://[^\"'\s<&)]*", text.replace("src=http://x", ""))) == {"http://www.w3.org/2000/svg"}
    assert text.count("</script>") == 4 and "<img" not in text
    assert "MiB" not in text and "GiB" in text
    assert json.loads((tmp_path / "a" / "profile.json").read_text()) == json.loads(json.dumps(result))
    line = result["timeline"]
    assert len(line["seconds"]) == len(line["level"]) == len(line["tops"])
    assert max(line["level"]) == result["peak"]["bytes"]  # the chart loses no peak
    assert [sum(parts) for parts in zip(*line["series"].values(), strict=True)] == line["level"]


def test_the_picture_is_drawn(tmp_path, picture):
    profiled(tmp_path)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width, scheme", [(500, "light"), pytest.param(1280, "dark", marks=pytest.mark.slow)])
def test_a_browser_draws_the_page_without_a_complaint(width, scheme, tmp_path):
    result = profiled(tmp_path, budget="1GiB")
    result["lengths"] = [{"tokens": t, "predicted": t << 10, "measured": t << 10} for t in (1024, 2048)]
    result["ranks"] = [result["peak"]] * 2
    result["timeline"]["lanes"] = [{"name": "to disk", "spans": [[0.0, 0.001, 4096, 1]]}]
    file = tmp_path / "page.html"
    file.write_text(page(result))
    shown, figures = open_page(file, tmp_path, width=width, scheme=scheme)
    assert figures == {"timeline", "lengths"} and "rank 1" in shown


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.error = error

    def forward(self, x):
        x = self.layers[0](x)
        raise self.error


@pytest.mark.parametrize(
    "error, changes",
    [(ValueError("the second layer is broken"), []), (torch.OutOfMemoryError("CUDA out of memory"), ["memory.chunk_tokens: 64"])],
)
def test_a_step_that_fails_leaves_the_report_and_the_error(error, changes, tmp_path, source):
    asked = []
    with pytest.raises(type(error), match=str(error)):
        with lt.profile(tmp_path, quiet=True, changes=lambda: asked.append(1) or ["memory.chunk_tokens: 64"]) as watched:
            Fails(error)(torch.randn(16, 8))
    result = json.loads((tmp_path / "profile.json").read_text())
    assert result == json.loads(json.dumps(watched.result))
    assert result["failure"]["phase"] == "forward of Fails" and str(error) in result["failure"]["error"]
    assert "failed in forward of Fails" in result["sentence"]
    assert result["changes"] == changes and len(asked) == len(changes)
    assert str(error) in (tmp_path / "profile.html").read_text()


def test_the_cpu_s_allocator_that_gives_no_more_is_out_of_memory(tmp_path, source):
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        with lt.profile(tmp_path, quiet=True, changes=lambda: ["less"]) as watched:
            nn.Linear(8, 8)(torch.empty(1 << 48, 8))
    assert watched.result["changes"] == ["less"] and "allocate" in watched.result["failure"]["error"]


def test_a_backward_pass_that_fails_is_named_by_its_layer(tmp_path, source):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("no gradient here")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            return self.layers[2](self.layers[1](Broken.apply(self.layers[0](x))))

    with pytest.raises(RuntimeError, match="no gradient here"), lt.profile(tmp_path, quiet=True) as watched:
        Model()(torch.randn(4, 8)).sum().backward()
    assert watched.result["failure"]["phase"] == "backward of layers.1"


def test_after_a_failure_that_was_caught_steps_are_steps_again(tmp_path, source):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(512, 64)

    def fail(gradient):
        raise RuntimeError("caught")

    with lt.profile(tmp_path, quiet=True) as watched:
        out = model(x)
        out.register_hook(fail)
        with pytest.raises(RuntimeError, match="caught"):
            out.sum().backward()
        del out
        model(torch.randn(4096, 64)).sum().backward()
    assert watched.result["peak"]["phase"].startswith("backward") and watched.result["failure"] is None
    assert {band["phase"] for band in watched.result["timeline"]["bands"]} >= {"forward", "backward"}


def test_budgets_are_checked_and_an_exceeded_one_is_said(tmp_path):
    for budget in ("-3GiB", "0", "many"):
        with pytest.raises(ValueError, match="budget"):
            lt.profile(tmp_path, budget=budget)
    result = profiled(tmp_path, budget="1KiB", changes=lambda: ["less"])
    assert result["over_budget"] and result["changes"] == ["less"] and "exceeded" in result["sentence"]


def test_changes_that_fit_do_and_the_cheapest_comes_first():
    model = LanguageModel(ModelConfig(vocab_size=64, num_layers=4, hidden_size=64, intermediate_size=192, num_heads=2, num_kv_heads=2))
    footprint, tokens = measure_model(model), 8192
    plan = lt.Plan(chunk_tokens=2048, segment_layers=2)
    needed = peak(step_memory(footprint, plan, tokens)).total
    found = changes_that_fit(footprint, plan, tokens, needed - 1)
    assert len(found) == 3 and all("memory." in text for text in found)
    for text in found:
        if match := re.match(r"memory\.(\w+): ([\d.]+) \(now", text):
            name, value = match[1], float(match[2]) if "." in match[2] else int(match[2])
            changed = lt.Plan(**{"chunk_tokens": 2048, "segment_layers": 2, name: value})
            assert peak(step_memory(footprint, changed, tokens)).total <= needed - 1, text
    (nothing,) = changes_that_fit(footprint, plan, tokens, 1)
    assert nothing.startswith("more memory: this plan is predicted to take")


def test_a_shorter_sequence_under_the_same_plan_fits():
    model = LanguageModel(ModelConfig(vocab_size=64, num_layers=2, hidden_size=64, intermediate_size=192, num_heads=2, num_kv_heads=2))
    footprint, plan, tokens = measure_model(model), lt.Plan(chunk_tokens=128, store_outputs=0.0), 1 << 16
    needed = lambda n: peak(step_memory(footprint, plan, n)).total
    shorter = int(re.search(r"data.seq_len: (\d+)", " ".join(changes_that_fit(footprint, plan, tokens, needed(40_000))))[1])
    assert needed(shorter) <= needed(40_000) < needed(shorter + 128) and 39_000 < shorter < 41_000


@pytest.mark.parametrize("alike", [True, False])
def test_layers_of_several_kinds_are_not_told_to_share_a_segment(alike):
    model = LanguageModel(ModelConfig(vocab_size=64, num_layers=4, hidden_size=64, intermediate_size=192, num_heads=2, num_kv_heads=2))
    asked = Asked(replace(measure_model(model), alike=alike), 4096, 1, None, usual_rates(torch.device("cpu")), 1)
    told = [text for group in single_changes(asked, lt.Plan(chunk_tokens=512)) for _, text in group]
    assert any("segment_layers" in text for text in told) == alike


def test_a_gpu_is_told_what_may_leave_for_the_host(tmp_path):
    model = LanguageModel(ModelConfig(vocab_size=64, num_layers=4, hidden_size=64, intermediate_size=192, num_heads=2, num_kv_heads=2))
    footprint, tokens = replace(measure_model(model), device=torch.device("cuda")), 1 << 15
    plan = lt.Plan(chunk_tokens=128, store_outputs=0.05)
    outputs = [text for _, text in single_changes(asked_of(footprint, tokens), plan)[-2]]
    assert outputs[0].startswith("memory.offload.outputs: host, with memory.host_budget: ")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path)))
    budget = re.search(r"host_budget: (\S+)", outputs[0])[1]
    changed, _ = load_config(config, [f"memory.host_budget={budget}", "memory.offload={outputs: host}"])
    plan = replace(plan, offload=changed.memory.tiers())
    assert Asked(footprint, tokens, 1, plan.offload, usual_rates(footprint.device), 1).fits_tiers(plan)


def asked_of(footprint, tokens: int) -> Asked:
    return Asked(footprint, tokens, 1, None, usual_rates(footprint.device), 1)


@pytest.mark.parametrize(
    "memory, first", [("{chunk_tokens: 512}", r"memory\.\w+: "), ("{budget: 3GiB}", r"memory\.budget: "), ("{}", r"memory\.budget: ")]
)
def test_where_memory_does_not_suffice_the_command_names_changes_that_its_config_takes(memory, first, tmp_path, monkeypatch, capsys):
    def greedy(setup, *rest):
        update(setup, *rest)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    update = command.update
    monkeypatch.setattr(command, "update", greedy)
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path / "out")).replace("{chunk_tokens: 64}", memory).replace("256", "2048"))
    assert cli.main(["profile", str(config)]) == 1
    assert "out of memory" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "memory" / "profile.json").read_text())
    assert result["failure"]["phase"] and 1 <= len(result["changes"]) <= 3 and re.match(first, result["changes"][0])
    page = (tmp_path / "out" / "memory" / "profile.html").read_text()
    assert "What would fit, the cheapest first" in page and "MiB" not in page
    for text in result["changes"]:
        if match := re.match(r"([\w.]+): (\S+)", text):
            load_config(config, [f"{match[1]}={match[2]}"])


def test_a_sequence_beyond_the_data_is_refused(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path / "out")))
    assert cli.main(["profile", str(config), "--seq-len", "1000000000"]) == 2
    said = capsys.readouterr().err
    assert "data.seq_len: 1000000000 tokens are more than all training documents together have" in said and said.count("\n") == 1


def test_without_the_extension_lengths_are_profiled_completely_and_sampling_is_refused(tmp_path, monkeypatch, capsys):
    for module in ("longtrain.memory.profile", "longtrain.commands.profile"):
        monkeypatch.setattr(sys.modules[module], "missing", lambda: "a test left the extension out")
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path / "out")))
    assert cli.main(["profile", str(config), "--seq-len", "128"]) == 0
    capsys.readouterr()
    assert cli.main(["profile", str(config), "--sampling"]) == 2
    said = capsys.readouterr().err
    assert "--sampling: counts what the allocators report, and a test left the extension out" in said and said.count("\n") == 1


def test_two_profiles_differ_by_what_changed(tmp_path, source, capsys):
    a, b = profiled(tmp_path / "a", width=128, title="narrow"), profiled(tmp_path / "b", width=256, title="wide")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "profile.json")]) == 0
    said = capsys.readouterr().out
    assert "wide peaks at" in said and "above all" in said
    rows = difference(a["peak"]["by_category"], b["peak"]["by_category"])
    assert sum(y - x for _, x, y in rows) == b["peak"]["bytes"] - a["peak"]["bytes"]
    relu = next(row for row in difference(items_of(a), items_of(b)) if "relu" in row[0])
    assert relu[2] == 2 * relu[1] == 2048 * 256 * 4
    assert (tmp_path / "b" / "comparison.html").read_text().count("</script>") == 2


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(500, "dark"), (1280, "light")])
def test_a_browser_draws_the_comparison_without_a_complaint(width, scheme, tmp_path):
    for name, units in (("a", 64), ("b", 128)):
        profiled(tmp_path / name, width=units, title=name)
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert open_page(tmp_path / "b" / "comparison.html", tmp_path, width=width, scheme=scheme)[1] == {"both"}


def test_what_is_no_profile_is_one_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for wrong in (tmp_path, tmp_path / "other.json"):
        assert cli.main(["compare", str(wrong), str(wrong)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_the_command_predicts_measures_and_draws_peak_against_length(tmp_path, capsys, allocators):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path / "out")))
    assert cli.main(["profile", str(config), "--seq-len", "128"]) == 0
    said = capsys.readouterr().out
    assert "backward of layers 1 to 1" in said and "T = 128: peak" in said
    result = json.loads((tmp_path / "out" / "memory" / "profile.json").read_text())
    assert [p["tokens"] for p in result["lengths"]] == [128, 256] and all(p["predicted"] and p["measured"] for p in result["lengths"])
    assert result["peak"]["unattributed"] <= 0.02 * result["peak"]["bytes"]
    assert all(row["measured"] for row in result["phases"] if row["predicted"])


@pytest.mark.parametrize("band", ["model.embed", "model.embed_tokens", "transformer.wte", "gpt_neox.embed_in"])
def test_the_embedding_is_known_by_the_names_that_it_has(band):
    predicted = [Phase("backward of the embedding", {})]
    assert row_name({"phase": "backward", "band": band}, predicted) == predicted[0].name
    assert row_name({"phase": "backward", "band": "model.norm"}, predicted) == "backward of model.norm"


@pytest.mark.parametrize("settings, each", [(["train.dtype=bfloat16"], 2 + 4 + 8 + 4), (["memory.optimizer=host"], 4 + 4 + 8 + 4)])
def test_masters_and_wide_gradients_are_predicted(settings, each, tmp_path, capsys):
    """Bytes a parameter when the embedding, the last, has its gradient: the weight, its master, two moments, the gradient."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path / "out")))
    settings = [*settings, "model.hidden_size=128", "model.intermediate_size=512"]
    found, at = load_config(config, settings)
    footprint = predictable(found, at)
    assert footprint.parameters + footprint.optimizer == (each - 4) * footprint.trained
    last = step_memory(footprint, lt.Plan(chunk_tokens=64), 256)[-1].items
    assert last["gradients"] >= 4 * footprint.trained
    assert cli.main(["profile", str(config), *settings]) == 0
    result = json.loads((tmp_path / "out" / "memory" / "profile.json").read_text())
    by_category = result["peak"]["by_category"]
    assert by_category["parameters"] + by_category["optimizer"] == pytest.approx(footprint.parameters + footprint.optimizer, rel=0.02)


def test_a_directory_that_cannot_be_made_is_said_before_the_step(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("OUT", str(tmp_path / "tiny.yaml")))
    assert cli.main(["profile", str(config)]) == 1
    assert "cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize("end, status", [("", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("raise OSError('gone')", OSError)])
def test_any_script_is_profiled_as_it_is(end, status, tmp_path, source, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\nfrom torch import nn\nassert sys.argv[1:] == ['--fast'] and __name__ == '__main__'\n"
        f"model = nn.Linear(64, 64)\nmodel(torch.randn(512, 64)).sum().backward()\n{end}\n"
    )
    arguments = ["--out", str(tmp_path / "memory"), str(script), "--fast"]
    before = list(sys.path), list(sys.argv)
    if status is OSError:
        with pytest.raises(OSError, match="gone"):
            memory_profiler.main(arguments)
    else:
        assert memory_profiler.main(arguments) == status
    sys.path[:] = before[0]
    assert sys.argv == before[1]
    result = json.loads((tmp_path / "memory" / "profile.json").read_text())
    assert result["title"] == "train" and result["peak"]["by_category"]["parameters"] == 64 * 65 * 4
    assert (result["failure"] is not None) == (status is OSError)


def test_what_a_profile_cannot_do_is_said_before_the_script_runs(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it ran')")
    monkeypatch.setattr(sys.modules["longtrain.memory.profile"], "missing", lambda: "a test left the extension out")
    wrong = {
        "budget": ["--budget=-3GiB", str(script)],
        "left the extension out": ["--sampling", str(script)],
        "is no file": [str(tmp_path / "none.py")],
    }
    for said, arguments in wrong.items():
        with pytest.raises(SystemExit) as end:
            memory_profiler.main(["--out", str(tmp_path / "memory"), *arguments])
        assert end.value.code == 2 and said in capsys.readouterr().err


def work(rank: int, world: int, directory: Path) -> None:
    with lt.profile(directory, quiet=True) as watched:
        held = torch.zeros((rank + 1) << 20)
        torch.distributed.all_reduce(torch.ones(8))
    assert held.numel() and [r["bytes"] >= ((i + 1) << 20) * 4 for i, r in enumerate(watched.result["ranks"])] == [True] * world


@pytest.mark.slow
def test_every_rank_has_its_strip(tmp_path):
    run_ranks(work, 2, tmp_path)
    assert (tmp_path / "rank1-profile.json").exists()
    text = (tmp_path / "profile.html").read_text()
    assert "rank 0" in text and "rank 1" in text
