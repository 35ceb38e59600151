"""Checkpoints of several processes: distributed tensors are written by those who hold them, and read back under another layout."""

import json
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from longtrain.train import checkpoint as on_disk
from tests.processes import run_ranks


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "weights.a": torch.randn(7, 6, generator=generator),
        "exp_avg.a": torch.randn(7, 6, generator=generator),
        "step.a": torch.tensor(3.0),
    }


def process(rank, world, directory):
    mesh = init_device_mesh("cpu", (world,))
    whole = tensors()
    sharded = {name: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim else t.clone() for name, t in whole.items()}
    sharded[f"random.cpu.{rank}"] = torch.full((3,), rank)
    staged = {name: t.detach().to("cpu", copy=True) for name, t in sharded.items()}
    for tensor in sharded.values():
        tensor.detach().zero_()
    path = on_disk.path_of(directory, 5)
    on_disk.write_checkpoint(path, staged, {"step": 5}, "config", dist.group.WORLD)
    on_disk.check(path)
    read = {
        name: distribute_tensor(torch.zeros_like(t), mesh, [Replicate()]) if t.ndim else torch.zeros_like(t) for name, t in whole.items()
    }
    read[f"random.cpu.{rank}"] = torch.zeros(3, dtype=torch.int64)
    on_disk.read_tensors(path, read, dist.group.WORLD)
    for name, tensor in whole.items():
        assert torch.equal(read[name].to_local() if tensor.ndim else read[name], tensor), name
    assert torch.equal(read[f"random.cpu.{rank}"], torch.full((3,), rank))


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_that_one_process_reads(tmp_path):
    run_ranks(process, 2, tmp_path)
    path = on_disk.path_of(tmp_path, 5)
    on_disk.check(path)
    assert {"__0_0.distcp", "__1_0.distcp", "facts.json", "config.yaml", ".metadata"} == set(
        json.loads((path / "manifest.json").read_text())
    )
    read = {name: torch.zeros_like(t) for name, t in tensors().items()}
    with on_disk.one_process():
        on_disk.read_tensors(path, read)
    assert all(torch.equal(read[name], t) for name, t in tensors().items())


def test_torch_s_warning_about_one_process_is_not_shown(tmp_path):
    with on_disk.one_process(), warnings.catch_warnings(record=True) as seen:
        on_disk.write_checkpoint(on_disk.path_of(tmp_path, 1), tensors(), {}, "")
    assert not seen


@pytest.mark.parametrize("name", [".metadata", "facts.json", "config.yaml", "__0_0.distcp", "manifest.json"])
def test_every_bit_of_every_file_counts(name, tmp_path):
    path = on_disk.path_of(tmp_path, 1)
    with on_disk.one_process():
        on_disk.write_checkpoint(path, tensors(), {"step": 1}, "config: 1")
    on_disk.check(path)
    content = (path / name).read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 4
        (path / name).write_bytes(changed)
        with pytest.raises(on_disk.DamagedCheckpoint, match="step-00000001 is damaged: "):
            on_disk.check(path)
    (path / name).write_bytes(content)
    on_disk.check(path)
    (path / name).write_bytes(content[:-1])
    with pytest.raises(on_disk.DamagedCheckpoint):
        on_disk.check(path)


def test_the_latest_are_kept_and_other_directories_left_alone(tmp_path):
    with on_disk.one_process():
        for step in (9, 10, 100):
            on_disk.write_checkpoint(on_disk.path_of(tmp_path, step), tensors(), {"step": step}, "")
    (tmp_path / "step-of-mine").mkdir()
    on_disk.remove_all_but(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100", "step-of-mine"]
    assert on_disk.newest_whole(tmp_path) == (on_disk.path_of(tmp_path, 100), {})
