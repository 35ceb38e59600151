"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on float32 weights, whatever the dtype the model computes in.

In bfloat16 training the optimizer owns a float32 master copy of every parameter. Gradients are summed in float32 too: by autograd
itself where torch lets a parameter's gradient have its own dtype (`grad_dtype`), otherwise after every backward pass.

On the host (`memory.optimizer: host`) masters and moments are in host memory whatever the dtype, and an update goes parameter by parameter:
its gradient down, AdamW there, its weights back, so that no more than one gradient is there at a time.
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

    def __init__(self, model: nn.Module, config: TrainConfig, *, on_host: bool = False) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters: list[nn.Parameter] = self.parameters
        self.grad_clip = config.grad_clip
        self.separate_masters, self.on_host = on_host or (config.dtype == "bfloat16" and sharded_parameter(model) is None), on_host
        self.wide_gradients = hasattr(torch.Tensor, "grad_dtype")
        if self.separate_masters:
            self.masters = [nn.Parameter(p.detach().to("cpu" if on_host else p.device, copy=True)) for p in self.parameters]
            cast(model, getattr(torch, config.dtype))
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
                wide = parameter.grad.to(master.device, torch.float32)
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                parameter.grad = None

    def grad_norm(self) -> torch.Tensor:
        """Norm of all gradients together, before clipping."""
        if self.on_host and self.wide_gradients:
            return get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.separate_masters and self.wide_gradients:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                master.grad, parameter.grad = parameter.grad, None
        norm = get_total_norm([m.grad for m in self.masters if m.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def update(self, lr: float, grad_norm: torch.Tensor) -> None:
        """One step with gradients clipped by `grad_norm`; then the gradients are gone. Filters keep their share of `lr`."""
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["share"]
        if self.on_host:
            self._update_on_host(grad_norm)
            return
        if self.grad_clip is not None:
            clip_grads_with_norm_(self.masters, self.grad_clip, grad_norm)
        self.adamw.step()
        self.discard()
        self.copy_to_model()

    def _update_on_host(self, grad_norm: torch.Tensor) -> None:
        given = [(p.grad if m.grad is None else m.grad) for p, m in zip(self.parameters, self.masters, strict=True)]
        self.discard()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            grad = given.pop(0)
            if grad is None:
                continue
            master.grad = grad.to(master.device, torch.float32)
            if self.grad_clip is not None:
                clip_grads_with_norm_([master], self.grad_clip, grad_norm.to(master.device))
            self.adamw.step()  # those without a gradient are left alone
            master.grad = None
            parameter.copy_(master)

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
