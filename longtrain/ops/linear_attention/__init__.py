"""Linear attention: a state of fixed size that every token writes to and reads from, with decay, and with the delta rule.

Read `reference.py` for what is computed and `chunked.py` for how; `cpp.py` and `triton.py` are the same as kernels for CPUs and GPUs.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from longtrain.ops.linear_attention import chunked, cpp, reference, triton
from longtrain.ops.linear_attention.call import Call, checked

__all__ = ["explain", "flops", "footprint_bytes", "linear_attention", "linear_attention_backward"]

# In order of preference of backend="auto".
BACKENDS = {"triton": triton, "cpp": cpp, "chunked": chunked, "reference": reference}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | float | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """out_t = scale S_t^T q_t of the state S_t = diag(exp(decay_t)) S_{t-1} + k_t u_t^T; u_t is v_t, or by the delta rule what v_t changes.

        out = linear_attention(q_BTHD, k_BTHD, v_BTHV, decay=F.logsigmoid(gate_BTHD) / 16)                  # GLA
        out = linear_attention(q_BTHD, F.normalize(k_BTHD, dim=-1), v_BTHV, decay=g_BTH, beta=beta_BTH)     # gated DeltaNet

    q, k: [B, T, H, D]. v: [B, T, H, Dv]. As many heads for keys as for queries.
    decay: logarithms, at most 0, and may be minus infinity: a number or [H] (RetNet), [B, T, H] (Mamba-2), [B, T, H, D] (GLA). None: 0.
    beta: [B, T, H], turns the delta rule on: u_t = beta_t (v_t - S^T k_t) of the decayed state S. Stable for keys of norm 1 and beta in
    [0, 2]. scale: D^-1/2 by default.
    initial_state: [B, H, D, Dv], what the first token finds.
    cu_seqlens: int32 or int64 [documents + 1], 0 first and T last: at a document's first token the state is 0 (in every row of the batch
    the same boundaries); the initial state is for the first document, the state returned is the last one's.
    chunk_size: tokens that are worked on as matrices, a power of two.
    backend: "auto", or one of "triton", "cpp", "chunked", "reference".

    Returns q's dtype [B, T, H, Dv], with return_state also the last state [B, H, D, Dv]. States and all arithmetic are float32 at least
    (float64 where an input is); "triton" rounds the factors of its matrix products to tf32 where queries have 16 bits. Inputs and a few
    states are saved; differentiable once (it says so), the reference often.
    Raises ValueError for tensors that do not fit together, or with a named backend's reason to refuse.
    """
    call = checked(q, k, v, decay, beta, scale, initial_state, cu_seqlens, chunk_size)
    if backend == "reference":
        call.check_documents()
        with torch.autocast(q.device.type, enabled=False):
            out, state = reference.run(call)
    else:
        out, state, _ = _forward_op(q, k, v, call.decay_BTHG, beta, initial_state, cu_seqlens, call.scale, chunk_size, backend)
    return (out, state) if return_state else out


def linear_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    dstate: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v, decay, beta and the initial state (also where it was None), for those of the output and of the last state.

    The backward pass alone, for who carries the state along the sequence; arguments as in `linear_attention`, decay as [B, T, H] or
    [B, T, H, D]. The reference has none: that of "chunked" stands in for it.
    """
    call = checked(q, k, v, decay, beta, scale, initial_state, cu_seqlens, chunk_size)
    call.check_documents()
    state_shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    for name, grad, shape in (("dout", dout, v.shape), ("dstate", dstate, state_shape)):
        if grad is None and name == "dstate":
            continue
        if not isinstance(grad, Tensor) or grad.shape != shape:
            found = list(grad.shape) if isinstance(grad, Tensor) else type(grad).__name__
            raise ValueError(f"linear_attention_backward: {name} must have shape {list(shape)}, not {found}")
    if decay is not None and not (isinstance(decay, Tensor) and decay.dim() > 2):
        raise ValueError("linear_attention_backward: decay must be a tensor [B, T, H] or [B, T, H, D]; expand one a head over the tokens")
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        chosen = _choose(call, "chunked" if backend == "reference" else backend)
        dq, dk, dv, ddecay, dbeta, dinitial = chosen.backward(call, chunked.entry_states(call, chosen.forward), dout, dstate)
    return dq, dk, dv, None if ddecay is None else ddecay.view(decay.shape), dbeta, dinitial


def explain(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | float | None = None, beta: Tensor | None = None, scale: float | None = None,
            initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk_size: int = 64) -> dict[str, str | None]:
    """Each backend, in order of preference, and why it does not serve this call (None: it could)."""
    call = checked(q, k, v, decay, beta, scale, initial_state, cu_seqlens, chunk_size)
    call.check_documents()
    return {name: module.refuse(call) for name, module in BACKENDS.items()}


def footprint_bytes(
    tokens: int, heads: int, key_dim: int, value_dim: int, *, decays: int = 0, delta: bool = False, chunk_size: int = 64, itemsize: int = 4,
    device: str = "cpu",
) -> int:  # fmt: skip
    """Workspace of the backward pass, the larger one, of backend="auto" for a batch of one. `decays`: log decays of a token and head, 0, 1
    or D."""
    if cpp.refuse_shape(device, key_dim, value_dim) is None:
        return cpp.footprint_bytes(tokens, heads, key_dim, value_dim, itemsize=itemsize)
    options = dict(decays=decays, delta=delta, chunk_size=chunk_size, itemsize=itemsize, device=device)
    return chunked.footprint_bytes(tokens, heads, key_dim, value_dim, **options)


def flops(
    tokens: int, *, heads: int, key_dim: int, value_dim: int, delta: bool = False, chunk_size: int = 64, backward: bool = False
) -> float:
    """Of matrix products, in chunks of c tokens, for a batch of one: c (D + Dv) a token among the tokens of a chunk, which see half of
    them, 4 D Dv with the state; the delta rule solves a system and meets the state once more. Backward makes the states again, and of each
    product two."""
    one = chunk_size * (key_dim + value_dim) * (1 + delta) + (4 + 2 * delta) * key_dim * value_dim
    return tokens * heads * one * (3 if backward else 1)


def _choose(call: Call, backend: str) -> Any:
    if backend == "auto":
        return next(module for module in BACKENDS.values() if module.refuse(call) is None)
    if backend not in BACKENDS:
        raise ValueError(f"linear_attention: backend must be auto or one of {', '.join(BACKENDS)}, not {backend!r}")
    reason = BACKENDS[backend].refuse(call)
    if reason is not None:
        raise ValueError(f"linear_attention: backend {backend!r} refuses this call ({reason}); name another one, or \"auto\"")
    return BACKENDS[backend]


@torch.library.custom_op("longtrain::linear_attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, decay: Optional[Tensor], beta: Optional[Tensor], initial_state: Optional[Tensor],
    cu_seqlens: Optional[Tensor], scale: float, chunk_size: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        call = _call(q, k, v, decay, beta, initial_state, cu_seqlens, scale, chunk_size)
        call.check_documents()
        return _choose(call, backend).forward(call)


@_forward_op.register_fake
def _(q, k, v, decay, beta, initial_state, cu_seqlens, scale, chunk_size, backend):
    call = _call(q, k, v, decay, beta, initial_state, cu_seqlens, scale, chunk_size)
    B, _, H, D = q.shape
    state = q.new_empty(B, H, D, v.shape[3], dtype=call.wide)
    return v.new_empty(v.shape, dtype=q.dtype), state, state.new_empty(B, chunked.piece_count(call), H, D, v.shape[3])


@torch.library.custom_op("longtrain::linear_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, dstate: Optional[Tensor], entries: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Optional[Tensor],
    beta: Optional[Tensor], initial_state: Optional[Tensor], cu_seqlens: Optional[Tensor], scale: float, chunk_size: int, backend: str,
) -> list[Tensor]:  # fmt: skip
    call = _call(q, k, v, decay, beta, initial_state, cu_seqlens, scale, chunk_size)
    with torch.autocast(q.device.type, enabled=False):
        *grads, dinitial = _choose(call, backend).backward(call, entries, dout, dstate)
    return [grad for grad in (*grads, None if initial_state is None else dinitial) if grad is not None]


@_backward_op.register_fake
def _(dout, dstate, entries, q, k, v, decay, beta, initial_state, cu_seqlens, scale, chunk_size, backend):
    return [t.new_empty(t.shape) for t in (q, k, v, decay, beta, initial_state) if t is not None]


def _call(q, k, v, decay, beta, initial_state, cu_seqlens, scale, chunk_size) -> Call:
    return Call(
        q_BTHD=q, k_BTHD=k, v_BTHV=v, decay_BTHG=decay, beta_BTH=beta, state_BHDV=initial_state, cu_seqlens=cu_seqlens, scale=scale,
        chunk_size=chunk_size,
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.chunk_size, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)  # an unused last state has no gradient, not one of zeros


def _autograd_backward(ctx, dout, dstate, _dentries):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_attention: no second derivatives (create_graph=True); backend='reference' has them"
        )
    *given, entries = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(given[2], dtype=given[0].dtype)
    grads = iter(_backward_op(dout, dstate, entries, *given, ctx.scale, ctx.chunk_size, ctx.backend))
    return *(None if t is None else next(grads) for t in given[:6]), None, None, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)
