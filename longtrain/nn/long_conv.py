"""Long convolution as a layer: free filters kept simple by squash (Fu et al. 2023, arXiv:2302.06646), and gated as a decoder's mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtrain.nn.butterfly import Butterfly, ButterflyMixer
from longtrain.nn.filters import ImplicitFilter, TapFilter
from longtrain.ops.mixers import LongConvMixer, nth_seed
from longtrain.span import Layout


class LongConv(nn.Module):
    """``y = gate_out (k * (gate_in u) + skip (gate_in u))`` by channel, ``[B, T, E] -> [B, T, E]``; the gates are optional.

        conv = LongConv(256, 4096)                                  # causal, filters of 4,096 taps
        conv = LongConv(256, 2 * 4096 - 1, causal=False)            # every token sees all others of up to 4,096

    `filter_settings`: of `longtrain.nn.filters.TapFilter` (init, init_std, squash, smooth, dropout); the defaults train.
    `butterfly`: learn the transforms too, beginning as DFTs, for documents of up to so many tokens; only with ``causal=False``, since a
    learned transform sees the future. `parameter_groups` gives filters and butterflies learning rates of their own.

    State: ``filter.taps [E, W]``, ``skip [E]``, with a butterfly its factors.
    """

    def __init__(
        self, channels: int, taps: int, *, causal: bool = True, butterfly: int | None = None, layer_index: int = 0, **filter_settings
    ) -> None:
        super().__init__()
        self.causal, self.layer_index = causal, layer_index
        self.filter = TapFilter(channels, taps, causal=causal, layer_index=layer_index, **filter_settings)
        self.skip = nn.Parameter(torch.ones(channels))
        self.butterfly = None
        if butterfly is not None:
            if causal:
                raise ValueError("a learned butterfly sees the future: use causal=False with it, or butterfly=None")
            self.butterfly = Butterfly(max(4, 1 << (max(butterfly + taps // 2, taps) - 1).bit_length()))

    def mixer(self, documents: Layout | None = None, dropout_seed: int | None = None) -> LongConvMixer | ButterflyMixer:
        """What has to be mixed, for these documents; filter dropout follows from the step's `dropout_seed`."""
        filter_EW = self.filter(nth_seed(dropout_seed, self.layer_index))
        if self.butterfly is None:
            return LongConvMixer(filter=filter_EW, skip=self.skip, causal=self.causal, documents=documents)
        b = self.butterfly
        factors = (b.first, b.second, b.inverse_first, b.inverse_second)
        return ButterflyMixer(filter=filter_EW, skip=self.skip, factors=factors, documents=documents)

    def forward(
        self, u_BTE: Tensor, gate_in_BTE: Tensor | None = None, gate_out_BTE: Tensor | None = None, *, documents: Layout | None = None
    ) -> Tensor:
        seed = int(torch.randint(2**62, ())) if self.training and self.filter.dropout else None
        return self.mixer(documents, seed)(u_BTE, gate_in_BTE, gate_out_BTE)


class LongConvMixerModule(nn.Module):
    """A decoder layer's mixer in the place of `longtrain.nn.Attention`: ``out(gate_out (k * (gate_in u) + skip (gate_in u)))``, causal.

    u and the gates are projections of x (H3, arXiv:2212.14052; Hyena of order 2 without its short filter). The gates begin around 1, by
    their bias: what a filter carries along is then not scrambled by where it arrives. `taps`: how far it sees,
    this token included. `implicit`: filters from `ImplicitFilter` instead of free taps, for sight as long as the sequence at few
    parameters; `filter_settings` are of the one or the other.

    State: ``in_proj [3 E, E]`` and its bias, ``out_proj [E, E]``, ``skip [E]``, ``filter.*``.
    """

    def __init__(self, hidden_size: int, taps: int, *, implicit: bool = False, layer_index: int = 0, **filter_settings) -> None:
        super().__init__()
        self.layer_index, self.implicit = layer_index, implicit
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        with torch.no_grad():
            self.in_proj.bias.copy_(torch.tensor([0.0, 1.0, 1.0]).repeat_interleave(hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.filter = (
            ImplicitFilter(hidden_size, taps, layer_index=layer_index, **filter_settings)
            if implicit
            else TapFilter(hidden_size, taps, layer_index=layer_index, **filter_settings)
        )
        self.skip = nn.Parameter(torch.ones(hidden_size))

    def mixer(self, documents: Layout | None = None, dropout_seed: int | None = None) -> LongConvMixer:
        """`dropout_seed`: the step's; only filter dropout needs it."""
        if self.implicit:
            filter_EW = self.filter(None if documents is None else documents.tokens)
        else:
            filter_EW = self.filter(nth_seed(dropout_seed, self.layer_index))
        return LongConvMixer(filter=filter_EW, skip=self.skip, documents=documents)

    def forward(self, x_BTE: Tensor, positions_BT: Tensor, mix) -> Tensor:
        """`mix`: callable of (u, gate_in, gate_out), the whole convolution or the streaming engine's part of it; positions are not used."""
        return self.out_proj(mix(*self.in_proj(x_BTE).chunk(3, dim=-1)))


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.1, filter_lr: float | None = None, butterfly_lr: float | None = None
) -> list[dict]:
    """Groups for an optimizer: matrices with weight decay; vectors without; filters without and at `filter_lr` (`lr` by default);
    butterflies without and at `butterfly_lr` (a tenth of `lr` by default: a transform is soon no transform). Every parameter once.

        torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    """
    of: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, (TapFilter, ImplicitFilter, Butterfly)):  # or a class made of one, as fully_shard's
            of |= dict.fromkeys(map(id, module.parameters()), "butterflies" if isinstance(module, Butterfly) else "filters")
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "filters": [], "butterflies": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[of.get(id(parameter), "matrices" if parameter.ndim > 1 else "vectors")].append(parameter)
    rates = dict.fromkeys(groups, lr)
    rates |= {"filters": lr if filter_lr is None else filter_lr, "butterflies": 0.1 * lr if butterfly_lr is None else butterfly_lr}
    return [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": weight_decay if name == "matrices" else 0.0}
        for name, parameters in groups.items()
        if parameters
    ]
