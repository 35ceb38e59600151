"""A transformers model whose sequences several processes share: each process is given all of them and runs on its part.

`sharing` (`longtrain.parallel.spread.Sharing`) says which part. Token ids, positions and labels are cut before the model sees them, the
labels moved one place left before that; masks are still made for whole sequences, and the loss is summed over the processes. States that
layers keep themselves go from process to process (`longtrain.parallel.turns`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longtrain.hf.layer import CU_SEQLENS
from longtrain.hf.mask import Mask, OfWhole
from longtrain.span import IGNORE_INDEX

CUT = ("input_ids", "inputs_embeds", "seq_idx")


def share(pretrained: PreTrainedModel, layers: Sequence[nn.Module], sharing, undo: list[Callable[[], Any]]) -> None:
    """Have `pretrained`, whose streamed `layers` these are, run on a part of what it is given. What was changed is put on `undo`."""
    take_part = partial(_take_part, sharing, _keeps_documents_apart(pretrained, layers))
    for layer in layers if sharing.mesh.all.size > 1 else ():
        if getattr(layer, "counts", None):
            raise ValueError(
                f"{type(layer).__name__} numbers its tokens itself, and a process holds a part of them: it streams on one process only; "
                "leave out group and parallel"
            )
        if getattr(layer, "state_bytes", 0):
            layer.take_turns(sharing.of)
            undo.append(partial(layer.take_turns, None))
    undo.append(pretrained.register_forward_pre_hook(take_part, with_kwargs=True).remove)
    loss = pretrained.loss_function
    pretrained.loss_function = partial(_total, sharing, loss)
    undo.append(partial(setattr, pretrained, "loss_function", loss))


def _total(sharing, loss: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return sharing.total(loss(*args, **kwargs))


def _keeps_documents_apart(pretrained: PreTrainedModel, layers: Sequence[nn.Module]) -> bool:
    """Whether the family's masks do so where positions restart: not all do, and then it is not done here either."""
    if "position_ids" not in inspect.signature(pretrained.forward).parameters:
        return False
    masks: list[Mask] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Mask))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    adapted = [(layer, layer.forward) for layer in layers if hasattr(layer, "original")]
    for layer, _ in adapted:
        layer.forward = layer.original  # what the model calls, and not what streams
    weight = pretrained.get_input_embeddings().weight
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].to(weight.device)
    try:
        with torch.random.fork_rng(devices={weight.device} if weight.is_cuda else []), torch.no_grad():
            pretrained(input_ids=positions % weight.shape[0], position_ids=positions, use_cache=False)
    finally:
        for layer, forward in adapted:
            layer.forward = forward
        for hook in hooks:
            hook.remove()
    return any(6 in row.documents.edges for mask in masks for row in mask.rows)


def _take_part(
    sharing, apart: bool, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """A call of the whole batch as a call of this process's part. Raises ValueError for arguments that cannot be cut."""
    signature = inspect.signature(module.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name in [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]:
        given |= given.pop(name, {})
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("use_cache") or "past_key_values" in given:  # decoding: every process runs all of it
        return None
    if given.get("output_router_logits", getattr(module.config, "output_router_logits", False)):
        raise ValueError("output_router_logits=True: the balancing loss of experts is not summed over processes; leave it off")
    batch, tokens = next(given[name] for name in CUT if name in given).shape[:2]
    mask, positions, labels = given.pop("attention_mask", None), given.pop("position_ids", None), given.pop("labels", None)
    if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
        raise ValueError("attention_mask with padding cannot be spread over processes: leave it out, pad at the end with labels of -100")
    others = {name: value for name, value in given.items() if name not in (*CUT, *CU_SEQLENS)}
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and tokens in value.shape]
    if unknown and tokens > 1:
        raise ValueError(f"{unknown[0]} runs along the tokens, and it is not known how to cut it for several processes; leave it out")
    device = given[CUT[0] if CUT[0] in given else CUT[1]].device
    positions = torch.arange(tokens, device=device)[None] if positions is None else positions
    layout = sharing.layout(tokens, given.get("cu_seq_lens_q", _documents(positions) if apart else None))
    given |= {name: layout.take(given[name]) for name in CUT if name in given}
    given["position_ids"] = layout.take(positions)
    given["attention_mask"] = torch.ones(batch, tokens, dtype=torch.bool, device=device).as_subclass(OfWhole)
    if labels is not None:
        targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        given["labels"], given["shift_labels"] = layout.take(labels), layout.take(targets)
        given.setdefault("num_items_in_batch", (targets != IGNORE_INDEX).sum().clamp_min(1))
    return (), given


def _documents(positions_BT: Tensor) -> list[int] | None:
    """Where positions restart, as boundaries; None where they do not. Raises ValueError for rows that differ."""
    starts = (positions_BT.diff(dim=-1) != 1).nonzero()
    if not len(starts):
        return None
    if positions_BT.shape[0] > 1:
        raise ValueError(f"position_ids restart inside a batch of {positions_BT.shape[0]} rows: pack documents into one row")
    return [0, *(starts[:, -1] + 1).tolist(), positions_BT.shape[1]]
