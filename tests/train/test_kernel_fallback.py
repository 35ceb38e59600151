"""`train.kernel_fallback`: a run without fast attention kernels is refused, or allowed and said."""

import torch

from longtrain import cli
from longtrain.config import load_config
from longtrain.nn import LanguageModel
from longtrain.train import prepare

WHY = "the C++ extension was not built; install a C++ compiler"


def test_without_the_extension_a_run_is_refused_unless_it_is_allowed(config_file, out, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "MISSING", WHY)
    assert cli.main(["train", str(config_file), "train.kernel_fallback=error"]) == 2
    assert f"{WHY}; or set warn" in capsys.readouterr().err and not out.exists()
    assert cli.main(["train", str(config_file), "train.steps=1", "train.kernel_fallback=warn"]) == 0
    assert f"pure torch, slower: {WHY}" in capsys.readouterr().out
    assert cli.main(["train", "--eval", str(out), "train.kernel_fallback=error"]) == 2
    assert cli.main(["train", "--eval", str(out)]) == 0


def test_every_attention_call_of_a_run_gets_the_setting(config_file):
    for chosen in ("error", "warn"):
        config, where = load_config(config_file, [f"train.kernel_fallback={chosen}"])
        model = LanguageModel(config.model)
        prepare.settle_fallback(model, torch.device("cuda"), config, where)
        assert {layer.self_attn.mixer().kernel_fallback for layer in model.model.layers} == {chosen}
