"""Wrong configurations: each is refused in one line that names the place, the setting, the problem and the remedy."""

import pytest

RIGHT = """\
model:
  vocab_size: 256
  num_layers: 2
  hidden_size: 32
  intermediate_size: 64
  num_heads: 4
  num_kv_heads: 2
  window: [16, null]
memory:
  chunk_tokens: 8
data:
  source: stdlib
  seq_len: 64
train:
  steps: 4
  lr: 1e-3
  warmup_steps: 1
output:
  dir: OUT
"""

# name: (line of RIGHT to replace, its replacement, line of the error, setting, a word of the remedy)
WRONG = {
    "unknown section": ("memory:", "memry:", 9, "memry", "did you mean memory?"),
    "unknown key": ("  lr: 1e-3", "  lrr: 1e-3", 16, "train.lrr", "did you mean train.lr?"),
    "unknown key far from any": ("  lr: 1e-3", "  zebra: 1", 16, "train.zebra", "settings of train are steps,"),
    "duplicate key": ("  lr: 1e-3", "  lr: 1e-3\n  lr: 1e-4", 17, "train.lr", "first at {file}:16; keep one"),
    "duplicate section": ("output:", "data:\n  seed: 1\noutput:", 18, "data", "keep one"),
    "missing key": ("  steps: 4", "  seed: 4", 14, "train.steps", "add `steps:"),
    "missing section": ("output:\n  dir: OUT", "", 1, "output.dir", "add `dir:"),
    "section without keys indented": ("memory:\n  chunk_tokens: 8", "memory: 8", 9, "memory", "indented below"),
    "number in quotes": ("  lr: 1e-3", "  lr: '1e-3'", 16, "train.lr", "without quotes"),
    "not a number": ("  lr: 1e-3", "  lr: 1e-", 16, "train.lr", "write a number"),
    "not a whole number": ("  steps: 4", "  steps: 4.5", 15, "train.steps", "write a whole number"),
    "exponent in a whole number": ("  steps: 4", "  steps: 1e3", 15, "train.steps", "write 1000"),
    "octal": ("  steps: 4", "  steps: 010", 15, "train.steps", "write a whole number"),
    "infinite": ("  lr: 1e-3", "  lr: 1e999", 16, "train.lr", "write a number"),
    "boolean for a number": ("  steps: 4", "  steps: yes", 15, "train.steps", "write a whole number"),
    "YAML 1.1 boolean": ("  dir: OUT", "  dir: OUT\n  overwrite: on", 20, "output.overwrite", "true or false"),
    "number for text": ("  dir: OUT", "  dir: 7", 19, "output.dir", "quotes: '7'"),
    "list for a number": ("  lr: 1e-3", "  lr: [1e-3]", 16, "train.lr", "write a number"),
    "null where a value is needed": ("  steps: 4", "  steps:", 15, "train.steps", "write a whole number"),
    "not a choice": ("  lr: 1e-3", "  dtype: bfloat", 16, "train.dtype", "did you mean bfloat16?"),
    "two values for three": ("  lr: 1e-3", "  betas: [0.9, 0.9, 0.9]", 16, "train.betas", "exactly 2"),
    "rate of filters without filters": ("  lr: 1e-3", "  lr: 1e-3\n  filter_lr: 1e-3", 17, "train.filter_lr", "add one"),
    "negative learning rate": ("  lr: 1e-3", "  lr: -1e-3", 16, "train.lr", "positive"),
    "beta of one": ("  lr: 1e-3", "  betas: [0.9, 1.0]", 16, "train.betas", "below 1"),
    "fraction above one": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  store_kv: 1.5", 11, "memory.store_kv", "0 to 1"),
    "no chunk": ("  chunk_tokens: 8", "  chunk_tokens: 0", 10, "memory.chunk_tokens", "at least 1"),
    "blocks of parts of chunks": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  kv_block_tokens: 20", 11, "memory.kv_block_tokens",
                                  "multiple of"),
    "not an amount of memory": ("  chunk_tokens: 8", "  budget: 3 apples", 10, "memory.budget", "1.5GiB"),
    "no process": ("memory:", "parallel: {cp_ring: 0}\nmemory:", 9, "parallel.cp_ring", "at least 1"),
    "two numbers of processes left open": ("memory:", "parallel: {cp_ring: null, dp_shard: null}\nmemory:", 9, "parallel.cp_ring",
                                           "give one"),
    "tensor parallelism": ("memory:", "parallel: {tp: 2}\nmemory:", 9, "parallel.tp", "dp_replicate"),
    "not a time": ("memory:", "parallel: {step_timeout: soon}\nmemory:", 9, "parallel.step_timeout", "11h50m"),
    "heads that do not divide": ("  num_kv_heads: 2", "  num_kv_heads: 3", 7, "model.num_kv_heads", "num_heads"),
    "window of nothing": ("  window: [16, null]", "  window: [0]", 8, "model.window", "at least 1"),
    "budget and chunk": ("  chunk_tokens: 8", "  budget: 1GiB\n  chunk_tokens: 8", 11, "memory.chunk_tokens", "remove one"),
    "plan without chunk": ("  chunk_tokens: 8", "  segment_layers: 2", 10, "memory.segment_layers", "add chunk_tokens"),
    "offload without a disk": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  offload: {outputs: disk}", 11, "memory.offload",
                               "memory.disk is not set"),
    "offload without a host": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  offload: {kv: host}", 11, "memory.offload",
                               "memory.host_budget is 0"),
    "shares above one": (
        "  chunk_tokens: 8", "  chunk_tokens: 8\n  host_budget: 1GiB\n  offload: {kv: {device: 0.7, host: 0.7}}", 12, "memory.offload",
        "at most 1",
    ),
    "unknown kind of tensor": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  offload: {output: disk}", 11, "memory.offload.output",
                               "did you mean"),
    "disk without a budget": ("  chunk_tokens: 8", "  budget: 1GiB\n  disk: {path: /tmp}", 11, "memory.disk.budget", "add `budget"),
    "disk of no size": ("  chunk_tokens: 8", "  budget: 1GiB\n  disk: {path: /tmp, budget: big}", 11, "memory.disk.budget", "GiB"),
    "disk with nothing for it": (
        "  chunk_tokens: 8", "  chunk_tokens: 8\n  disk: {path: /tmp, budget: 1GiB}", 11, "memory.disk", "say what goes there",
    ),
    "disk where nothing is streamed": ("  chunk_tokens: 8", "  disk: {path: /tmp, budget: 1GiB}", 10, "memory.disk", "add memory.budget"),
    "disk that does not exist": (
        "  chunk_tokens: 8", "  chunk_tokens: 8\n  disk: {path: /nowhere, budget: 1MiB}\n  offload: {outputs: disk}", 11,
        "memory.disk.path", "make it",
    ),
    "disk in memory": (
        "  chunk_tokens: 8", "  chunk_tokens: 8\n  disk: {path: /dev/shm, budget: 1MiB}\n  offload: {outputs: disk}", 11,
        "memory.disk.path", "no disk",
    ),
    "staging without tiers": ("  chunk_tokens: 8", "  budget: 1GiB\n  staging: 1MiB", 11, "memory.staging", "add one"),
    "segment beyond the model": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  segment_layers: 3", 11, "memory.segment_layers", "at most 2"),
    "fractions for other layers": ("  chunk_tokens: 8", "  chunk_tokens: 8\n  store_kv: [1, 1, 0]", 11, "memory.store_kv", "2 of them"),
    "vocabulary below the bytes": ("  vocab_size: 256", "  vocab_size: 255", 2, "model.vocab_size", "256 or more"),
    "text without files": ("  source: stdlib", "  source: text", 11, "data.files", "list files"),
    "tokens without data": ("  source: stdlib", "  source: tokens", 11, "data.tokens", "list directories"),
    "data without tokens": ("  source: stdlib", "  tokens: [{path: a}]", 12, "data.tokens", "source: tokens"),
    "some weights": (
        "  source: stdlib",
        "  source: tokens\n  tokens:\n    - {path: a, weight: 1}\n    - {path: b}",
        15,
        "data.tokens[1].weight",
        "all of them, or to none",
    ),
    "weight of nothing": ("  source: stdlib", "  source: tokens\n  tokens: [{path: a, weight: 0}]", 13, "data.tokens[0].weight",
                          "positive"),
    "data twice": ("  source: stdlib", "  source: tokens\n  tokens: [{path: a}, {path: a}]", 13, "data.tokens[1].path", "weight"),
    "one document not isolated": ("  seq_len: 64", "  seq_len: 64\n  packing: one_document\n  isolate: false", 15, "data.isolate",
                                  "remove it"),
    "long without weight": ("  seq_len: 64", "  seq_len: 64\n  long_from_tokens: 32", 14, "data.long_from_tokens", "give both"),
    "weight without long": ("  seq_len: 64", "  seq_len: 64\n  long_weight: 2", 14, "data.long_weight", "give both"),
    "unknown packing": ("  seq_len: 64", "  seq_len: 64\n  packing: best-fit", 14, "data.packing", "did you mean best_fit?"),
    "files without text": ("  source: stdlib", "  files: [a.txt]", 12, "data.files", "source: text"),
    "warm-up longer than the run": ("  warmup_steps: 1", "  warmup_steps: 4", 17, "train.warmup_steps", "lower it"),
    "schedule that ends elsewhere": (
        "  lr: 1e-3",
        "  length_schedule:\n    - {from_step: 0, seq_len: 16}\n    - {from_step: 2, seq_len: 32}",
        18,
        "train.length_schedule[1].seq_len",
        "make them equal",
    ),
    "unknown key in a list": ("  lr: 1e-3", "  length_schedule:\n    - {from: 0}", 17, "train.length_schedule[0].from", "from_step"),
    "schedule out of order": (
        "  lr: 1e-3",
        "  length_schedule: [{from_step: 0, seq_len: 16},\n    {from_step: 0, seq_len: 64}]",
        17,
        "train.length_schedule[1].from_step",
        "in order",
    ),
    "ragged accumulation": ("  lr: 1e-3", "  tokens_per_update: 100", 16, "train.tokens_per_update", "give 128"),
    "ragged accumulation of a stage": (
        "  lr: 1e-3",
        "  length_schedule:\n    - {from_step: 0, seq_len: 64, tokens_per_update: 65}",
        17,
        "train.length_schedule[0].tokens_per_update",
        "give 64",
    ),
    "Python tag": ("  dir: OUT", "  dir: !!python/name:os.system x", 19, "output.dir", "plain value"),
    "not YAML": ("  lr: 1e-3", "  lr: [1e-3", 17, "config", "correct the syntax"),
    "tab": ("  lr: 1e-3", "\tlr: 1e-3", 16, "config", "correct the syntax"),
    "empty file": (RIGHT, "", 1, "config", "write the sections"),
    "a list": (RIGHT, "- model\n", 1, "config", "sections"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config_is_refused_with_its_place_and_remedy(name, check_refused):
    check_refused(RIGHT, *WRONG[name])


@pytest.mark.parametrize(
    "override, setting, remedy",
    [
        ("train.stepz=3", "train.stepz", "did you mean train.steps?"),
        ("trian.steps=3", "trian.steps", "did you mean train?"),
        ("train.steps", "train.steps", "section.key=value"),
        ("steps=3", "steps=3", "section.key=value"),
        ("train.steps=", "train.steps", "write a whole number"),
        ("train.steps=[", "train.steps", "correct the syntax"),
        ("train.lr=-1", "train.lr", "positive"),
        ("memory.budget=24", "memory.budget", "24 is not text to YAML; write text, such as 1.5GiB, or put it in quotes: '24'"),
        ("memory.segment_layers=9", "memory.segment_layers", "at most 2"),
        ("model={}", "model={}", "section.key=value"),
        ("train.length_schedule=[{from_step: 1, seq_len: 64}]", "train.length_schedule[0].from_step", "must be 0"),
        ("train.length_schedule=[{from_step: 0, seq_len: x}]", "train.length_schedule[0].seq_len", "whole number"),
    ],
)
def test_wrong_override_is_refused_by_name(override, setting, remedy, tmp_path, refused):
    file = tmp_path / "run.yaml"
    file.write_text(RIGHT.replace("OUT", str(tmp_path / "out")))
    message = refused(str(file), override)
    assert message.startswith(f"command line: {setting}: ")
    assert remedy in message
    assert list(tmp_path.iterdir()) == [file]


def test_override_given_twice_is_refused(tmp_path, refused):
    file = tmp_path / "run.yaml"
    file.write_text(RIGHT)
    assert "is given twice" in refused(str(file), "train.steps=3", "train.steps=4")


def test_override_that_contradicts_the_file_names_the_setting_to_remove(tmp_path, refused):
    file = tmp_path / "run.yaml"
    file.write_text(RIGHT)
    message = refused(str(file), "memory.budget=1GiB")
    assert message.startswith(f"{file}:10: memory.chunk_tokens: ") and "memory.budget" in message


@pytest.mark.parametrize("kind, remedy", [("missing", "give the path"), ("directory", "YAML file"), ("binary", "UTF-8")])
def test_file_that_cannot_be_read_is_said_plainly(kind, remedy, tmp_path, refused):
    file = tmp_path / "run.yaml"
    if kind == "directory":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"model:\n  \xff\xfe")
    message = refused(str(file))
    assert message.startswith(f"{file}:1: config: ") and remedy in message
