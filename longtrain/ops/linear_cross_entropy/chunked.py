"""Cross entropy of a linear map without logits beyond a chunk of tokens.

For a sum the gradients are linear in the one number that arrives from behind, so they are computed in the forward, while a
chunk's logits are there, and only multiplied in the backward: one product with W less than recomputing (Liger,
arXiv:2410.10989, section 3.2). Per-token losses have N numbers arriving from behind; their backward computes each chunk again.

With p = softmax(z), t the target, eps = label_smoothing, w the token's weight times what arrives from behind:

    dl/dz = w ((1 + 2 z_loss lse) p - (1 - eps) onehot(t) - eps / V)        dl/ds = dl/dz (1 - (z / softcap)^2)
    dx = dl/ds W            dW = (dl/ds)^T x            db = sum over tokens of dl/ds

Measured (python benchmarks/linear_cross_entropy.py: N 8192, E 256, V 8192, float32, two cores): 758 ms and 25 MB; torch's own chunked
op 781 ms and 33 MB; all logits 1702 ms and 1342 MB. Hence the order of backend="auto".

A chunk's logits are one buffer: logits, softmax and gradient in turn (softcap needs a second one). Axes: C tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.ops.linear_cross_entropy.call import Call, LossOptions, wide_dtype

# Half-precision weights are widened this many vocabulary rows at a time where the device has no half x half -> float32 product.
WIDEN_ROWS = 2048


class ChunkLoss(NamedTuple):
    """What one chunk gives."""

    loss: Tensor
    """0-d, wide: scale * sum of the weighted token losses, z-loss included."""
    z_loss: Tensor | None
    """0-d, wide: the part of `loss` that is z-loss; None where z_loss is 0."""
    dx_CE: Tensor | None
    """Gradient of `loss` by the chunk's input, in its dtype."""


def refuse(call: Call) -> str | None:
    """Chunking serves every call."""
    return None


def default_chunk_tokens(vocab: int, device: torch.device | str, dtype: torch.dtype) -> int:
    """Tokens whose logits fill 8 MiB on a CPU and 2 GiB on a GPU, at least 64 and at most 8192, a multiple of 64.

    Larger ones gain no time (python benchmarks/linear_cross_entropy.py).
    """
    budget = 8 << 20 if torch.device(device).type == "cpu" else 2 << 30
    tokens = budget // (vocab * wide_dtype(dtype).itemsize)
    return max(64, min(8192, tokens // 64 * 64))


def workspace(chunk_tokens: int, vocab: int, device: torch.device | str, dtype: torch.dtype, options: LossOptions) -> Tensor:
    """Buffer for the logits of chunks up to `chunk_tokens`: [1 or 2 with softcap, C, V], wide. Reused from chunk to chunk."""
    buffers = 1 if options.softcap is None else 2
    return torch.empty(buffers, chunk_tokens, vocab, device=device, dtype=wide_dtype(dtype))


def footprint_bytes(chunk_tokens: int, vocab: int, width: int, dtype: torch.dtype, *, softcap: bool = False, device: str = "cpu") -> int:
    """Bytes `chunk_loss_and_grad` needs beside its inputs, `dx` and the accumulators: the logits buffer and what half types add."""
    wide = wide_dtype(dtype).itemsize
    size = (1 + softcap) * chunk_tokens * vocab * wide + 2 * chunk_tokens * width * wide
    if dtype.itemsize < wide:
        # GPU: the gradient of the logits in half; elsewhere: input and dx widened, and a block of widened weight rows.
        size += chunk_tokens * vocab * dtype.itemsize if device == "cuda" else (chunk_tokens + WIDEN_ROWS) * width * wide
    return size


def chunk_loss_and_grad(
    hidden_CE: Tensor,
    weight_VE: Tensor,
    target_C: Tensor,
    token_weight_C: Tensor | None,
    scale: Tensor,
    options: LossOptions,
    *,
    want_dx: bool,
    dweight_VE: Tensor | None,
    bias_V: Tensor | None = None,
    dbias_V: Tensor | None = None,
    logits_buffer: Tensor | None = None,
) -> ChunkLoss:
    """Loss of one chunk and its gradients, without autograd.

    `scale` (0-d, wide) multiplies loss and gradients. `dweight_VE` and `dbias_V` are wide accumulators that are added into;
    None skips them. `logits_buffer` is a `workspace(...)` with room for the chunk; None allocates one. Targets are not checked
    here: call `check_targets` once for the sequence.
    """
    kind = hidden_CE.device.type
    with torch.no_grad(), torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False):  # shapes alone have none
        valid_C = target_C != options.ignore_index
        factor_C = valid_C.to(scale.dtype) * scale
        if token_weight_C is not None:
            # where: a weight of an ignored token may be anything, NaN too.
            factor_C = factor_C * token_weight_C.where(valid_C, 0)
        token = _token_losses(hidden_CE, weight_VE, bias_V, target_C.where(valid_C, 0), options, logits_buffer)
        # A token without weight is cut out, so that a non-finite loss there does not become 0 * inf.
        loss = torch.where(factor_C == 0, 0, token.loss_C * factor_C).sum()
        z_loss = None
        if options.z_loss:
            z_loss = options.z_loss * torch.where(factor_C == 0, 0, token.lse_C.square() * factor_C).sum()
        dx_CE = None
        if want_dx or dweight_VE is not None or dbias_V is not None:
            dlogits_CV = _dlogits(token, target_C.where(valid_C, 0), options)
            dx_CE = _gradients(dlogits_CV, factor_C, hidden_CE, weight_VE, want_dx, dweight_VE, dbias_V)
        return ChunkLoss(loss, z_loss, dx_CE)


class _Token(NamedTuple):
    loss_C: Tensor
    lse_C: Tensor
    softmax_CV: Tensor
    tanh_CV: Tensor | None


def _token_losses(hidden_CE: Tensor, weight_VE: Tensor, bias_V: Tensor | None, target_C: Tensor, options: LossOptions,
                  buffer: Tensor | None) -> _Token:
    """Unweighted losses; the logits buffer is left holding the softmax."""
    tokens, vocab = hidden_CE.shape[0], weight_VE.shape[0]
    if buffer is None:
        buffer = workspace(tokens, vocab, hidden_CE.device, hidden_CE.dtype, options)
    z_CV = buffer[0, :tokens]
    _logits(hidden_CE, weight_VE, z_CV)
    if bias_V is not None:
        z_CV.add_(bias_V)
    tanh_CV = None
    if options.softcap is not None:
        tanh_CV = torch.tanh(z_CV.div_(options.softcap), out=buffer[1, :tokens])
        torch.mul(tanh_CV, options.softcap, out=z_CV)
    z_target_C = z_CV.gather(-1, target_C[:, None])[:, 0]
    z_mean_C = z_CV.mean(dim=-1) if options.label_smoothing else None
    # softmax in place; its largest entry is 1 / sum exp(z - max), so lse = max - log(largest), with no further pass of exp.
    z_max_C = z_CV.amax(dim=-1)
    torch.softmax(z_CV, dim=-1, out=z_CV)
    lse_C = z_max_C - z_CV.amax(dim=-1).log_()
    loss_C = lse_C - (1 - options.label_smoothing) * z_target_C
    if z_mean_C is not None:
        loss_C -= options.label_smoothing * z_mean_C
    if options.z_loss:
        loss_C += options.z_loss * lse_C.square()
    return _Token(loss_C, lse_C, z_CV, tanh_CV)


def _dlogits(token: _Token, target_C: Tensor, options: LossOptions) -> Tensor:
    """dl/ds of every token, unweighted, in the buffer of the softmax."""
    g_CV = token.softmax_CV
    if options.z_loss:
        g_CV.mul_((1 + 2 * options.z_loss * token.lse_C)[:, None])
    if options.label_smoothing:
        g_CV.sub_(options.label_smoothing / g_CV.shape[1])
    g_CV.scatter_add_(-1, target_C[:, None], g_CV.new_full((1, 1), options.label_smoothing - 1).expand(len(target_C), 1))
    if token.tanh_CV is not None:
        slope_CV = token.tanh_CV.square_().neg_().add_(1)
        g_CV.mul_(slope_CV)
    return g_CV


def _logits(x_CE: Tensor, weight_VE: Tensor, out_CV: Tensor) -> None:
    if x_CE.dtype == out_CV.dtype:
        torch.mm(x_CE, weight_VE.t(), out=out_CV)
    elif x_CE.is_cuda:
        torch.mm(x_CE, weight_VE.t(), out_dtype=out_CV.dtype, out=out_CV)
    else:
        x_CE = x_CE.to(out_CV.dtype)
        for rows in _row_blocks(weight_VE):
            torch.mm(x_CE, weight_VE[rows].to(out_CV.dtype).t(), out=out_CV[:, rows])


def _gradients(dlogits_CV: Tensor, factor_C: Tensor, x_CE: Tensor, weight_VE: Tensor, want_dx: bool, dweight_VE: Tensor | None,
               dbias_V: Tensor | None) -> Tensor | None:
    """Weighs tokens by `factor_C`, adds into the accumulators, returns dx."""
    wide = dlogits_CV.dtype
    if dbias_V is not None:
        dbias_V.addmv_(dlogits_CV.t(), factor_C)
    if x_CE.dtype != wide and x_CE.is_cuda:
        # Weighed and rounded in one pass; both products accumulate in float32.
        half_CV = torch.mul(dlogits_CV, factor_C[:, None], out=torch.empty_like(dlogits_CV, dtype=x_CE.dtype))
        if dweight_VE is not None:
            torch.addmm(dweight_VE, half_CV.t(), x_CE, out_dtype=wide, out=dweight_VE)
        return half_CV @ weight_VE if want_dx else None
    # diag(f) G: its products are (G W) scaled by row, and G^T (f x): C x E numbers instead of C x V.
    if dweight_VE is not None:
        dweight_VE.addmm_(dlogits_CV.t(), x_CE * factor_C[:, None])
    if not want_dx:
        return None
    if x_CE.dtype == wide:
        return torch.mm(dlogits_CV, weight_VE).mul_(factor_C[:, None])
    dx_CE = torch.zeros(x_CE.shape, dtype=wide, device=x_CE.device)
    for rows in _row_blocks(weight_VE):
        dx_CE.addmm_(dlogits_CV[:, rows], weight_VE[rows].to(wide))
    return dx_CE.mul_(factor_C[:, None]).to(x_CE.dtype)


def _row_blocks(weight_VE: Tensor) -> list[slice]:
    return [slice(start, min(start + WIDEN_ROWS, len(weight_VE))) for start in range(0, len(weight_VE), WIDEN_ROWS)]


def run(call: Call) -> Tensor:
    """Differentiable loss: 0-d with a scale, [N] without."""
    chunk = call.chunk_tokens or default_chunk_tokens(call.weight_VE.shape[0], call.input_NE.device, call.input_NE.dtype)
    chunk = min(chunk, max(1, call.input_NE.shape[0]))
    tensors = (call.input_NE, call.weight_VE, call.bias_V)
    if not torch.is_grad_enabled():  # or gradients would be made for nobody: `needs_input_grad` does not know of no_grad
        tensors = tuple(None if t is None else t.detach() for t in tensors)
    function = _PerToken if call.scale is None else _Sum
    return function.apply(*tensors, call.target_N, call.token_weights_N, call.scale, call.options, chunk)


def _wide_zeros_like(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.zeros(tensor.shape, dtype=wide_dtype(tensor.dtype), device=tensor.device) if wanted else None


def _refuse_second_derivatives() -> None:
    # A backward runs with gradients enabled only under create_graph=True. once_differentiable would not do: where what arrives from
    # behind needs no gradient, it returns constants, and a gradient penalty on them is silently without effect.
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: the chunked backend has no second derivatives (create_graph=True); "
                           "backend='reference' has them")


class _Sum(torch.autograd.Function):
    """scale * sum of token losses; gradients made in the forward."""

    @staticmethod
    def forward(ctx, input_NE, weight_VE, bias_V, target_N, token_weights_N, scale, options, chunk):
        want_dx, want_dw, want_db = ctx.needs_input_grad[:3]
        dweight_VE, dbias_V = _wide_zeros_like(weight_VE, want_dw), _wide_zeros_like(bias_V, want_db)
        dx_NE = torch.empty_like(input_NE) if want_dx else None
        buffer = workspace(chunk, weight_VE.shape[0], input_NE.device, input_NE.dtype, options)
        # Summed unscaled, so that a small scale costs half types no bits; the backward multiplies with it.
        one, loss = torch.ones_like(scale), torch.zeros_like(scale)
        for start in range(0, input_NE.shape[0], chunk):
            part = slice(start, start + chunk)
            done = chunk_loss_and_grad(
                input_NE[part], weight_VE, target_N[part], None if token_weights_N is None else token_weights_N[part], one, options,
                want_dx=want_dx, dweight_VE=dweight_VE, bias_V=bias_V, dbias_V=dbias_V, logits_buffer=buffer)
            loss += done.loss
            if want_dx:
                dx_NE[part] = done.dx_CE
        ctx.gradients, ctx.scale = (dx_NE, dweight_VE, dbias_V), scale
        return loss * scale

    @staticmethod
    def backward(ctx, dloss):
        _refuse_second_derivatives()
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients were handed over in the first backward; compute the loss again "
                               "instead of retain_graph=True, or take reduction='none'")
        gradients, ctx.gradients = ctx.gradients, None
        factor = dloss * ctx.scale
        # In place and still wide: autograd rounds to the dtype each parameter wants (p.grad_dtype).
        return *(None if g is None else g.mul_(factor) for g in gradients), None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """Losses [N]; the backward computes each chunk again."""

    @staticmethod
    def forward(ctx, input_NE, weight_VE, bias_V, target_N, token_weights_N, scale, options, chunk):
        ctx.save_for_backward(input_NE, weight_VE, bias_V, target_N, token_weights_N)
        ctx.options, ctx.chunk = options, chunk
        buffer = workspace(chunk, weight_VE.shape[0], input_NE.device, input_NE.dtype, options)
        valid_N = target_N != options.ignore_index
        safe_target_N = target_N.where(valid_N, 0)
        loss_N = torch.empty(target_N.shape, dtype=buffer.dtype, device=input_NE.device)
        for start in range(0, input_NE.shape[0], chunk):
            part = slice(start, start + chunk)
            loss_N[part] = _token_losses(input_NE[part], weight_VE, bias_V, safe_target_N[part], options, buffer).loss_C
        if token_weights_N is not None:
            loss_N *= token_weights_N
        return loss_N.where(valid_N, 0)

    @staticmethod
    def backward(ctx, dloss_N):
        _refuse_second_derivatives()
        input_NE, weight_VE, bias_V, target_N, token_weights_N = ctx.saved_tensors
        want_dx, want_dw, want_db = ctx.needs_input_grad[:3]
        dweight_VE, dbias_V = _wide_zeros_like(weight_VE, want_dw), _wide_zeros_like(bias_V, want_db)
        dx_NE = torch.empty_like(input_NE) if want_dx else None
        buffer = workspace(ctx.chunk, weight_VE.shape[0], input_NE.device, input_NE.dtype, ctx.options)
        factor_N = dloss_N if token_weights_N is None else dloss_N * token_weights_N
        one = torch.ones((), dtype=buffer.dtype, device=buffer.device)
        for start in range(0, input_NE.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            dx_CE = chunk_loss_and_grad(
                input_NE[part], weight_VE, target_N[part], factor_N[part], one, ctx.options, want_dx=want_dx, dweight_VE=dweight_VE,
                bias_V=bias_V, dbias_V=dbias_V, logits_buffer=buffer).dx_CE
            if want_dx:
                dx_NE[part] = dx_CE
        return dx_NE, dweight_VE, dbias_V, None, None, None, None, None
