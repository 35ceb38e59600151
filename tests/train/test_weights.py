"""Export to Hugging Face's format and back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from longtrain import cli
from longtrain.config import load_config
from longtrain.nn import LanguageModel
from longtrain.train.output import read_metrics
from longtrain.train.state import sum_of
from longtrain.train.weights import cast, load_weights

pytestmark = pytest.mark.usefixtures("no_picture")


def run_and_export(config_file, out, target, *overrides, flags=()):
    assert cli.main(["train", str(config_file), *overrides]) == 0
    assert cli.main(["export", str(out), str(target), *flags]) == 0
    return LanguageModel(load_config(out / "config.yaml")[0].model)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_shards_and_index_hold_the_weights_and_read_back(tied, config_file, out, tmp_path, capsys):
    target = tmp_path / "exported"
    model = run_and_export(config_file, out, target, f"model.tie_embeddings={tied}", "model.window=null", flags=("--shard", "20KB"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(target / f).values())
    for file in files:
        assert set(load_file(target / file)) == {name for name, place in index["weight_map"].items() if place == file}
    expected = load_file(out / "model.safetensors")
    assert set(index["weight_map"]) == set(expected)
    load_weights(model, target)
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor)
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] == (tied == "true") and config["max_position_embeddings"] == 64


def test_a_run_begins_with_exported_weights(config_file, out, tmp_path, capsys):
    run_and_export(config_file, out, tmp_path / "exported")
    other = tmp_path / "other"
    assert (
        cli.main(
            ["train", str(config_file), f"train.init={tmp_path / 'exported'}", f"output.dir={other}", "train.lr=1e-30", "train.steps=1"]
        )
        == 0
    )
    last, first = ([r["loss"] for r in read_metrics(d / "metrics.jsonl") if r["kind"] == "validation"][-1] for d in (out, other))
    assert first == pytest.approx(last, rel=1e-6)


def test_the_rotary_of_the_last_stage_is_in_the_config_and_bfloat16_keeps_its_masters(config_file, out, tmp_path, capsys):
    schedule = "train.length_schedule=[{from_step: 0, seq_len: 32}, {from_step: 2, seq_len: 64, rope_base: 5e5, rope_scaling: 2.0}]"
    overrides = (schedule, "model.window=[32]", "train.dtype=bfloat16")
    run_and_export(config_file, out, tmp_path / "wide", *overrides, flags=("--dtype", "float32"))
    assert cli.main(["export", str(out), str(tmp_path / "trained")]) == 0
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    wide, trained, saved = (load_file(p / "model.safetensors") for p in (tmp_path / "wide", tmp_path / "trained", out))
    for name, tensor in wide.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor.bfloat16(), trained[name]) and torch.equal(trained[name], saved[name])
    assert any(not torch.equal(t, t.bfloat16().float()) for t in wide.values())


def test_what_transformers_would_compute_otherwise_is_not_called_llama(config_file, out, tmp_path, capsys):
    run_and_export(config_file, out, tmp_path / "exported")  # windows [16, null]
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "longtrain"
    assert "transformers has no class that computes this model" in capsys.readouterr().out


def test_bad_exports_and_bad_weights_are_one_line(config_file, out, tmp_path, capsys):
    target = tmp_path / "exported"
    run_and_export(config_file, out, target, flags=("--shard", "20KB"))
    capsys.readouterr()
    for arguments, said in (
        (["export", str(out), str(target)], "is not empty"),
        (["export", str(out), str(config_file)], "run.yaml is a file"),
        (["export", str(tmp_path / "nowhere"), str(tmp_path / "x")], "there is no directory "),
        (["export", str(tmp_path), str(tmp_path / "x")], "is damaged"),
    ):
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    missing = sorted(target.glob("model-*"))[1]
    content = missing.read_bytes()
    for damage, said in (
        (lambda: missing.unlink(), f"names {missing.name}, which is not there"),
        (lambda: missing.write_bytes(content[:50]), "cannot be read"),
    ):
        damage()
        assert cli.main(["train", str(config_file), f"train.init={target}", "output.overwrite=true"]) == 2
        error = capsys.readouterr().err
        assert ": train.init: " in error and said in error and error.count("\n") == 1
    missing.write_bytes(content)
    for overrides, said in ((["model.hidden_size=32"], "[256, 16] for [256, 32]"), (["model.num_layers=3"], "no model.layers.2.")):
        assert cli.main(["train", str(config_file), f"train.init={target}", "output.overwrite=true", *overrides]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["train", str(config_file), f"train.init={tmp_path / 'nothing'}", "output.overwrite=true"]) == 2
    assert "is no safetensors file, and no directory with" in capsys.readouterr().err


def test_transformers_computes_the_same_loss(config_file, out, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model = run_and_export(config_file, out, tmp_path / "exported", "model.window=null", "model.norm_eps=1e-5")
    load_weights(model, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", local_files_only=True)
    ids = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_training_dtype_is_not_that_of_buffers_and_of_8_bits():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("frequencies", torch.ones(2, dtype=torch.float64))
    for name, kind in {"whole": torch.int8, "narrow": torch.float8_e4m3fn}.items():
        model.register_parameter(name, torch.nn.Parameter(torch.ones(2).to(kind), requires_grad=False))
    cast(model, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        "weight": torch.bfloat16, "bias": torch.bfloat16, "frequencies": torch.float64, "whole": torch.int8, "narrow": torch.float8_e4m3fn,
    }  # fmt: skip


def test_a_checksum_of_weights_knows_which_is_which_and_how_they_are_kept():
    one, other = torch.randn(3), torch.randn(3)
    assert sum_of([one, other]) == sum_of([one.clone(), other.clone()]) != sum_of([other, one])
    assert sum_of([one], torch.bfloat16) == sum_of([one.bfloat16()]) != sum_of([one])
