"""The parts of the loop on their own: which sequences, which normaliser, which bar."""

import io
import mmap
import re

import pytest
import torch

from longtrain.config import load_config
from longtrain.config.run import CheckpointConfig
from longtrain.data.corpus import corpus_in_memory
from longtrain.data.sources import read_text
from longtrain.nn import LanguageModel, RotaryEmbedding, count_targets
from longtrain.train import loop, step
from longtrain.train.checkpoint import one_process
from longtrain.train.console import StepBar
from longtrain.train.loader import Loader, pack, validation_rows
from longtrain.train.model import set_rotary
from longtrain.train.optimizer import Optimizer
from longtrain.train.peak_memory import read_peak, reset_peak
from longtrain.train.saving import Saver
from longtrain.train.schedule import remaining_tokens, stage_at
from longtrain.units import format_bytes, format_time, parse_time


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_accumulation_is_the_mean_over_all_targets_of_the_update(config_file):
    """Sequences with unequal numbers of targets: the gradient is that of one call on all of them laid end to end."""
    config, _ = load_config(config_file, ["data.packing=one_document", "data.seq_len=48"])
    packed = pack(corpus_in_memory(read_text(config.data.files)), 48, config.data)
    batches = [packed.read_row(row) for row in range(12)]
    assert len({count_targets(b.labels_BT, b.cu_seqlens) for b in batches}) > 1
    torch.manual_seed(0)
    model = LanguageModel(config.model)
    optimizer = Optimizer(model, config.train)
    loss, targets = step.accumulate(model, optimizer, batches, 1, torch.device("cpu"), StepBar(io.StringIO()))
    accumulated = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    edges = [torch.zeros(1, dtype=torch.int32)] + [b.cu_seqlens[1:] + 48 * i for i, b in enumerate(batches)]
    whole = model(
        torch.cat([b.input_ids_BT for b in batches], 1),
        labels=torch.cat([b.labels_BT for b in batches], 1),
        cu_seqlens=torch.cat(edges).to(torch.int32),
    ).loss
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    assert targets == sum(count_targets(b.labels_BT, b.cu_seqlens) for b in batches)
    for ours, parameter in zip(accumulated, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_updates_read_each_sequence_once_before_any_twice(config_file):
    config, _ = load_config(config_file, ["train.steps=50", "train.tokens_per_update=128"])
    loader = Loader(config.stages(), config.data, corpus_in_memory(read_text(config.data.files)), 50)
    read = [b.documents for step in range(50) for b in loader.update(step)]
    rows = len(loader.mixtures[64])
    assert len(set(read[:rows])) == rows and sorted(read[:rows]) == sorted(read[rows : 2 * rows])


def test_remaining_tokens_follow_the_length_schedule(config_file):
    schedule = "train.length_schedule=[{from_step: 0, seq_len: 16}, {from_step: 3, seq_len: 64}]"
    config, _ = load_config(config_file, ["train.steps=5", schedule])
    assert [remaining_tokens(config, step) for step in range(6)] == [176, 160, 144, 128, 64, 0]
    config, _ = load_config(config_file, ["train.steps=5", schedule.replace("16}", "16, tokens_per_update: 32}")])
    assert [remaining_tokens(config, step) for step in range(6)] == [224, 192, 160, 128, 64, 0]


def test_validation_tokens_are_whole_sequences_and_the_same_each_time(config_file):
    config, _ = load_config(config_file)
    packed = pack(corpus_in_memory(read_text(config.data.files)), 64, config.data)
    assert len(validation_rows(packed, 65)) == 2
    assert validation_rows(packed, 130) == validation_rows(packed, None)[:3]
    assert sorted(validation_rows(packed, None)) == list(range(len(packed)))


def test_the_bar_reaches_its_end_and_is_absent_without_a_terminal(monkeypatch):
    monkeypatch.setattr("longtrain.train.console.REDRAW_SECONDS", 0.0)
    for out, drawn in ((Terminal(), True), (io.StringIO(), False)):
        bar = StepBar(out)
        for _ in range(2):
            bar.begin("step 1/2", 64, 2)
            for _ in range(2):
                for done in range(1, 5):
                    bar.span_done("backward", done, 4)
                bar.sequence_done()
        bar.clear()
        assert bool(out.getvalue()) == drawn
        if drawn:
            assert " 25%  sequence 1/2  backward 2/4" in out.getvalue()
            assert f"[{'#' * 30}] 100%" in out.getvalue() and out.getvalue().endswith("\r\x1b[K")


def test_the_bar_follows_the_engine(config_file, monkeypatch, capsys):
    """Spans that the streaming engine reports reach the bar of a run on a terminal."""
    monkeypatch.setattr("longtrain.train.console.REDRAW_SECONDS", 0.0)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    loop.run(*load_config(config_file, ["memory.chunk_tokens=16", "train.steps=2"]))
    assert "4/4" in terminal.getvalue() and "step 2/2 [" in terminal.getvalue()


def test_the_peak_is_that_of_the_step():
    cpu = torch.device("cpu")
    if not reset_peak(cpu):
        pytest.skip("this system does not reset the peak")
    before = read_peak(cpu)
    block = mmap.mmap(-1, 128 * 2**20)  # malloc might keep what it is given back
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert read_peak(cpu) - before > 112 * 2**20  # Linux counts some pages late
    block.close()
    reset_peak(cpu)
    assert read_peak(cpu) - before < 64 * 2**20


@pytest.mark.parametrize("size, text", [(812 * 2**20, "812 MiB"), (3 * 2**29, "1.50 GiB"), (48_000, "47 KiB"), (5, "5 B"), (0, "0 B")])
def test_memory_is_printed_in_its_unit(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("seconds, text", [(0, "0m00s"), (252.4, "4m12s"), (11100, "3h05m")])
def test_time_is_printed_in_its_unit(seconds, text):
    assert format_time(seconds) == text


@pytest.mark.parametrize("text, seconds", [("11h50m", 42600), ("90s", 90), ("2d", 172800), ("1h30m20s", 5420)])
def test_time_is_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "0s", "50m11h", "1.5h", "-3s", "h"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a time; write one such as 11h50m"):
        parse_time(text)


def test_each_stage_has_its_own_rotary(config_file):
    """Base and scaling reach every layer: scaling s at position s p is no scaling at position p."""
    schedule = "train.length_schedule=[{from_step: 0, seq_len: 32}, {from_step: 2, seq_len: 64, rope_base: 5e5, rope_scaling: 2.0}]"
    config, _ = load_config(config_file, [schedule, "train.tokens_per_update=64"])
    model = LanguageModel(config.model)
    rotaries = [m for m in model.modules() if isinstance(m, RotaryEmbedding)]
    for at, base, scaling in ((0, 10_000.0, 1.0), (1, 10_000.0, 1.0), (2, 5e5, 2.0), (3, 5e5, 2.0)):
        set_rotary(model, stage_at(config, at))
        assert [(r.base, r.scaling) for r in rotaries] == [(base, scaling)] * config.model.num_layers
    positions = torch.arange(0, 20, 2)[None]
    stretched = rotaries[0].angles(positions, torch.float64)
    for ours, plain in zip(stretched, RotaryEmbedding(8, base=5e5).angles(positions // 2, torch.float64), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-15)


def test_a_checkpoint_that_is_done_while_a_bar_is_drawn_gets_a_line_of_its_own(tmp_path, monkeypatch):
    screen = Terminal()
    bar = StepBar(screen)
    monkeypatch.setattr("builtins.print", lambda *said, **_: screen.write(f"{said[0]}\n"))
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(), before_print=bar.clear)
    bar.begin("step 1/2", 64, 1)
    bar.span_done("forward", 1, 4)
    with one_process():
        saver.save(1, {"a": torch.zeros(3)}, {}, "")
        saver.finish()
    drawn = re.split(r"\n|\r\x1b\[K", screen.getvalue())
    assert [line for line in drawn if "checkpoint of step 1" in line] == [line for line in drawn if line.startswith("checkpoint of step 1")]
    assert any("[" in line and "forward 1/4" in line for line in drawn)
