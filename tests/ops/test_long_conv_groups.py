"""Long convolution by groups of channels: a mixer cut into groups, and what a million tokens take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longtrain.ops.long_conv import long_conv
from longtrain.ops.mixers import LongConvMixer
from tests.ops.long_conv_cases import error

ROOT = Path(__file__).resolve().parents[2]


def by_group(mixer: LongConvMixer, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of inputs, filter and skip, written group after group into whole tensors."""
    y, dinputs = torch.full_like(inputs[0], torch.nan), [torch.full_like(x, torch.nan) for x in inputs]
    sums = mixer.with_shared(*(torch.full_like(x, torch.nan) for x in mixer.shared))
    groups = zip(mixer.by_group(*inputs), sums.by_group(*dinputs), strict=True)
    with torch.no_grad():
        for (channels, part, part_inputs), (_, dpart, dpart_inputs) in groups:
            part.mix_into(y[:, :, channels], *part_inputs)
            part.vjp_into(dy[:, :, channels], part_inputs, dpart_inputs, dpart.shared)
    return [y, *dinputs, *sums.shared]


def whole(mixer: LongConvMixer, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *mixer.shared)]
    y = mixer.with_shared(*leaves[len(inputs):])(*leaves[: len(inputs)])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("H", [1, 3, 6, 12])
@pytest.mark.parametrize("gates", [0, 1, 2])
def test_groups_equal_the_whole(gates, H, dtype):
    """Groups of 5 channels: not a divisor of 12, and cut through heads of 4 and 12 channels if that were not minded."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 70, 12, generator=g, dtype=torch.float64).to(dtype) for _ in range(1 + gates)]
    k, skip = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((H, 70), (12,)))
    mixer = LongConvMixer(filter=k, skip=skip, group_channels=5)
    dy = torch.randn(2, 70, 12, generator=g, dtype=torch.float64).to(dtype)
    for a, b in zip(by_group(mixer, inputs, dy), whole(mixer, inputs, dy), strict=True):
        assert a.dtype == b.dtype and error(a, b.double()) <= (1e-14 if dtype == torch.float64 else 1e-2)


@pytest.mark.slow
def test_groups_equal_the_whole_at_128k():
    """Bitwise: a channel is transformed alone, however many are beside it."""
    g = torch.Generator().manual_seed(0)
    T, E = 131_072, 64
    u, dy = torch.randn(1, T, E, generator=g), torch.randn(1, T, E, generator=g)
    mixer = LongConvMixer(filter=torch.randn(E, T, generator=g) / T**0.5, skip=torch.randn(E, generator=g), group_channels=8)
    grouped = by_group(mixer, [u], dy)
    for a, b in zip(grouped, whole(mixer, [u], dy), strict=True):
        assert torch.equal(a, b)
    assert error(long_conv(u, *mixer.shared, backend="fft"), grouped[0].double()) < 1e-6


MILLION = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, "tools")
from step_process import memory
from longtrain.ops.mixers import LongConvMixer
from tests.ops.test_long_conv_groups import by_group

torch.set_num_threads(2)
T, E = 2**20, 64
g = torch.Generator().manual_seed(0)
u, dy = torch.randn(1, T, E, generator=g), torch.randn(1, T, E, generator=g)
k, skip = torch.randn(E, T, generator=g) / T**0.5, torch.randn(E, generator=g)
by_group(LongConvMixer(filter=k[:, :512].contiguous(), skip=skip), [u[:, :512]], dy[:, :512])  # loads the kernels
results = []
found = memory(lambda: results.extend(by_group(LongConvMixer(filter=k, skip=skip, group_channels=32), [u], dy)), torch.device("cpu"))
y, du, dk, _ = results
# Three places, in float64: y_t = sum k_s u_{t-s}; du_t = sum k_s dy_{t+s}; dk_s = sum u_t dy_{t+s}.
c, t = 37, 700_001
one = lambda x: x[0, :, c].double()
exact = [(k[c, :t + 1].double().flip(0) @ one(u)[:t + 1]) + skip[c] * one(u)[t],
         (k[c, :T - t].double() @ one(dy)[t:]) + skip[c] * one(dy)[t],
         one(u)[:T - t] @ one(dy)[t:]]
scale = [float(x.double().norm() / x.numel() ** 0.5) for x in (one(y), one(du), dk[c])]
errors = [abs(float(a - b)) / s for a, b, s in zip((y[0, t, c].double(), du[0, t, c].double(), dk[c, t].double()), exact, scale)]
print(json.dumps({"extra": found["peak"] - sum(x.nbytes for x in results), "errors": errors}))
"""


@pytest.mark.slow
def test_a_million_tokens_within_192_mebibytes():
    """Forward and backward by groups, beside inputs, output and gradients, in a process of its own; three values against their sums."""
    answer = subprocess.run([sys.executable, "-c", MILLION], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(answer)
    assert found["extra"] <= 192 * 2**20, f"{found['extra'] / 2**20:.1f} MiB"
    assert max(found["errors"]) < 5e-6, found
