"""Large-chunk test-time training against a loop that takes the gradients by autograd, and its cuts."""

import pytest
import torch
import torch.nn.functional as F

from longtrain.ops.lact import cuts, lact
from longtrain.span import Layout, Span

F64 = torch.float64
EPS = 1e-5


def network(weights, x):
    first, third, second = weights
    return (F.silu(x @ first.T) * (x @ third.T)) @ second


def by_loops(q, k, v, rates, weights, chunk, momentum):
    """The definition, one row and head at a time: gradients of the loss by autograd, once a chunk."""
    outs = torch.empty_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            now, moving = list(weights[h]), [torch.zeros_like(w) for w in weights[h]]
            norms = [now[0].norm(dim=1, keepdim=True), now[1].norm(dim=1, keepdim=True), now[2].norm(dim=0, keepdim=True)]
            for start in range(0, q.shape[1], chunk):
                part = slice(start, start + chunk)
                outs[b, part, h] = network(now, q[b, part, h])
                steps = []
                for i in range(3):
                    leaf = [w.detach().clone().requires_grad_() for w in now]
                    loss = -(rates[b, part, h, i, None] * network(leaf, k[b, part, h]) * v[b, part, h]).sum()
                    steps.append(-torch.autograd.grad(loss, leaf[i])[0])
                moving = [momentum * m + g for m, g in zip(moving, steps)]
                now = [w + m for w, m in zip(now, moving)]
                now = [w * (n / (w.norm(dim=d, keepdim=True) + EPS)) for w, n, d in zip(now, norms, (1, 1, 0))]
    return outs


def make(T=23, B=2, H=2, D=4, inner=5):
    inputs = [torch.randn(B, T, H, D, dtype=F64) for _ in range(3)] + [torch.rand(B, T, H, 3, dtype=F64)]
    return [*inputs, torch.randn(H, 3, inner, D, dtype=F64)]


@pytest.mark.parametrize("T, chunk, momentum", [(23, 5, 0.0), (23, 5, 0.7), (1, 5, 0.5), (10, 5, 0.5), (4, 1, 0.9)])
def test_it_is_gradient_descent_once_a_chunk(T, chunk, momentum):
    inputs = make(T=T)
    out, _ = lact(None, *inputs, span=Span(0, T), chunk_tokens=chunk, momentum=momentum)
    torch.testing.assert_close(out, by_loops(*inputs, chunk, momentum), rtol=1e-12, atol=1e-12)


def test_its_gradients_are_those_of_finite_differences():
    inputs = make(T=7, B=1, H=1, D=2, inner=3)
    torch.autograd.gradcheck(lambda *x: lact(None, *x, span=Span(0, 7), chunk_tokens=3, momentum=0.5), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("edges", [(0, 23), (0, 0, 6, 7, 23), (0, 1, 13, 23)])
@pytest.mark.parametrize("stop", [1, 4, 13, 20])
def test_a_sequence_in_two_calls_is_the_sequence(edges, stop):
    inputs, layout = make(), Layout.make(23, edges)
    settings = dict(chunk_tokens=4, momentum=0.5, documents=layout)
    whole, last = lact(None, *inputs, span=Span(0, 23), **settings)
    *tokens, weights = inputs
    first, state = lact(None, *(t[:, :stop] for t in tokens), weights, span=Span(0, stop), **settings)
    second, state = lact(state, *(t[:, stop:] for t in tokens), weights, span=Span(stop, 23), **settings)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    assert state.shape == (2, 2, 3, 3, 5, 4)


def test_tokens_of_a_chunk_do_not_see_each_other_and_later_ones_see_them():
    *tokens, weights = make(T=12, B=1)
    out, _ = lact(None, *tokens, weights, span=Span(0, 12), chunk_tokens=4)
    tokens[2] = tokens[2].clone()
    tokens[2][0, 5] += 1.0  # a value of the second chunk
    changed, _ = lact(None, *tokens, weights, span=Span(0, 12), chunk_tokens=4)
    assert (out != changed).any(-1).any(-1)[0].tolist() == [False] * 8 + [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_compute_in_float32(dtype):
    inputs = [t.to(dtype) for t in make(T=60, D=16, inner=16)]
    out, state = lact(None, *inputs, span=Span(0, 60), chunk_tokens=16, momentum=0.5)
    exact, _ = lact(None, *(t.double() for t in inputs), span=Span(0, 60), chunk_tokens=16, momentum=0.5)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert float((out.double() - exact).norm() / exact.norm()) < torch.finfo(dtype).eps + 2e-6


def test_cuts_count_from_each_document_s_first_token():
    def said(span, edges=None):
        return [(part.start, part.stop, event) for part, event in cuts(span, 4, edges and Layout.make(edges[-1], edges))]

    assert said(Span(0, 9)) == [(0, 4, "begin"), (4, 8, "update"), (8, 9, "update")]
    assert said(Span(6, 9)) == [(6, 8, None), (8, 9, "update")]
    assert said(Span(3, 12), (0, 5, 5, 12)) == [(3, 4, None), (4, 5, "update"), (5, 9, "begin"), (9, 12, "update")]
    assert said(Span(5, 9), (0, 5, 12)) == [(5, 9, "begin")]
