"""The section `model` with `hf`: what it may say, and one located line for what it may not."""

import pytest

from longtrain import cli
from longtrain.config import dump_config, load_config
from longtrain.config.hf import HfModelConfig, LoraConfig, RopeConfig

RIGHT = """\
model:
  hf: models/one
  lora: {rank: 4, target_modules: [q_proj, v_proj]}
  rope: {rope_type: yarn, factor: 4}
data:
  source: stdlib
  seq_len: 64
train:
  steps: 4
output:
  dir: OUT
"""
SCHEDULE = "  length_schedule: [{from_step: 0, seq_len: 32}, {from_step: 2, seq_len: 64, STAGE}]"

# name: (line of RIGHT, its replacement, line of the error, setting, words)
WRONG = {
    "a shape beside it": ("  hf: models/one", "  hf: models/one\n  num_layers: 2", 3, "model.num_layers",
                          "has no meaning with model.hf; remove it"),
    "adapters without it": ("  hf: models/one", "  vocab_size: 256", 3, "model.lora", "has no meaning without model.hf"),
    "empty": ("  hf: models/one", "  hf: ''", 2, "model.hf", "name a directory"),
    "unknown key": ("  hf: models/one", "  hf: models/one\n  ropes: 1", 3, "model.ropes", "did you mean model.rope?"),
    "unknown adapter key": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {r: 4}", 3, "model.lora.r", "rank"),
    "rank of nothing": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {rank: 0}", 3, "model.lora.rank", "at least 1"),
    "one name": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {target_modules: q_proj}", 3, "model.lora.target_modules",
                 "write a list, [q_proj]"),
    "no names": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {target_modules: []}", 3, "model.lora.target_modules",
                 "is empty"),
    "all dropped": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {dropout: 1.0}", 3, "model.lora.dropout", "below 1"),
    "an adapter with settings of its own": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {adapter: out/a, rank: 16}", 3,
                                            "model.lora.rank", "has no effect with adapter"),
    "an adapter without a name": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  lora: {adapter: ''}", 3, "model.lora.adapter",
                                  "is empty"),
    "fewer bits for trained weights": ("  lora: {rank: 4, target_modules: [q_proj, v_proj]}", "  quantize: nf4", 3, "model.quantize",
                                       "without model.lora all are trained; add lora"),
    "bits that there are not": ("  hf: models/one", "  hf: models/one\n  quantize: int4", 3, "model.quantize", "did you mean int8?"),
    "unknown scaling": ("  rope: {rope_type: yarn, factor: 4}", "  rope: {rope_type: yarm, factor: 4}", 4, "model.rope.rope_type",
                        "did you mean yarn?"),
    "scaling without factor": ("  rope: {rope_type: yarn, factor: 4}", "  rope: {rope_type: linear}", 4, "model.rope", "factor is missing"),
    "factor without scaling": ("  rope: {rope_type: yarn, factor: 4}", "  rope: {factor: 4}", 4, "model.rope",
                               "factor has no effect without rope_type"),
    "another's setting": ("  rope: {rope_type: yarn, factor: 4}", "  rope: {rope_type: linear, factor: 4, beta_fast: 16}", 4, "model.rope",
                          "beta_fast has no effect with rope_type: linear"),
    "shrinking": ("  rope: {rope_type: yarn, factor: 4}", "  rope: {rope_type: linear, factor: 0.5}", 4, "model.rope",
                  "factor must be at least 1"),
    "negative base": ("  rope: {rope_type: yarn, factor: 4}", "  rope: {rope_theta: -1}", 4, "model.rope", "rope_theta must be above 0"),
    "llama3 the wrong way round": (
        "  rope: {rope_type: yarn, factor: 4}", "  rope: {rope_type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 1}", 4,
        "model.rope", "must be above",
    ),
    "weights twice": ("  steps: 4", "  steps: 4\n  init: other", 10, "train.init", "has no effect with model.hf"),
    "longtrain's own base in a stage": ("  steps: 4", "  steps: 4\n" + SCHEDULE.replace("STAGE", "rope_base: 1e6"), 10,
                                        "train.length_schedule[1].rope_base", "give rope"),
    "longtrain's own scaling in a stage": ("  steps: 4", "  steps: 4\n" + SCHEDULE.replace("STAGE", "rope_scaling: 2.0"), 10,
                                           "train.length_schedule[1].rope_scaling", "give rope"),
    "a wrong stage": ("  steps: 4", "  steps: 4\n" + SCHEDULE.replace("STAGE", "rope: {rope_type: yarn}"), 10,
                      "train.length_schedule[1].rope", "factor is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_setting_is_refused_in_one_located_line(name, check_refused):
    check_refused(RIGHT, *WRONG[name])


def test_a_stage_s_rope_is_not_for_longtrain_s_own_models(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    own = "model: {vocab_size: 256, num_layers: 1, hidden_size: 8, intermediate_size: 8, num_heads: 1, num_kv_heads: 1}\n"
    stage = "  steps: 4\n" + SCHEDULE.replace("STAGE", "rope: {rope_theta: 1e6}")
    file.write_text(own + RIGHT[RIGHT.index("data:") :].replace("  steps: 4", stage))
    assert cli.main(["train", str(file)]) == 2
    assert "train.length_schedule[1].rope: is for models of transformers (model.hf); give rope_base" in capsys.readouterr().err


def test_what_is_written_is_read_and_written_again(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(RIGHT.replace("  steps: 4", "  steps: 4\n" + SCHEDULE.replace("STAGE", "rope: {rope_theta: 5e6}")))
    config, where = load_config(file)
    yarn = RopeConfig(rope_type="yarn", factor=4.0)
    assert config.model == HfModelConfig(hf="models/one", lora=LoraConfig(rank=4, target_modules=("q_proj", "v_proj")), rope=yarn)
    assert [stage.rope for stage in config.stages()] == [yarn, RopeConfig(rope_theta=5e6)]
    assert where.of("model.lora.rank") == f"{file}:3"
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml")[0] == config


def test_an_override_replaces_the_adapter_and_empty_rope_is_the_model_s_own(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(RIGHT)
    config, _ = load_config(file, ["model.lora=null", "model.rope={}", "model.hf=other"])
    assert config.model == HfModelConfig(hf="other", rope=RopeConfig()) and config.model.rope.given() == {}
