"""Layers of the user's own: any mixer, several mixers, random numbers, extra arguments; and those that must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longtrain as lt
from longtrain.ops import attention
from longtrain.ops.mixers import AttentionMixer, LongConvMixer
from longtrain.span import Layout, chunk_spans
from tests.stream.conftest import assert_same

pytestmark = pytest.mark.usefixtures("float64")

WIDTH, TOKENS = 12, 37


class Base(nn.Module):
    """Two heads of attention between two token-local parts; what differs is overridden."""

    token_args: dict[str, int] = {}
    mixer = AttentionMixer()

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def mixers(self, **arguments):
        return (self.mixer,)

    def example(self, tokens: int):
        return torch.randn(1, tokens, WIDTH), {}

    def qkv(self, x: Tensor) -> list[Tensor]:
        return list(self.before(x).unflatten(-1, (2, -1)).chunk(3, dim=-1))

    def forward(self, x: Tensor, *, mix=None, **arguments) -> Tensor:
        mix = mix or self.mixers(**arguments)[0]
        return x + self.after(mix(*self.qkv(x)).flatten(-2)).tanh()


class Bidirectional(Base):
    mixer = AttentionMixer(causal=False)


class BidirectionalDocuments(Base):
    mixer = AttentionMixer(causal=False, documents=Layout.make(TOKENS, [0, 5, 30, TOKENS]))

    def example(self, tokens: int):
        return torch.randn(1, TOKENS, WIDTH), {}


class LooksAhead(Base):
    mixer = AttentionMixer(causal=False, window_size=(6, 2))


class SinksAndSoftcap(Base):
    mixer = AttentionMixer(window_size=(4, 0), sink_tokens=2, softcap=1.5, scale=0.7)


class Convolution(Base):
    def __init__(self) -> None:
        super().__init__()
        self.decay, self.skip = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def mixers(self, **arguments):
        taps = torch.exp(-self.decay[:, None] * torch.arange(50))  # longer than the sequence
        return (LongConvMixer(filter=taps, skip=self.skip, group_channels=5),)

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        mix = mix or self.mixers()[0]
        u, gate_in, gate_out = self.before(x).chunk(3, dim=-1)
        return x + self.after(mix(u, gate_in, gate_out))


class TwoMixers(Base):
    """Attention, then attention over its result."""

    def mixers(self, **arguments):
        return (self.mixer, AttentionMixer(window_size=(3, 0)))

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        first, second = (mix, mix) if mix is not None else self.mixers()
        x = x + self.after(first(*self.qkv(x)).flatten(-2))
        return x + self.after(second(*self.qkv(x)).flatten(-2)).sin()


class TwoMixersOneAhead(TwoMixers):
    def mixers(self, **arguments):
        return (self.mixer, AttentionMixer(causal=False))


class Conditioned(Base):
    """A token-wise and a global argument, both of which want gradients; the token axis of the former comes first."""

    token_args = {"bias": 0}

    def example(self, tokens: int):
        return torch.randn(1, tokens, WIDTH), {"bias": torch.randn(tokens, WIDTH), "scale": torch.randn(WIDTH)}

    def forward(self, x: Tensor, *, bias: Tensor, scale: Tensor, mix=None) -> Tensor:
        return super().forward(x * scale + bias, mix=mix)


class SumOfWeights(Base):
    """Two weights that occur only as their sum: autograd gives the very tensor that is one's gradient to the other, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return super().forward(x * (self.one + self.other), mix=mix)


class DecayCarry:
    """state_t = decay state_{t-1} + w_t; out_t = q_t state_t: a mixer with a state of fixed size, by the same contract."""

    def __init__(self, decay: float) -> None:
        self.decay, self.state, self.entry, self.dstate, self.sequence = decay, 0, {}, 0, {}

    class spec:
        kind, tensors, bytes_per_token, adjoint_bytes_per_token = "state", ("w",), 0, 0

    def append(self, span, w):
        self.entry[span], self.sequence[span] = self.state, []
        for t in range(len(span)):
            self.state = self.decay * self.state + w[:, t]
            self.sequence[span].append(self.state)

    def mix(self, span, q, stored):
        if stored is not None:
            return stored
        (key,) = [s for s in self.sequence if s.start <= span.start and span.stop <= s.stop]
        states = self.sequence[key][span.start - key.start : span.stop - key.start]
        return q * torch.stack(states, 1), None

    def mix_vjp(self, span, q, out, lse, dout):
        states, self.dw = torch.stack(self.sequence[span], 1), torch.empty_like(q)
        for t in reversed(range(len(span))):
            self.dstate = self.dstate + dout[:, t] * q[:, t]
            self.dw[:, t] = self.dstate
            self.dstate = self.decay * self.dstate
        return dout * states

    def take_grad(self, span):
        return (self.dw,)


class DecayMixer:
    causal = True

    def make_carry(self, spans):
        return DecayCarry(0.8)

    def __call__(self, q, w):
        powers = torch.arange(q.shape[1])
        lower = torch.tril(0.8 ** (powers[:, None] - powers).clamp_min(0))
        return q * torch.einsum("ts,bse->bte", lower, w)


class Recurrent(Base):
    mixer = DecayMixer()

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        q, w, gate = self.before(x).chunk(3, dim=-1)
        return x + self.after((mix or self.mixer)(q, w) * gate)


def stack_of(kind: type[Base], layers: int = 2) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(kind() for _ in range(layers))
    return model


def run(model: nn.Module, x: Tensor, **arguments) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    leaves = {"x": x.clone().requires_grad_(), **{k: v.clone().requires_grad_() for k, v in arguments.items()}}
    y = leaves["x"]
    for layer in model.layers:
        y = layer(y, **{k: leaves[k] for k in arguments})
    y.sin().sum().backward()
    return y.detach(), {**{k: v.grad for k, v in leaves.items()}, **{n: p.grad.clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 100])
@pytest.mark.parametrize(
    "kind",
    [
        Base,
        SinksAndSoftcap,
        TwoMixers,
        Conditioned,
        SumOfWeights,
        Recurrent,
        Bidirectional,
        BidirectionalDocuments,
        LooksAhead,
        Convolution,
        TwoMixersOneAhead,
    ],
)
def test_any_layer_streams_exactly(kind, chunk_tokens, boundaries):
    model = stack_of(kind)
    x, arguments = torch.randn(2 if kind is not BidirectionalDocuments else 1, TOKENS, WIDTH), {}
    if kind is Conditioned:
        arguments = {"bias": torch.randn(TOKENS, WIDTH), "scale": torch.randn(WIDTH)}
    y, grads = run(model, x, **arguments)
    for store_outputs, store_kv in [(1.0, 0.0), (0.0, 0.0), (0.5, 0.6), (0.0, 1.0)]:
        report = lt.apply(model, lt.Plan(chunk_tokens=chunk_tokens, store_outputs=store_outputs, store_kv=store_kv, boundaries=boundaries))
        streamed_y, streamed = run(model, x, **arguments)
        report.undo()
        assert (streamed_y - y).norm() <= 1e-12 * y.norm()
        assert_same(streamed, grads)
        assert report._chains[0].store.names() == []


class Noisy(Base):
    """Dropout from the generator, before and after the mixer."""

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return F.dropout(super().forward(F.dropout(x, 0.3, self.training), mix=mix), 0.2, self.training)


@pytest.mark.parametrize("segment_layers", [1, 2])
@pytest.mark.parametrize("store_outputs, store_kv", [(1.0, 0.0), (0.4, 0.6), (0.0, 1.0)])
def test_random_numbers_are_replayed_and_the_generator_put_back(segment_layers, store_outputs, store_kv):
    model, x, chunk = stack_of(Noisy), torch.randn(1, TOKENS, WIDTH), 9
    lt.apply(model, lt.Plan(chunk_tokens=chunk, segment_layers=segment_layers, store_outputs=store_outputs, store_kv=store_kv))
    torch.manual_seed(3)
    y, grads = run(model, x)
    after = torch.rand(())

    # The same draws in the same order, but one ordinary graph: keys and values of the prefix joined with theirs.
    plain = stack_of(Noisy)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    spans, seen = chunk_spans(TOKENS, chunk), [([], []) for _ in plain.layers]
    hidden = [leaf[:, s.slice()] for s in spans]

    def prefix(layer: int):
        def mix(q, k, v):
            keys, values = seen[layer]
            keys.append(k)
            values.append(v)
            return attention(q, torch.cat(keys, 1), torch.cat(values, 1), causal=True)

        return mix

    order = (
        [(i, j) for i in range(len(spans)) for j in range(2)]
        if segment_layers == 2
        else [(i, j) for j in range(2) for i in range(len(spans))]
    )
    for i, j in order:
        hidden[i] = plain.layers[j](hidden[i], mix=prefix(j))
    torch.cat(hidden, 1).sin().sum().backward()
    assert (torch.cat(hidden, 1) - y).norm() <= 1e-12 * y.norm()
    assert_same(grads, {"x": leaf.grad, **{n: p.grad for n, p in plain.named_parameters()}})
    assert after == torch.rand(())


class NoisyAhead(Base):
    mixer = AttentionMixer(causal=False)

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return self.dropout(super().forward(self.dropout(x), mix=mix))


@pytest.mark.parametrize("layer_trains", [True, False])
def test_two_passes_draw_one_mask(layer_trains):
    model, x = stack_of(NoisyAhead, 1), torch.randn(1, TOKENS, WIDTH)
    model.layers[0].training = layer_trains  # the dropout inside trains in either case
    lt.apply(model, lt.Plan(chunk_tokens=9))
    torch.manual_seed(5)
    base, grads = run(model, x)
    step, direction = 1e-6, torch.randn_like(x)
    losses = []
    for sign in (1, -1):
        torch.manual_seed(5)
        losses.append(run(model, x + sign * step * direction)[0].sin().sum())
    numeric = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close((grads["x"] * direction).sum(), numeric, rtol=1e-6, atol=1e-8)


class MeanOverTokens(Base):
    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return super().forward(x, mix=mix) + x.mean(dim=1, keepdim=True)


class HiddenConvolution(Base):
    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1], mix=mix)


class DetachedPast(Base):
    """Right values, wrong gradients in chunks only if the proof looked at outputs alone."""

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        scale = 1 + x.detach()[:, :1] * 0 + (x[:, :1] - x[:, :1].detach())
        return super().forward(x * scale, mix=mix)


class CallsMixTwice(Base):
    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return super().forward(super().forward(x, mix=mix), mix=mix)


class NeverMixes(Base):
    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return x + self.after(x)


@pytest.mark.parametrize("kind", [MeanOverTokens, HiddenConvolution, DetachedPast, CallsMixTwice, NeverMixes])
def test_a_layer_that_is_not_what_it_seems_is_refused(kind):
    model = stack_of(kind, 1)
    with pytest.raises(ValueError, match="layers.0 cannot be streamed"):
        lt.apply(model, lt.Plan(chunk_tokens=8))
    assert "forward" not in model.layers[0].__dict__


def test_an_unstreamed_layer_between_streamed_ones():
    model = stack_of(Base, 5)
    model.layers[2] = MeanOverTokens()
    x = torch.randn(1, TOKENS, WIDTH)
    y, grads = run(model, x)
    report = lt.apply(model, lt.Plan(chunk_tokens=8, segment_layers=2, layer_fallback="unstreamed"))
    assert "layers.2  left as it is: its output in chunks" in str(report)
    streamed_y, streamed = run(model, x)
    assert (streamed_y - y).norm() <= 1e-12 * y.norm()
    assert_same(streamed, grads)


@pytest.mark.parametrize("kind", [MeanOverTokens, HiddenConvolution])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_leaks_are_found_in_any_dtype(kind, dtype):
    with pytest.raises(ValueError, match="looks across tokens"):
        lt.apply(stack_of(kind, 1).to(dtype), lt.Plan(chunk_tokens=8))


class ChangesShape(Base):
    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        return super().forward(x, mix=mix)[..., :1]


class CountsCalls(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        self.calls += 1
        return super().forward(x, mix=mix)


@pytest.mark.parametrize("kind, why", [(ChangesShape, "must keep their shape"), (CountsCalls, "changes its buffers")])
def test_layers_that_cannot_run_in_chunks(kind, why):
    with pytest.raises(ValueError, match=why):
        lt.apply(stack_of(kind, 1), lt.Plan(chunk_tokens=8))


class NormOfTheBatch(Base):
    """Over all tokens, while it trains."""

    def __init__(self, statistics: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=statistics)

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        y = super().forward(x, mix=mix)
        return y + (self.norm(y.mT).mT if self.training or self.norm.track_running_stats else 0)


class DropsAndScales(Base):
    """Something else while it trains, token by token; and dropout, which is no reason."""

    def forward(self, x: Tensor, *, mix=None) -> Tensor:
        y = super().forward(F.dropout(x, 0.5, training=self.training), mix=mix)
        return 2 * y if self.training else y


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("statistics, why", [(True, "changes its buffers in forward.*while it trains: norm"),
                                             (False, "while it trains its output")])
def test_a_layer_that_looks_across_tokens_while_it_trains_is_refused(statistics, why, trains):
    model = stack_of(lambda: NormOfTheBatch(statistics), 1).train(trains)
    with pytest.raises(ValueError, match=why):
        lt.apply(model, lt.Plan(chunk_tokens=8))


def test_dropout_is_no_reason_to_refuse_a_layer():
    lt.apply(stack_of(DropsAndScales, 1), lt.Plan(chunk_tokens=8))


def test_a_refused_model_is_left_as_it_was():
    model = stack_of(Base)
    model.others = nn.ModuleList([MeanOverTokens()])
    model.layers[0].after.eval()
    with pytest.raises(ValueError, match="others.0"):
        lt.apply(model, lt.Plan(chunk_tokens=8))
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    del model.others
    lt.apply(model, lt.Plan(chunk_tokens=8))
    assert model.layers[0].training and not model.layers[0].after.training


def test_nothing_to_stream_is_refused_even_with_the_fallback():
    with pytest.raises(ValueError, match="no layer of Module can be streamed"):
        lt.apply(stack_of(MeanOverTokens), lt.Plan(chunk_tokens=8, layer_fallback="unstreamed"))


def test_a_layer_used_twice_is_refused():
    model = nn.Module()
    layer = Base()
    model.layers = nn.ModuleList([layer, layer])
    with pytest.raises(ValueError, match="layers.1 is the same module as layers.0"):
        lt.apply(model, lt.Plan(chunk_tokens=8))


@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
def test_a_skipped_layer_of_a_segment_is_refused(boundaries):
    model = stack_of(Base, 4)
    lt.apply(model, lt.Plan(chunk_tokens=8, segment_layers=2, boundaries=boundaries))
    x = torch.randn(1, TOKENS, WIDTH)
    with pytest.raises(RuntimeError, match="not all of them were called"):
        model.layers[2](model.layers[0](x))
    with pytest.raises(RuntimeError, match="not all of them were called"):
        model.layers[1](x)


@pytest.mark.parametrize("boundaries", ["stream", "tensor"])
def test_layers_of_a_segment_are_given_the_same(boundaries):
    model = stack_of(Conditioned, 2)
    lt.apply(model, lt.Plan(chunk_tokens=8, segment_layers=2, boundaries=boundaries))
    x, bias, scale = torch.randn(1, TOKENS, WIDTH), torch.randn(TOKENS, WIDTH), torch.randn(WIDTH)
    first, second = model.layers
    for changed in (scale + 1, scale.clone().requires_grad_()):  # of the latter, equal as it is, the gradient would be lost
        y = first(x, bias=bias, scale=scale)
        with pytest.raises(RuntimeError, match="given other hidden states or arguments"):
            second(y, bias=bias, scale=changed)
    y = first(x, bias=bias, scale=scale)
    with pytest.raises(RuntimeError, match="given other hidden states or arguments"):
        second(y.clone(), bias=bias, scale=scale)
    second(first(x, bias=bias, scale=scale), bias=bias.clone(), scale=scale)  # equal, and no gradient is wanted: the same


def test_apply_twice_and_undo():
    model = stack_of(Base)
    report = lt.apply(model, lt.Plan(chunk_tokens=8))
    with pytest.raises(ValueError, match="undo"):
        lt.apply(model, lt.Plan(chunk_tokens=8))
    names = [name for name, _ in model.named_parameters()]
    report.undo()
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert names == [name for name, _ in model.named_parameters()]


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="StreamableLayer"):
        lt.apply(nn.Linear(2, 2), lt.Plan(chunk_tokens=8))


@pytest.mark.parametrize(
    "x, arguments, message",
    [
        (torch.zeros(3, WIDTH), {}, "hidden states"),
        (torch.zeros(1, 0, WIDTH), {"bias": torch.zeros(0, WIDTH), "scale": torch.zeros(WIDTH)}, "at least one token"),
        (torch.zeros(0, 9, WIDTH), {"bias": torch.zeros(9, WIDTH), "scale": torch.zeros(WIDTH)}, "leave empty batches out"),
        (torch.zeros(1, 9, WIDTH), {"bias": torch.zeros(8, WIDTH), "scale": torch.zeros(WIDTH)}, "9 tokens"),
        (torch.zeros(1, 9, WIDTH), {"mix": lambda *x: x}, "without mix"),
    ],
)
def test_wrong_arguments_of_a_streamed_layer(x, arguments, message):
    model = stack_of(Conditioned)
    lt.apply(model, lt.Plan(chunk_tokens=4))
    with pytest.raises(ValueError, match=message):
        model.layers[0](x.double(), **arguments)


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(chunk_tokens=0), "chunk_tokens"),
        (dict(chunk_tokens=8.0), "chunk_tokens"),
        (dict(chunk_tokens=8, segment_layers=0), "segment_layers"),
        (dict(chunk_tokens=8, store_outputs=1.5), "store_outputs"),
        (dict(chunk_tokens=8, store_kv=(0.5, -1)), "store_kv"),
        (dict(chunk_tokens=8, boundaries="disk"), "boundaries"),
        (dict(chunk_tokens=8, layer_fallback="ignore"), "layer_fallback"),
        (dict(chunk_tokens=8, loss_chunk_tokens=0), "loss_chunk_tokens"),
    ],
)
def test_wrong_plans(settings, name):
    with pytest.raises(ValueError, match=name):
        lt.Plan(**settings)


def test_a_plan_for_another_number_of_layers():
    with pytest.raises(ValueError, match="names 3 layers, the model has 2"):
        lt.apply(stack_of(Base), lt.Plan(chunk_tokens=8, store_outputs=(0.1, 0.2, 0.3)))
