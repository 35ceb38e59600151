"""`longtrain config explain`: every setting says what it is, with an example that the loader would take."""

import pytest
import yaml

from longtrain import cli
from longtrain.config.explain import all_settings, sections_of
from longtrain.config.nodes import Locations
from longtrain.config.values import Reader

SETTINGS = {s.key: s for s in all_settings()}


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_type_default_meaning_and_an_example_that_reads(key, capsys):
    assert cli.main(["config", "explain", key]) == 0
    printed = capsys.readouterr().out
    setting = SETTINGS[key]
    for part in (f"{key}\n", "  type     ", "  default  ", "  meaning  "):
        assert part in printed
    assert len(setting.meaning) > 10
    if not sections_of(setting.kind) or setting.example is not None:
        assert "  example  " in printed
        read = Reader(Locations("example", {}), {}).value(key, setting.kind, yaml.compose(setting.example, Loader=yaml.SafeLoader))
        assert read is not None


def test_a_setting_of_a_list_entry_is_found_with_and_without_its_index(capsys):
    assert cli.main(["config", "explain", "train.length_schedule[0].seq_len"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["config", "explain", "train.length_schedule.seq_len"]) == 0
    assert capsys.readouterr().out == first and "command line" not in first


def test_a_section_lists_its_settings_and_no_key_lists_all(capsys):
    assert cli.main(["config", "explain", "train"]) == 0
    assert "train.lr: number, 0.0003\n    Learning rate" in capsys.readouterr().out
    assert cli.main(["config", "explain"]) == 0
    assert all(key in capsys.readouterr().out for key in ["train.lr"]) and len(SETTINGS) > 40


@pytest.mark.parametrize(
    "key, suggested",
    [("trian.lr", "train.lr"), ("lr", "train.lr"), ("data.seq_length", "data.seq_len"), ("model.windw", "model.window"),
     ("qqqq", "the sections are model")],
)  # fmt: skip
def test_an_unknown_key_suggests_what_was_meant(key, suggested, capsys):
    assert cli.main(["config", "explain", key]) == 2
    error = capsys.readouterr().err
    assert suggested in error and error.count("\n") == 1
