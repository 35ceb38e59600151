"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on float32 weights, whatever the dtype the model computes in.

In bfloat16 training the optimizer owns a float32 master copy of every parameter. Gradients are summed in float32 too: by autograd
itself where torch lets a parameter's gradient have its own dtype (`grad_dtype`), otherwise after every backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from longtrain.config.run import TrainConfig
from longtrain.nn import parameter_groups
from longtrain.sharded import sharded_parameter
from longtrain.train.weights import cast


class Optimizer:
    """Updates `model`, which must be float32 when passed in and is cast to the configured dtype here.

    A model sharded over processes stays float32: its weights are the masters, and are cast where they are gathered.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters: list[nn.Parameter] = self.parameters
        self.grad_clip = config.grad_clip
        self.separate_masters = config.dtype == "bfloat16" and sharded_parameter(model) is None
        self.wide_gradients = hasattr(torch.Tensor, "grad_dtype")
        if self.separate_masters:
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
            cast(model, torch.bfloat16)
            if self.wide_gradients:
                for parameter in self.parameters:
                    parameter.grad_dtype = torch.float32
        groups = parameter_groups(model, lr=config.lr, weight_decay=config.weight_decay, filter_lr=config.filter_lr)
        master_of = {id(p): m for p, m in zip(self.parameters, self.masters, strict=True)}
        for group in groups:
            group |= {"params": [master_of[id(p)] for p in group["params"]], "share": group["lr"] / config.lr}
        self.adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)

    def collect(self) -> None:
        """After every backward pass: add bfloat16 gradients to the masters' float32 ones, where autograd cannot."""
        if not self.separate_masters or self.wide_gradients:
            return
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is not None:
                wide = parameter.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                parameter.grad = None

    def grad_norm(self) -> torch.Tensor:
        """Norm of all gradients together, before clipping."""
        if self.separate_masters and self.wide_gradients:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                master.grad, parameter.grad = parameter.grad, None
        norm = get_total_norm([m.grad for m in self.masters if m.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def update(self, lr: float, grad_norm: torch.Tensor) -> None:
        """One step with gradients clipped by `grad_norm`; then the gradients are gone. Filters keep their share of `lr`."""
        if self.grad_clip is not None:
            clip_grads_with_norm_(self.masters, self.grad_clip, grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["share"]
        self.adamw.step()
        self.discard()
        self.copy_to_model()

    def discard(self) -> None:
        """Forget the gradients."""
        for tensor in (*self.masters, *self.parameters):
            tensor.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the model's own weights, where those are separate."""
        if self.separate_masters:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """The float32 weights and AdamW's state, by name: what a checkpoint holds. They are the live ones, so filling them loads it."""
        tensors = {}
        for name, master in zip(self.names, self.masters, strict=True):
            moments = self.adamw.state[master]
            if not moments:  # as torch's AdamW makes them before the first step
                moments["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                moments["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
                moments["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            tensors[f"weights.{name}"] = master.detach()
            tensors |= {f"{kind}.{name}": moment for kind, moment in moments.items()}
        return tensors
