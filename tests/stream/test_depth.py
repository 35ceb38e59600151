"""With everything that is stored in a slower tier, what a token takes on the device does not grow with the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longtrain as lt
from longtrain.offload.system import System
from longtrain.stream.work import Alive
from tests.stream.conftest import VOCAB, make_model

ROOT = Path(__file__).resolve().parents[2]


def peak_bytes(layers: int, tokens: int, offload: lt.Offload | None) -> int:
    """Of a step's tensors, beside parameters and gradients: only the embedding is trained."""
    model = make_model(layers=layers, window=(None, *[64] * (layers - 1)))
    model.model.layers.requires_grad_(False)
    store = None if offload is None else lt.offload.TieredStore(
        "cpu", disk=offload.disk, staging_bytes=offload.staging_bytes, system=System(2))  # fmt: skip
    report = lt.apply(model, lt.Plan(chunk_tokens=128, offload=offload), store=store)
    ids = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    with Alive() as alive:
        model(ids, labels=ids).loss.backward()
    report.undo()
    return alive.most


@pytest.fixture
def on_disk(disk):
    settings = lt.DiskSettings(path=disk, budget=1 << 26)
    return lt.Offload(**dict.fromkeys(("inputs", "gradients", "outputs", "kv"), lt.Split()), disk=settings, staging_bytes=1 << 16)


def test_bytes_a_token_do_not_grow_with_the_layers(on_disk):
    tokens = (512, 1536)
    slopes = {
        (layers, where): (peak_bytes(layers, tokens[1], offload) - peak_bytes(layers, tokens[0], offload)) / (tokens[1] - tokens[0])
        for layers, where, offload in ((4, "disk", on_disk), (16, "disk", on_disk), (4, "device", None))
    }
    print({key: round(slope) for key, slope in slopes.items()})
    assert slopes[16, "disk"] <= 1.1 * slopes[4, "disk"]
    assert slopes[4, "device"] > 2 * slopes[4, "disk"]  # so it is the disk that does it


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_resident_memory_does_not_grow_with_the_layers(on_disk, tmp_path):
    """The benchmark's processes (E 256, one layer sees everything, the others 1,024 tokens): activations beside gradients."""
    activations = {}
    for layers in (4, 16):
        sizes = ["--seq-len", "16384", "--layers", str(layers), "--rounds", "0", "--variants", "memory", "disk", "--memory-bound", "10"]
        command = [sys.executable, "tools/bench_offload.py", "step", "--path", str(tmp_path), *sizes, "--out", str(tmp_path / "out.json")]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        activations[layers] = json.loads((tmp_path / "out.json").read_text())["rows"]["disk"]["activations"]
    print(activations)
    assert activations[16] <= 1.1 * activations[4]
