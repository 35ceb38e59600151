"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split arrangement of Llama checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotates the first `fraction` of each head's features by an angle that grows with the position.

    theta_i = base^(-2i/R), R = rotated features; (x_i, x_{i+R/2}) turns by position / scaling * theta_i. No parameters.
    `scaling`: position interpolation (Chen et al. 2023, arXiv:2306.15595). Both may be changed between steps.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0, fraction: float = 1.0) -> None:
        super().__init__()
        rotated = int(head_dim * fraction)
        if rotated % 2 or not 0 <= rotated <= head_dim:
            raise ValueError(
                f"rotary fraction {fraction} of head_dim {head_dim} gives {rotated} features; need an even number of them, at most all"
            )
        self.rotated, self.base, self.scaling = rotated, base, 1.0

    def angles(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[B, T, 1, R/2]``; angles in float64, since float32 positions lose bits beyond 2^24 / pi."""
        exponent = torch.arange(0, self.rotated, 2, dtype=torch.float64, device=positions_BT.device) / max(self.rotated, 1)
        theta = positions_BT[..., None].to(torch.float64) / self.scaling * self.base**-exponent
        wide = torch.promote_types(dtype, torch.float32)
        theta = theta.remainder_(2 * torch.pi).to(wide)[:, :, None]
        return theta.cos().to(dtype), theta.sin().to(dtype)

    def forward(self, x_BTHD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = angles
        half = self.rotated // 2
        a, b, rest = x_BTHD.split([half, half, x_BTHD.shape[-1] - self.rotated], dim=-1)
        turned = (a * cos - b * sin, b * cos + a * sin)
        return torch.cat(turned if rest.shape[-1] == 0 else (*turned, rest), dim=-1)

    def extra_repr(self) -> str:
        return f"rotated={self.rotated}, base={self.base}, scaling={self.scaling}"
