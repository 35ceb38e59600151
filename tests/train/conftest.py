"""A run small enough for a test: a tiny model on a few documents."""

import random
from pathlib import Path

import pytest
import torch

from longtrain import cli
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


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Twelve documents of a few hundred bytes, to be read."""
    return write_texts(tmp_path_factory.mktemp("read"))


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory, texts) -> Path:
    """The output of a run with the module's SETTINGS, by one process and one thread, that nobody interrupted."""
    directory = tmp_path_factory.mktemp("alone")
    (directory / "run.yaml").write_text(write_config(texts, directory / "out"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(["train", str(directory / "run.yaml"), *request.module.SETTINGS]) == 0
    torch.set_num_threads(threads)
    return directory / "out"


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
