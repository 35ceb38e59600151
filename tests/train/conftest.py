"""A run small enough for a test: a tiny model on a few documents."""

import random
from pathlib import Path

import pytest

from longtrain.train import loop

CONFIG = """\
model:
  vocab_size: 256
  num_layers: 2
  hidden_size: 16
  intermediate_size: 32
  num_heads: 2
  num_kv_heads: 1
  window: [16, null]
data:
  source: text
  files: [TEXTS]
  seq_len: 64
  validation_fraction: 0.2
train:
  steps: 4
  lr: 1e-2
  device: cpu
  kernel_fallback: warn
  validate_every: 2
metrics:
  peak_tflops: 1.0
output:
  dir: OUT
"""


def write_texts(inside: Path) -> Path:
    directory = inside / "texts"
    directory.mkdir()
    chance = random.Random(0)
    for index in range(12):
        words = [chance.choice(["span", "chunk", "carry", "tier", "plan"]) for _ in range(chance.randrange(20, 80))]
        (directory / f"{index:02}.txt").write_text(" ".join(words))
    return directory


def write_config(texts: Path, out: Path) -> str:
    return CONFIG.replace("TEXTS", str(texts)).replace("OUT", str(out))


@pytest.fixture
def texts(tmp_path) -> Path:
    """Twelve documents of a few hundred bytes."""
    return write_texts(tmp_path)


@pytest.fixture
def crash_after(monkeypatch):
    """``crash_after(3)``: a run in this process dies after its update 3, or on another call of the trainer's `method` then."""

    def arrange(step: int, method: str = "update") -> None:
        original = getattr(loop.Trainer, method)

        def dying(self, *args):
            original(self, *args)
            if self.done >= step:
                raise SystemExit

        monkeypatch.setattr(loop.Trainer, method, dying)

    yield arrange


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than a tiny run."""
    monkeypatch.setattr(loop, "plot_run", lambda *_: None)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def config_file(tmp_path, texts, out) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(write_config(texts, out))
    return path


@pytest.fixture(autouse=True)
def small_models(one_thread):
    """What is trained here is small."""
