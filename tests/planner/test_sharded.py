"""What FSDP2 has whole while segments of layers run is what was said, on two gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.planner import measure_model
from longtrain.planner.axes import Axes, on_one_device
from longtrain.planner.cost import gathered_bytes, scattered_bytes
from tests.processes import run_ranks

WORLD, TOKENS, LAYERS = 2, 32, 4
CONFIG = ModelConfig(vocab_size=512, num_layers=LAYERS, hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=2)


def work(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (world,))
    for k in (1, 2):
        model = LanguageModel(CONFIG)
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        in_no_layer = sum(p.nbytes for p in model.parameters()) - LAYERS * layer
        one = on_one_device(measure_model(model), Axes(replicas=world), optimizer="device", masters=False)
        layers = list(model.model.layers)
        for at in range(0, LAYERS, k):
            fully_shard(layers[at : at + k] if k > 1 else layers[at], mesh=mesh)
        fully_shard(model, mesh=mesh)
        report = lt.apply(model, lt.Plan(chunk_tokens=16, segment_layers=k))
        seen: dict[str, set[int]] = {}
        whole = lambda: sum(p.nbytes for p in model.parameters() if not isinstance(p, DTensor))
        report.on_progress(lambda phase, done, total: seen.setdefault(phase, set()).add(whole()))
        ids = torch.randint(512, (1, TOKENS))
        loss = model(ids, labels=ids).loss
        between = whole()
        loss.backward()

        segments = [range(at, at + k) for at in range(0, LAYERS, k)]
        assert (
            seen["forward"] == seen["backward"] == {in_no_layer + k * layer}
        )  # FSDP2 sets parameters that it fetches ahead when they are used
        assert between == in_no_layer == gathered_bytes(one)
        for j in range(len(segments)):
            assert gathered_bytes(one, segments, j) == in_no_layer + 2 * k * layer
        assert [scattered_bytes(one, segments, j) for j in (len(segments) - 1, 0, -1)] == [0, k * layer, k * layer]
        assert one.parameters == (in_no_layer + LAYERS * layer) // world


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_processes_have_whole_what_was_said():
    run_ranks(work, WORLD)
