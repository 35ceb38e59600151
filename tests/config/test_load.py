"""Right configurations: read as meant, overridden, and written back."""

from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from longtrain.config import Config, dump_config, load_config
from longtrain.config.schema import LengthStage, field_docs
from longtrain.units import parse_bytes

MINIMAL = """\
model: {vocab_size: 256, num_layers: 2, hidden_size: 32, intermediate_size: 64, num_heads: 4, num_kv_heads: 2}
data: {seq_len: 64}
train: {steps: 4}
output: {dir: out}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    "written, read",
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("1.e-5", 1e-5), (".5", 0.5), ("+2", 2.0), ("1_000", 1000.0), ("3", 3.0)],
)
def test_numbers_are_read_as_they_are_meant(written, read, file):
    value = load_config(file, [f"train.lr={written}"])[0].train.lr
    assert value == read and type(value) is float


@pytest.mark.parametrize("written", ["1__0", "e5", ".", "-", "0x10", "1:30", "nan", ".inf", "01"])
def test_what_only_looks_like_a_number_is_refused(written, file):
    with pytest.raises(ValueError, match="train.lr"):
        load_config(file, [f"train.lr={written}"])


def test_overrides_replace_and_null_removes(file):
    file.write_text(MINIMAL + "memory: {chunk_tokens: 8}\n")
    assert load_config(file)[0].memory.chunk_tokens == 8
    config, _ = load_config(file, ["memory.chunk_tokens=null", "memory.budget=1GiB", "model.window=[16, null]"])
    assert config.memory.chunk_tokens is None and config.memory.budget == "1GiB"
    assert config.model.window == (16, None)


def test_an_empty_optional_section_means_its_defaults(file):
    file.write_text(MINIMAL + "memory:\n")
    assert load_config(file)[0] == load_config(file, ["memory.boundaries=null"])[0]


def test_the_resolved_config_reads_back_equal(file, tmp_path):
    schedule = "train.length_schedule=[{from_step: 0, seq_len: 32}, {from_step: 2, seq_len: 64}]"
    config, _ = load_config(file, [schedule, "model.window=[8, null]", "train.lr=1e-7", "memory.chunk_tokens=4"])
    assert config.train.length_schedule[0] == LengthStage(from_step=0, seq_len=32)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again)[0] == config


def test_locations_name_the_line_of_a_setting_or_of_what_encloses_it(file):
    _, where = load_config(file, ["train.seed=3"])
    assert where.of("data.seq_len") == f"{file}:2"
    assert where.of("train.lr") == f"{file}:3"
    assert where.of("train.seed") == "command line"


@pytest.mark.parametrize("text, size", [("1.5GiB", 3 * 2**29), ("72 GB", 72 * 10**9), ("800MiB", 800 * 2**20), ("10b", 10)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text, "memory.budget") == size


@pytest.mark.parametrize("text", ["", "12", "GiB", "1.5Gib/s", "-1GiB", "0GiB", "1e999GiB", "nanGiB"])
def test_wrong_amounts_of_memory(text):
    with pytest.raises(ValueError, match="memory.budget: "):
        parse_bytes(text, "memory.budget")


def test_every_setting_is_documented():
    def sections(kind):
        yield kind
        for hint in get_type_hints(kind).values():
            for part in (hint, *getattr(hint, "__args__", ())):
                if is_dataclass(part):
                    yield from sections(part)

    for section in sections(Config):
        assert set(field_docs(section)) == {f.name for f in fields(section)}
