"""Libraries as backends: calls cut into pieces, and the calls of torch's, cuDNN's and flash-attn's functions, without a GPU.

The decomposition is run with a library written in plain torch, in float64; the wrappers are run on meta tensors against torch's own
signatures and shapes, and with functions of flash-attn's signatures that compute in plain torch.
"""

import types
from dataclasses import replace

import pytest
import torch

from longtrain.ops.attention import attention, cudnn, explain, flash, flash_attn, pieces, reference, select
from longtrain.ops.attention.interface import checked_call
from longtrain.ops.attention.pieces import CAUSAL, FULL, Library, Piece
from tests.ops.attention_cases import assert_close, drawn_case, drawn_options

UNSERVED = {"softcap", "dropout", "sink_tokens", "block_stride", "lse_gradient"}


# --- a library in plain torch -------------------------------------------------------------------------------------------------------


def piece_mask(piece: Piece) -> torch.Tensor:
    """[t, s], from the definition: each document aligned bottom-right, nothing visible between documents."""
    mask = torch.zeros(piece.queries, piece.keys, dtype=torch.bool)
    cu_q, cu_k = piece.cu_q or (0, piece.queries), piece.cu_k or (0, piece.keys)
    left, right = piece.window
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        at = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        mask[a:b, c:d] = (at <= left if left >= 0 else True) & (-at <= right if right >= 0 else torch.ones_like(at, dtype=torch.bool))
    return mask


def scores(call, piece, q, k):
    group = call.heads // k.shape[2]
    s = call.scale * torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2))
    return s.masked_fill(~piece_mask(piece), -torch.inf)


def torch_forward(call, piece, q, k, v):
    s = scores(call, piece, q, k)
    lse = torch.logsumexp(s, -1)
    assert not lse.isneginf().any(), "a row of a piece sees no key"
    out = torch.einsum("bhts,bshd->bthd", torch.exp(s - lse[..., None]), v.repeat_interleave(call.heads // v.shape[2], 2))
    return out, lse.transpose(1, 2)


def torch_backward(call, piece, dout, q, k, v, out, lse):
    """dK, dV for all query heads, as flash-attn 2 has them inside."""
    p = torch.exp(scores(call, piece, q, k) - lse.transpose(1, 2)[..., None])
    group = call.heads // k.shape[2]
    dp = torch.einsum("bthd,bshd->bhts", dout, v.repeat_interleave(group, 2))
    ds = call.scale * p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None])
    dq = torch.einsum("bhts,bshd->bthd", ds, k.repeat_interleave(group, 2))
    return dq, torch.einsum("bhts,bthd->bshd", ds, q), torch.einsum("bhts,bthd->bshd", p, dout)


LIBRARIES = {
    "like cuDNN": Library(forward=torch_forward, backward=torch_backward, aligned=False, packed=False, key_block=50),
    "like flash": Library(forward=torch_forward, backward=torch_backward, aligned=True, packed=True, key_block=50),
    "like flash, blocks of one key": Library(forward=torch_forward, backward=torch_backward, aligned=True, packed=True, key_block=1),
    "aligned, no packs": Library(forward=torch_forward, backward=torch_backward, aligned=True, packed=False),
    "strips": Library(forward=torch_forward, backward=torch_backward, aligned=False, packed=False, strip=16),
}


def run(call, library, x, dk, dv):
    out, lse = pieces.forward(call, library, x["q"], x["k"], x["v"], x["sink_logits"])
    dq = pieces.backward(call, library, x["dout"], x["q"], x["k"], x["v"], out, lse, dk, dv)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def of_reference(call, x):
    out, lse = reference.forward(call, x["q"], x["k"], x["v"], x["sink_logits"])
    delta = (x["dout"] * out).sum(-1)
    dk, dv = torch.zeros_like(x["k"]), torch.zeros_like(x["v"])
    dq = reference.backward(call, x["dout"], x["q"], x["k"], x["v"], out, lse, delta, dk, dv)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def served(call, library) -> bool:
    """What a library that is not aligned does not do: windows (without strips, or bounded on one side only)."""
    if library.aligned:
        return True
    cut = pieces.pieces(call, replace(library, aligned=True))
    return all(p.window in (FULL, CAUSAL) or (library.strip and min(p.window) >= 0) for p in cut)


@pytest.mark.parametrize("name", LIBRARIES)
def test_pieces_equal_the_reference(name):
    library, tried = LIBRARIES[name], 0
    for number in range(900):
        if drawn_options(number) & UNSERVED:
            continue
        x, options = drawn_case(number, torch.float64, longest=120)
        call = checked_call(x["q"], x["k"], x["v"], sink_logits=x["sink_logits"], **options)
        if not served(call, library) or call.queries * call.keys > 9000 and library.key_block == 1:
            continue
        tried += 1
        found = run(call, library, x, torch.zeros_like(x["k"]), torch.zeros_like(x["v"]))
        try:
            assert_close(found, of_reference(call, x), 1e-12)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {options}, q {tuple(x['q'].shape)}, k {tuple(x['k'].shape)}") from error
        if tried == 60:
            return
    pytest.fail(f"only {tried} cases")


def call_of(T, S, H=2, K=1, dtype=torch.bfloat16, **options):
    q, k, v = (torch.empty(1, n, h, 64, dtype=dtype) for n, h in ((T, H), (S, K), (S, K)))
    return checked_call(q, k, v, **({"causal": True} | options))


def test_a_chunk_at_an_offset_is_a_prefix_and_a_diagonal():
    cut = [*pieces.pieces(call_of(16, 112), LIBRARIES["like cuDNN"])]
    assert cut == [Piece(slice(0, 16), slice(0, 96)), Piece(slice(0, 16), slice(96, 112), CAUSAL)]
    assert [*pieces.pieces(call_of(16, 112), LIBRARIES["like flash"])] == [Piece(slice(0, 16), slice(0, 112), CAUSAL)]


def test_blocks_of_keys_bound_every_backward_call():
    cut = [*pieces.pieces(call_of(64, 200), LIBRARIES["like flash"], 50)]
    assert max(p.keys for p in cut) <= 50 and sum(p.queries * p.keys for p in cut) < 64 * 200 + 64
    assert [p.window for p in cut] == [FULL, FULL, CAUSAL, FULL, CAUSAL]


def test_packed_documents_are_one_call_unless_one_is_not_aligned():
    packed = call_of(100, 100, cu_seqlens_q=torch.tensor([0, 30, 31, 100]))
    piece, = pieces.pieces(packed, LIBRARIES["like flash"])
    assert piece == Piece(slice(0, 100), slice(0, 100), CAUSAL, (0, 30, 31, 100), (0, 30, 31, 100))
    blocks = [*pieces.pieces(packed, LIBRARIES["like flash"], 50)]
    assert blocks[0].cu_q == (0, 30, 31) and all(p.cu_q is None and p.keys <= 50 for p in blocks[1:])
    apart = call_of(100, 100, cu_seqlens_q=torch.tensor([0, 30, 60, 100]), cu_seqlens_k=torch.tensor([0, 10, 60, 100]))
    first, second = pieces.pieces(apart, LIBRARIES["like flash"])
    assert first == Piece(slice(20, 30), slice(0, 10), CAUSAL) and second.cu_q == (0, 30, 70)


def test_documents_whose_queries_are_not_the_last_are_not_packed():
    options = {"cu_seqlens_q": torch.tensor([0, 30, 60]), "q_offset": -5}
    x = {name: torch.randn(1, 60, h, 8, dtype=torch.float64) for name, h in (("q", 2), ("k", 1), ("v", 1), ("dout", 2))} | {
        "sink_logits": None
    }
    call = checked_call(x["q"], x["k"], x["v"], causal=True, **options)
    assert all(piece.cu_q is None for piece in pieces.pieces(call, LIBRARIES["like flash"]))
    assert_close(run(call, LIBRARIES["like flash"], x, torch.zeros_like(x["k"]), torch.zeros_like(x["v"])), of_reference(call, x), 1e-12)


def test_partial_outputs_are_merged_in_float32_and_rounded_once():
    x = {name: torch.randn(1, n, 2, 16) for name, n in (("q", 64), ("k", 640), ("v", 640))}
    call = checked_call(**{n: t.bfloat16() for n, t in x.items()}, causal=True)

    def rounded(call, piece, q, k, v):
        out, lse = torch_forward(call, piece, q.float(), k.float(), v.float())
        return out.bfloat16(), lse

    library = replace(LIBRARIES["like cuDNN"], forward=rounded)
    tensors = [t.bfloat16() for t in x.values()]
    out, lse = pieces.forward(call, library, *tensors, None)
    exact, exact_lse = reference.forward(call, *(t.double() for t in tensors), None)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (out - exact).norm() / exact.norm() < 3e-3 and (lse - exact_lse).abs().max() < 1e-5


# --- the wrappers --------------------------------------------------------------------------------------------------------------------


def on_meta(H=4, K=2, T=96, S=160, D=64, **options):
    """A call on meta tensors, with the tensors of its forward and backward."""
    q, k, v, dout = (torch.empty(1, n, h, D, dtype=torch.bfloat16, device="meta") for n, h in ((T, H), (S, K), (S, K), (T, H)))
    call = checked_call(q, k, v, **({"causal": True} | options))
    return call, q, k, v, dout


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": (40, 0)}, {"q_offset": 100},
                                     {"cu_seqlens_q": torch.tensor([0, 40, 96]), "cu_seqlens_k": torch.tensor([0, 60, 160])}])
def test_torchs_flash_ops_take_and_return_what_is_expected(options):
    call, q, k, v, dout = on_meta(**options)
    out, lse = flash.forward(call, q, k, v, None)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (1, 96, 4) and lse.dtype == torch.float32
    dk, dv = (torch.zeros(x.shape, device="meta") for x in (k, v))
    assert flash.backward(call, dout, q, k, v, out, lse, None, dk, dv).shape == q.shape


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"q_offset": 100}])
def test_cudnns_ops_take_and_return_what_is_expected(options):
    call, q, k, v, dout = on_meta(**options)
    out, lse = cudnn.forward(call, q, k, v, None)
    assert out.shape == q.shape and lse.shape == (1, 96, 4)
    dk, dv = (torch.zeros(x.shape, device="meta") for x in (k, v))
    assert cudnn.backward(call, dout, q, k, v, out, lse, None, dk, dv).shape == q.shape


def stand_in(version: str) -> types.SimpleNamespace:
    """Functions with a release's names and arguments, in plain torch: packed ones take [T, H, D], the LSE is [B, H, T] or [H, T]."""

    def piece_of(q, k, causal, window, cu_q, cu_k):
        t, s = (len(q), len(k)) if cu_q is not None else (q.shape[1], k.shape[1])
        left, right = (-1 if side is None else side for side in window)
        boundaries = (None, None) if cu_q is None else (tuple(cu_q.tolist()), tuple(cu_k.tolist()))
        return Piece(slice(0, t), slice(0, s), CAUSAL if causal else (left, right), *boundaries)

    def run_forward(q, k, v, scale, causal, window, cu_q=None, cu_k=None):
        piece = piece_of(q, k, causal, window, cu_q, cu_k)
        q, k, v = (x if cu_q is None else x[None] for x in (q, k, v))
        out, lse = torch_forward(types.SimpleNamespace(scale=scale, heads=q.shape[2]), piece, q, k, v)
        lse = lse.transpose(1, 2).contiguous()
        return (out, lse) if cu_q is None else (out[0], lse[0])

    def run_backward(dout, q, k, v, out, lse, scale, causal, window, cu_q=None, cu_k=None):
        piece = piece_of(q, k, causal, window, cu_q, cu_k)
        heads = k.shape[-2]
        dout, q, k, v, out, lse = (x if cu_q is None else x[None] for x in (dout, q, k, v, out, lse))
        call = types.SimpleNamespace(scale=scale, heads=q.shape[2])
        dq, dk, dv = torch_backward(call, piece, dout, q, k, v, out, lse.transpose(1, 2))
        dk, dv = (x.unflatten(2, (heads, -1)).sum(3) for x in (dk, dv))
        return [x if cu_q is None else x[0] for x in (dq, dk, dv)]

    def write(into, values):
        for x, value in zip(into, values):
            x.copy_(value)

    if version == "flash_attn_4":
        def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
                            causal=False, softcap=None, window_size_left=None, window_size_right=None, return_lse=False):
            assert return_lse and -1 not in (window_size_left, window_size_right)
            return run_forward(q, k, v, softmax_scale, causal, (window_size_left, window_size_right), cu_seqlens_q, cu_seqlens_k)

        def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                            window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, deterministic=False):
            return run_backward(
                dout, q, k, v, out, lse, softmax_scale, causal, (window_size_left, window_size_right), cu_seqlens_q, cu_seqlens_k
            )

        return types.SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    if version == "flash_attn_3":
        def _flash_attn_forward(q, k, v, k_new, v_new, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                                window_size=(-1, -1), softcap=0.0):
            assert k_new is v_new is None
            return *run_forward(q, k, v, softmax_scale, causal, window_size, cu_seqlens_q, cu_seqlens_k), None

        def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dq, dk, dv,
                                 softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False):
            write(
                (dq, dk, dv), run_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, window_size, cu_seqlens_q, cu_seqlens_k)
            )
            return dq, dk, dv, None

        return types.SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)

    def dense_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert alibi_slopes is None and dropout_p == 0
        return *run_forward(q, k, v, softmax_scale, causal, (window_size_left, window_size_right)), None, None

    def packed_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    ):
        return *run_forward(q, k, v, softmax_scale, causal, (window_size_left, window_size_right), cu_seqlens_q, cu_seqlens_k), None, None

    def dense_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
                       softcap, alibi_slopes, deterministic, rng_state=None):
        write((dq, dk, dv), run_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, (window_size_left, window_size_right)))

    def packed_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
        window = (window_size_left, window_size_right)
        write((dq, dk, dv), run_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, window, cu_seqlens_q, cu_seqlens_k))

    return types.SimpleNamespace(_flash_attn_forward=dense_forward, _flash_attn_backward=dense_backward,
                                 _flash_attn_varlen_forward=packed_forward, _flash_attn_varlen_backward=packed_backward)


@pytest.mark.parametrize("version", flash_attn.PACKAGES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": (7, 0)}, {"window_size": (9, 3), "causal": False},
                                     {"cu_seqlens_q": torch.tensor([0, 12, 13, 40]), "cu_seqlens_k": torch.tensor([0, 20, 30, 70])}])
def test_flash_attn_packages_are_called_by_their_signatures(version, options):
    backend, functions = flash_attn.BACKENDS[version], stand_in(version)
    x = {name: torch.randn(1, n, h, 16, dtype=torch.float64) for name, n, h in (("q", 40, 4), ("k", 70, 2), ("v", 70, 2), ("dout", 40, 4))}
    x["sink_logits"] = None
    call = checked_call(x["q"], x["k"], x["v"], **({"causal": True} | options))
    for name in {*backend.package.dense, *backend.package.packed}:
        assert flash_attn.unknown_signature(getattr(functions, name), name, call) is None
    found = run(call, backend.library(functions), x, torch.zeros_like(x["k"]), torch.zeros_like(x["v"]))
    assert_close(found, of_reference(call, x), 1e-12)


def test_an_unknown_release_of_flash_attn_is_refused_by_what_it_lacks():
    call = call_of(8, 8, deterministic=True)
    assert "no softmax_scale" in flash_attn.unknown_signature(lambda q, k, v, causal: None, "f", call)
    assert "no deterministic" in flash_attn.unknown_signature(lambda dout, q, k, v, softmax_scale, causal: None, "f", call)
    assert "has no f" in flash_attn.unknown_signature(None, "f", call)


def test_arguments_behind_a_custom_op_are_seen():
    @torch.library.custom_op("longtrain_test::takes_scale", mutates_args=())
    def takes_scale(q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        return q * softmax_scale

    assert list(flash_attn._parameters(takes_scale)) == ["q", "softmax_scale"]
    assert flash_attn._call(takes_scale, q=torch.ones(2), softmax_scale=3.0, causal=True).tolist() == [3, 3]


# --- choosing ------------------------------------------------------------------------------------------------------------------------


def on_gpu(call):
    return replace(call, device=torch.device("cuda"))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"partials": "fp32"}, "returns bfloat16 partial results"),
        ({"softcap": 3.0}, None),
        ({"dropout_p": 0.1, "dropout_seed": 1}, "no counter-based dropout"),
        ({"sink_tokens": 2}, "no sink tokens"),
        ({"scale": -1.0}, "positive scales"),
        ({}, None),
    ],
)
def test_options_that_libraries_do_not_have(options, reason):
    found = flash.refuse_options(call_of(16, 32, **options))
    assert found is reason is None or reason in found


@pytest.mark.parametrize("options, reason", [({}, None), ({"window_size": (3, 0)}, "no windows"), ({"window_size": (40, 0)}, None),
                                             ({"softcap": 1.0}, "no softcap"), ({"deterministic": True}, "in no fixed order")])
def test_shapes_that_cudnn_does_not_take(options, reason):
    found = cudnn.refuse_shape(call_of(16, 32, **options))
    assert found is reason is None or reason in found


def test_float32_partials_leave_the_libraries_out():
    assert flash.refuse_options(on_gpu(call_of(16, 32))) is None
    refused = flash.refuse_options(on_gpu(call_of(16, 32, partials="fp32")))
    assert refused == "returns bfloat16 partial results, and partials='fp32' was asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpus_fall_to_plain_torch_is_an_error_unless_it_is_allowed():
    call = on_gpu(call_of(16, 32))  # no GPU here: every kernel for one refuses
    with pytest.raises(ValueError, match="more than ten times slower.*kernel_fallback='warn' or backend='tiled'"):
        select.select(call, "auto")
    with pytest.warns(UserWarning, match="more than ten times slower"):
        assert select.select(call, "auto", "warn") is select.BACKENDS["tiled"]
    assert select.select(call, "tiled") is select.BACKENDS["tiled"]
    assert select.select(on_gpu(call_of(16, 32, dtype=torch.float64)), "auto") is select.BACKENDS["tiled"]  # proofs
    found = select.explain_call(call)
    assert found.chosen == "tiled" and "plain torch" in found.fallback and "plain torch" in str(found)
    assert found.refusals["cudnn"] == found.refusals["flash"] == "no GPU on this machine"


def test_explain_tells_who_differentiates_the_lse():
    x = dict(q=torch.empty(1, 16, 2, 8), k=torch.empty(1, 32, 2, 8), v=torch.empty(1, 32, 2, 8), causal=True)
    assert "not by sdpa (its backward takes no gradient of the LSE)" in str(explain(**x, backend="sdpa"))
    found = explain(**x)
    assert found.lse_gradient == found.chosen or f"not by {found.chosen}" in found.lse_gradient
    assert "FlexAttention" in found.refusals["flex"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"partials": "fp16"}, "partials: found 'fp16', expected 'bf16' or 'fp32'"),
        ({"kernel_fallback": "silent"}, "kernel_fallback: found 'silent', expected 'error' or 'warn'"),
        ({"backend": "flex"}, "it refuses this call .FlexAttention"),
    ],
)
def test_wrong_choices_are_named(options, message):
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, causal=True, **options)
