"""Runs on models of transformers: streamed as plain, resumed bit for bit, saved so that transformers and peft give the same loss."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longtrain import cli
from longtrain.config import load_config
from longtrain.hf.call import packed_loss
from longtrain.train import prepare
from longtrain.train.checkpoint import newest_whole, read_facts
from longtrain.train.console import StepBar
from longtrain.train.loader import open_data, pack
from longtrain.train.model import build_model
from longtrain.train.output import read_metrics
from longtrain.train.rotary import rotary_embeddings
from longtrain.train.schedule import stage_at
from longtrain.train.step import gradients
from tests.train.tiny_hf import write_run, write_shape, write_weights

pytestmark = pytest.mark.usefixtures("no_picture")
TINY = Path(__file__).parents[2] / "configs" / "tiny_chat"
LORA = "model.lora={rank: 4, alpha: 8, target_modules: [q_proj, down_proj]}"


@pytest.fixture
def run_file(tmp_path, texts, out):
    """``run_file(hf)``: a configuration that trains it."""
    return lambda hf: write_run(tmp_path / "run.yaml", hf, texts, out)


def train(file, *overrides):
    return cli.main(["train", str(file), *overrides])


def records(directory, *kinds):
    keys = ("kind", "step", "loss", "grad_norm", "lr")
    return [
        tuple(r.get(k) for k in keys) for r in read_metrics(directory / "metrics.jsonl") if r["kind"] in (kinds or ("step", "validation"))
    ]


def last_validation(directory):
    return records(directory, "validation")[-1][2]


def loss_of(model, config):
    """The validation loss of a model that transformers has loaded, by its own full attention, row by row."""
    held_out = pack(open_data(config.data)[1], config.data.seq_len, config.data)
    losses = []
    for row in range(len(held_out)):
        batch = held_out.read_row(row)
        losses.append(packed_loss(model.eval(), batch.input_ids_BT, batch.labels_BT, batch.cu_seqlens, reduction="none"))
    flat = torch.cat([loss.detach().flatten() for loss in losses]).double()
    return float(flat.sum() / (flat != 0).sum())


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("gemma3_text", ("train.tokens_per_update=128",)),
        pytest.param("qwen3", (LORA,), marks=pytest.mark.slow),
        pytest.param("llama", ("model.rope={rope_type: yarn, factor: 2}",), marks=pytest.mark.slow),
        pytest.param("gpt2", (), marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_streamed_are_twenty_plain_ones_up_to_rounding(family, overrides, run_file, tmp_path):
    file, ends = run_file(write_shape(tmp_path / "shape", family)), {}
    for name, memory in (("plain", "memory.chunk_tokens=null"), ("streamed", "memory.chunk_tokens=24")):
        assert (
            train(
                file, memory, f"output.dir={tmp_path / name}", "train.steps=20", "train.eps=1e-3", "train.validate_every=null", *overrides
            )
            == 0
        )
        ends[name] = [loss for _, _, loss, *_ in records(tmp_path / name)]
    assert len(ends["plain"]) == 21 and ends["plain"][-1] < ends["plain"][0]
    assert ends["streamed"] == pytest.approx(ends["plain"], rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        (LORA.replace("8,", "8, dropout: 0.2,"), "train.dtype=bfloat16"),
        (  # documents of all lengths up to 512, so that what NTK made of one must not reach the next update
            "train.length_schedule=[{from_step: 0, seq_len: 64}, {from_step: 1, seq_len: 512, rope: {rope_type: dynamic, factor: 4}}]",
            "data.seq_len=512",
            "memory.chunk_tokens=96",
        ),
    ],
    ids=["LoRA with dropout in bfloat16", "length schedule with NTK"],
)
def test_a_run_that_died_ends_as_one_that_did_not(overrides, run_file, out, tmp_path, crash_after, monkeypatch, capsys):
    file = run_file(write_shape(tmp_path / "shape", max_position_embeddings=40))
    every = ("checkpoint.every_steps=1", "train.steps=5", *overrides)
    every += () if "rope" in overrides[0] else ("model.rope={}",)
    assert train(file, f"output.dir={tmp_path / 'alone'}", *every) == 0
    crash_after(3)
    with pytest.raises(SystemExit):
        train(file, *every)
    monkeypatch.undo()
    capsys.readouterr()
    assert train(file, *every) == 0
    assert re.search("going on from step [23]", capsys.readouterr().out)
    assert records(out) == records(tmp_path / "alone")
    saved = [file for file in (out / "model").rglob("*.safetensors")]
    assert saved
    for file in saved:
        assert file.read_bytes() == (tmp_path / "alone" / file.relative_to(out)).read_bytes()


def test_a_directory_s_weights_are_trained_and_saved_so_that_transformers_gives_the_same_loss(run_file, out, tmp_path, capsys):
    weights = write_weights(tmp_path / "model")
    (weights / "tokenizer_config.json").write_text("{}")
    file = run_file(weights)
    assert train(file, "train.lr=1e-30", f"output.dir={tmp_path / 'still'}", "train.steps=2") == 0
    config, _ = load_config(file)
    assert last_validation(tmp_path / "still") == pytest.approx(loss_of(AutoModelForCausalLM.from_pretrained(weights), config), rel=1e-6)
    assert train(file) == 0
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    assert saved.config.use_cache and (out / "model" / "tokenizer_config.json").read_text() == "{}"
    assert last_validation(out) == pytest.approx(loss_of(saved, config), rel=1e-6)
    assert last_validation(out) < last_validation(tmp_path / "still") - 0.05
    assert cli.main(["export", str(out), str(tmp_path / "exported"), "--shard", "20KB"]) == 0
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in saved.state_dict().items())
    assert cli.main(["train", "--eval", str(out)]) == 0
    assert json.loads((out / "evaluation.json").read_text())["loss"] == pytest.approx(last_validation(out), rel=1e-6)


@pytest.mark.parametrize("drawn", [False, True], ids=["weights", "a shape"])
def test_an_adapter_is_saved_as_peft_reads_it(drawn, run_file, out, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    make = write_shape if drawn else write_weights
    file = run_file(make(tmp_path / "model"))
    assert train(file, LORA) == 0
    assert (out / "model" / "base").exists() == drawn
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out / "model")
    assert loaded.peft_config["default"].r == 4
    assert last_validation(out) == pytest.approx(loss_of(loaded, load_config(file)[0]), rel=1e-6)
    assert cli.main(["export", str(out), str(tmp_path / "exported")]) == 0
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "exported" / name).read_bytes() == (out / "model" / name).read_bytes()


def test_an_adapter_is_trained_on_with_the_settings_it_came_with(run_file, out, tmp_path, capsys):
    """The second run begins where the first one ended: its first validation, with steps that change nothing, is the first one's last."""
    pytest.importorskip("peft")
    file = run_file(write_weights(tmp_path / "model"))
    assert train(file, LORA, f"output.dir={tmp_path / 'first'}") == 0
    adapter = tmp_path / "first" / "model"
    again = f"model.lora={{adapter: {adapter}}}"
    assert train(file, again, "train.lr=1e-30", f"output.dir={tmp_path / 'still'}", "train.steps=2") == 0
    assert last_validation(tmp_path / "still") == pytest.approx(last_validation(tmp_path / "first"), rel=1e-6)
    assert train(file, again) == 0
    assert last_validation(out) < last_validation(tmp_path / "first")
    described = [json.loads((directory / "adapter_config.json").read_text()) for directory in (adapter, out / "model")]
    assert all(a["r"] == 4 and a["lora_alpha"] == 8 and sorted(a["target_modules"]) == ["down_proj", "q_proj"] for a in described)
    assert cli.main(["export", str(out), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "adapter_model.safetensors").read_bytes() == (out / "model" / "adapter_model.safetensors").read_bytes()
    assert cli.main(["verify", str(file), again]) == 0


@pytest.mark.parametrize(
    "bits, dtype",
    [
        ("int8", "float32"),
        pytest.param("nf4", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float8", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_in_fewer_bits_stay_as_they_are_beside_their_adapters(bits, dtype, run_file, out, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    from longtrain.nn import FrozenLinear, freeze_linears

    file, settings = (
        run_file(write_shape(tmp_path / "shape", tie_word_embeddings=True)),
        (LORA, f"model.quantize={bits}", f"train.dtype={dtype}", "train.eps=1e-3"),
    )
    setup = prepare.prepare(*load_config(file, settings))
    setup.loader.close()
    frozen = [module for module in setup.model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == 2 * 7 and {module.weight.element_size() for module in frozen} == {1}
    assert setup.optimizer.names and all("lora_" in name for name in setup.optimizer.names)
    assert setup.costs.parameters == prepare.prepare(*load_config(file, [LORA])).costs.parameters
    assert train(file, *settings) == 0
    assert f"14 linear layers are kept in {bits}" in capsys.readouterr().out
    assert train(file, *settings, "memory.chunk_tokens=null", f"output.dir={tmp_path / 'plain'}") == 0
    assert last_validation(out) == pytest.approx(last_validation(tmp_path / "plain"), rel=1e-4 if dtype == "float32" else 1e-2)
    assert cli.main(["train", "--eval", str(out)]) == 0
    assert json.loads((out / "evaluation.json").read_text())["loss"] == pytest.approx(last_validation(out), rel=1e-6)
    if dtype == "float32":  # the base is saved whole, as it was after rounding, and rounds to itself
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out / "model")
        assert last_validation(out) == pytest.approx(loss_of(loaded, load_config(file)[0]), rel=1e-5)
        base = AutoModelForCausalLM.from_pretrained(out / "model" / "base")
        freeze_linears(base, bits)
        loaded = peft.PeftModel.from_pretrained(base, out / "model")
        assert last_validation(out) == pytest.approx(loss_of(loaded, load_config(file)[0]), rel=1e-5)


@pytest.mark.parametrize("model", [pytest.param("hf", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.slow)])
def test_three_kills_and_a_comparison(model, tmp_path):
    """kill -9, as `tools/kill_resume.py` does it; of adapters beside weights in 8 bits too."""
    pytest.importorskip("peft")
    tool = Path(__file__).parents[2] / "tools" / "kill_resume.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--model", model, "--kills", "3", "--steps", "16", "--inside", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit" in done.stdout


def test_only_adapters_have_gradients_moments_and_checkpoints(run_file, out, tmp_path, capsys):
    pytest.importorskip("peft")
    file = run_file(write_shape(tmp_path / "model"))
    assert train(file, LORA, "train.steps=1", "train.validate_every=null") == 0
    held = read_facts(newest_whole(out / "checkpoints")[0])["tensors"]
    assert held and all("lora_" in name for name in held if not name.startswith("random."))
    setup = prepare.prepare(*load_config(file, [LORA]))
    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    *_, norm = gradients(setup.model, setup.optimizer, setup.loader.update(0), 1, setup.device, StepBar(open("/dev/null", "w")))
    have = {name for name, p in setup.model.named_parameters() if p.grad is not None}
    assert have == {name for name in before if "lora_" in name} == set(setup.optimizer.names)
    setup.optimizer.update(0.1, norm)
    assert {n for n, p in setup.model.named_parameters() if not torch.equal(p, before[n])} <= have
    setup.loader.close()


@pytest.mark.parametrize(
    "family, rope, wanted",
    [
        ("qwen3", "{rope_theta: 5e5}", {"rope_type": "default", "rope_theta": 5e5}),
        ("qwen3", "{rope_type: linear, factor: 4}", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        ("llama", "{rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4}", {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}),
        ("gemma3_text", "{rope_type: yarn, factor: 4, beta_fast: 16}", {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 64}),
    ],
)  # fmt: skip
def test_positions_are_those_that_transformers_makes_of_the_saved_configuration(family, rope, wanted, run_file, tmp_path):
    file = run_file(write_shape(tmp_path / "shape", family))
    config, where = load_config(file, [f"model.rope={rope}", "data.seq_len=256"])
    changed, *_ = build_model(config, where)
    schedule = "train.length_schedule=[{from_step: 0, seq_len: 64}, {from_step: 2, seq_len: 256, rope: ROPE}]".replace("ROPE", rope)
    config, where = load_config(file, [schedule, "data.seq_len=256"])
    torch.manual_seed(0)
    staged, set_rotary, _ = build_model(config, where)
    plain, *_ = build_model(load_config(file)[0], where)
    ids = torch.arange(200)[None]
    for step, same, other in ((0, plain, changed), (2, changed, plain), (1, plain, changed)):
        set_rotary(stage_at(config, step))
        for (*_, mine), (*_, theirs), (*_, others) in zip(*map(rotary_embeddings, (staged, same, other)), strict=True):
            kinds = getattr(mine, "layer_types", [None])
            for kind in kinds:
                arguments = (torch.zeros(1), ids) if kind is None else (torch.zeros(1), ids, kind)
                for a, b, c in zip(mine(*arguments), theirs(*arguments), others(*arguments), strict=True):
                    assert torch.equal(a, b) and torch.equal(a, c) == (kind == "sliding_attention")
    set_rotary(stage_at(config, 2))
    staged.save_pretrained(tmp_path / "saved")
    described = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config
    found = described.rope_parameters.get("full_attention", described.rope_parameters)
    assert {k: v for k, v in found.items() if v is not None} == wanted
    assert described.max_position_embeddings == max(256, round(wanted.get("factor", 0) * wanted.get("original_max_position_embeddings", 0)))


def no_config(directory):
    (directory / "config.json").unlink()


def adapter(directory):
    no_config(directory)
    (directory / "adapter_config.json").write_text("{}")


def no_weights(directory):
    for file in directory.glob("*.safetensors"):
        file.unlink()


def one_tensor_less(directory):
    for file in directory.glob("*.safetensors"):
        kept = {name: t for name, t in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
        save_file(kept, file, metadata={"format": "pt"})


def changed(**settings):
    def change(directory):
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def quantised(directory):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is there")
    changed(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(directory)


# name: (what is done to the model's directory, overrides, setting, words of the message)
WRONG = {
    "no directory": (None, ["model.hf=nowhere"], "model.hf", "there is no nowhere", "nothing is downloaded"),
    "no config.json": (no_config, [], "model.hf", "holds no config.json", "save_pretrained"),
    "an adapter": (adapter, [], "model.hf", "it is an adapter"),
    "no such adapter": (None, ["model.lora={adapter: nowhere}"], "model.lora.adapter", "nowhere holds no adapter_config.json"),
    "quantised by a library that is not there": (quantised, [], "model.hf", "bitsandbytes", "pip install"),
    "no weights": (no_weights, [], "model.hf", "holds no safetensors", "for random weights"),
    "weights missing": (one_tensor_less, [], "model.hf", "lacks 1 tensors", "layers.1.mlp.up_proj.weight", "begin at random"),
    "unknown family": (changed(model_type="none_such"), [], "model.hf", "describes no model", "none_such"),
    "a width that is text": (changed(hidden_size="wide"), [], "model.hf", "describes no model", "hidden_size"),
    "heads that do not fit": (changed(num_key_value_heads=3), [], "model.hf", "correct its files"),
    "balanced experts": (changed(output_router_logits=True), [], "model.hf", "output_router_logits: true", "set it false"),
    "a target that matches nothing": (None, ["model.lora={target_modules: [q_proj, zebra]}"], "model.lora.target_modules[1]",
                                      "zebra matches no layer", "q_proj, up_proj"),
    "a target that is no linear layer": (None, ["model.lora={target_modules: [input_layernorm]}"], "model.lora.target_modules",
                                         "name linear layers"),
    "adapters on the head": (None, ["model.lora={target_modules: [lm_head]}"], "memory", "lm_head cannot be streamed",
                             "without the section memory"),
    "documents beyond the positions": (changed(max_position_embeddings=16), [], "model.rope", "is missing", "16 positions", "rope: {}"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_is_refused_in_one_located_line(name, run_file, out, tmp_path, capsys):
    if "lora" in str(WRONG[name]):
        pytest.importorskip("peft")
    damage, overrides, setting, *words = WRONG[name]
    weights = write_weights(tmp_path / "model")
    if damage is not None:
        damage(weights)
    file = run_file(weights)
    assert train(file, *overrides) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    place = "command line" if overrides and not setting == "memory" else r"\S+run.yaml:\d+"
    assert re.match(rf"{place}: {re.escape(setting)}: ", error), error
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize("wrong", ["another model's", "another method", "whole modules", "no weights"])
def test_an_adapter_that_is_not_the_model_s_is_refused_in_one_located_line(wrong, run_file, out, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    weights, adapter = write_weights(tmp_path / "model"), tmp_path / "adapter"
    given = AutoModelForCausalLM.from_pretrained(
        write_weights(tmp_path / "other", hidden_size=32) if wrong == "another model's" else weights
    )
    method = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]) if wrong == "another method" else None
    trained = ["lm_head"] if wrong == "whole modules" else None
    peft.get_peft_model(given, method or peft.LoraConfig(target_modules=["q_proj"], modules_to_save=trained)).save_pretrained(adapter)
    if wrong == "no weights":
        (adapter / "adapter_model.safetensors").unlink()
    assert train(run_file(weights), f"model.lora={{adapter: {adapter}}}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    words = {"another model's": "does not fit Qwen3ForCausalLM", "another method": "is not LoRA alone (IA3)",
             "no weights": "holds no adapter_model.safetensors",
             "whole modules": "is not LoRA alone (modules_to_save: ['lm_head'])"}  # fmt: skip
    assert error.startswith("command line: model.lora.adapter: ") and words[wrong] in error and not out.exists()


def test_conversations_are_trained_on_with_the_model_s_own_tokenizer_alone(run_file, out, tmp_path, monkeypatch, capsys):
    """Others are refused before weights are read, which may take minutes."""
    pytest.importorskip("jinja2")
    shape = write_shape(tmp_path / "shape", vocab_size=259, max_position_embeddings=512)
    built = tmp_path / "built"
    assert cli.main(["data", "build", str(built), str(TINY / "chats.jsonl"), "--format", "chat", "--tokenizer", str(TINY)]) == 0
    shutil.copy(TINY / "tokenizer.json", shape.parent)
    data = ("data.source=tokens", "data.files=[]", f"data.tokens=[{{path: {built}}}]", "data.seq_len=256", "train.steps=1")
    file = run_file(shape)
    assert train(file, *data) == 0
    (step,) = (r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "step")
    assert 0 < step["targets"] < 200 and (out / "model" / "tokenizer.json").exists()
    (shape.parent / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(prepare, "build_model", None)
    assert train(file, *data, "output.overwrite=true") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data: its tokens were made by tokenizers" in error and f"--tokenizer {shape.parent}" in error


def test_bfloat16_weights_leave_rotary_frequencies_and_adapters_masters_in_float32(run_file, tmp_path):
    pytest.importorskip("peft")
    setup = prepare.prepare(*load_config(run_file(write_shape(tmp_path / "shape")), [LORA, "train.dtype=bfloat16"]))
    setup.loader.close()
    assert {p.dtype for p in setup.model.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in setup.optimizer.masters} == {torch.float32}
    assert {b.dtype for _, _, module in rotary_embeddings(setup.model) for b in module.buffers()} == {torch.float32}


def test_every_attention_call_gets_the_kernel_setting(run_file, tmp_path):
    file = run_file(write_shape(tmp_path / "shape"))
    for chosen in ("error", "warn"):
        config, where = load_config(file, [f"train.kernel_fallback={chosen}"])
        model, *_ = build_model(config, where)
        prepare.settle_fallback(model, torch.device("cuda"), config, where)
        report = prepare.stream(model, prepare.make_plan(model, config, where), where)
        mixers = [mixer for layer in model.model.layers for mixer in layer.mixers(**layer.example(13)[1])]
        assert len(mixers) == 2 and {mixer.kernel_fallback for mixer in mixers} == {chosen}
        report.undo()


def test_models_with_learned_positions_take_no_longer_sequences_and_no_rotary_settings(run_file, tmp_path, capsys):
    file = run_file(write_shape(tmp_path / "shape", "gpt2"))
    assert train(file, "data.seq_len=128") == 2
    assert "data.seq_len: 128 is more than the 64 positions that the model has; lower it to 64" in capsys.readouterr().err
    assert train(file, "model.rope={rope_theta: 1e6}") == 2
    assert "model.rope: the model has no rotary positions to change; remove it" in capsys.readouterr().err


def test_a_checkpoint_beside_other_frozen_weights_is_refused(run_file, tmp_path, capsys):
    pytest.importorskip("peft")
    file = run_file(write_shape(tmp_path / "shape"))
    assert train(file, LORA, "train.steps=2", "train.validate_every=null") == 0
    capsys.readouterr()
    assert train(file, LORA, "train.steps=4", "train.seed=1") == 2
    assert "model: " in (error := capsys.readouterr().err) and "other frozen weights" in error


@pytest.mark.parametrize("module, overrides, extra", [("transformers", (), "hf"), ("peft", (LORA,), "lora")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(module, overrides, extra, run_file, tmp_path, monkeypatch, capsys):
    file = run_file(write_shape(tmp_path / "shape"))
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert train(file, *overrides) == 2
    error = capsys.readouterr().err
    assert f"pip install longtrain[{extra}]" in error and "model." in error and error.count("\n") == 1


def test_a_plan_is_made_for_a_budget_and_verify_says_that_it_is_exact(run_file, tmp_path, capsys):
    file = str(run_file(write_shape(tmp_path / "shape", "gemma3_text")))
    assert cli.main(["plan", file, "memory.chunk_tokens=null", "memory.budget=16GiB"]) == 0
    assert "of 16.00 GiB" in capsys.readouterr().out
    assert train(file, "memory.chunk_tokens=null", "memory.budget=16GiB", "train.steps=1") == 0
    assert "predicted peak" in capsys.readouterr().out
    assert cli.main(["verify", file]) == 0
    assert capsys.readouterr().out.endswith("exact\n")
