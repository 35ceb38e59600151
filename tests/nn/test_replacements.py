"""lt.nn's replacements against torch's own modules: same keys, same numbers, forward and backward, in float64; and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import longtrain as lt

EXACT = 1e-12


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pair(name, *args, **kwargs):
    """torch's module and ours, with the weights of the first."""
    theirs, ours = (getattr(where, name)(*args, **kwargs) for where in (nn, lt.nn))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(module, call, *inputs):
    """Output and gradients by inputs and parameters, of a weighted sum of the output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    y = call(module, *leaves)
    (y * torch.sin(torch.arange(y.numel()).view(y.shape))).sum().backward()
    return {
        "output": y.detach(),
        **{f"input {i}": x.grad for i, x in enumerate(leaves)},
        **{n: p.grad for n, p in module.named_parameters()},
    }


def assert_same(theirs, ours, *inputs, call=lambda module, *x: module(*x), own_call=None):
    expected, found = outcome(theirs, call, *inputs), outcome(ours, own_call or call, *inputs)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.shape == found[name].shape and value.dtype == found[name].dtype
        assert (found[name] - value).norm() <= EXACT * max(float(value.norm()), 1.0), name


causal = lambda t, s: torch.ones(t, s, dtype=torch.bool).triu(1)
band = lambda t, s, left, right: ~(torch.ones(t, s, dtype=torch.bool).triu(-left) & torch.ones(t, s, dtype=torch.bool).tril(right))
minus_infinity = lambda hidden: torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


def padded(*lengths, left=False):
    mask = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask


CALLS = {
    "everything": dict(),
    "one token": dict(tokens=1),
    "bool mask": dict(attn_mask=causal(9, 9)),
    "float mask": dict(attn_mask=minus_infinity(causal(9, 9))),
    "lowest number": dict(attn_mask=torch.zeros(9, 9).masked_fill(causal(9, 9), torch.finfo(torch.float32).min)),
    "mask and hint": dict(attn_mask=causal(9, 9), is_causal=True),
    "window": dict(attn_mask=band(9, 9, 2, 0)),
    "two-sided window": dict(attn_mask=band(9, 9, 2, 3)),
    "a mask for every head": dict(attn_mask=causal(9, 9).expand(8, 9, 9)),
    "padding": dict(key_padding_mask=padded(9, 5)),
    "left padding": dict(key_padding_mask=padded(9, 5, left=True)),
    "float padding": dict(key_padding_mask=minus_infinity(padded(9, 5))),
    "padding and mask": dict(key_padding_mask=padded(9, 5), attn_mask=causal(9, 9)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(name, batch_first):
    options = dict(CALLS[name])
    tokens = options.pop("tokens", 9)
    theirs, ours = pair("MultiheadAttention", 16, 4, batch_first=batch_first)
    x = torch.randn(2, tokens, 16) if batch_first else torch.randn(tokens, 2, 16)
    assert_same(theirs, ours, x, call=lambda m, x: m(x, x, x, need_weights=False, **options)[0])


@pytest.mark.parametrize("changes", [dict(), dict(bias=False), dict(kdim=6, vdim=10), dict(add_zero_attn=True)], ids=str)
@pytest.mark.parametrize("mask", [None, causal(7, 5), band(7, 5, 3, 1)], ids=["all", "causal", "window"])
def test_cross_attention(changes, mask):
    theirs, ours = pair("MultiheadAttention", 16, 4, batch_first=True, **changes)
    inputs = torch.randn(2, 7, 16), torch.randn(2, 5, changes.get("kdim", 16)), torch.randn(2, 5, changes.get("vdim", 16))
    # torch lets the zero key be seen through any mask, which a sink logit is as well
    assert_same(theirs, ours, *inputs, call=lambda m, q, k, v: m(q, k, v, attn_mask=mask, need_weights=False)[0])


def test_unbatched_input_and_a_shared_key():
    theirs, ours = pair("MultiheadAttention", 16, 4)
    call = lambda m, q, k: m(q, k, k, key_padding_mask=torch.tensor([False, False, False, True]), need_weights=False)[0]
    assert_same(theirs, ours, torch.randn(5, 16), torch.randn(4, 16), call=call)


def test_packed_documents_are_a_block_diagonal_mask():
    theirs, ours = pair("MultiheadAttention", 16, 4, batch_first=True)
    edges = torch.tensor([0, 4, 5, 11])
    document = torch.bucketize(torch.arange(11), edges[1:], right=True)
    mask = causal(11, 11) | (document[:, None] != document)
    assert_same(theirs, ours, torch.randn(1, 11, 16), call=lambda m, x: m(x, x, x, attn_mask=mask, need_weights=False)[0],
                own_call=lambda m, x: m(x, x, x, is_causal=True, cu_seqlens=edges)[0])


def test_attention_dropout_keeps_the_mean_and_follows_the_seed():
    _, ours = pair("MultiheadAttention", 8, 2, dropout=0.4, batch_first=True)
    x, mask = torch.randn(2, 6, 8), padded(6, 4)
    with torch.no_grad():
        run = lambda seed: (torch.manual_seed(seed), ours(x, x, x, key_padding_mask=mask)[0])[1]
        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
        drawn = torch.stack([run(seed) for seed in range(200)])
        expected = ours.eval()(x, x, x, key_padding_mask=mask)[0]
    # a mean of 200 draws: five deviations of it
    assert ((drawn.mean(0) - expected).abs() <= 5 * drawn.std(0) / 200**0.5).all()


HOLES = torch.tensor([[False, True, False]])


@pytest.mark.parametrize(
    "changes, options, message",
    [
        (dict(add_bias_kv=True), {}, "add_bias_kv=True cannot be honoured"),
        ({}, dict(need_weights=True), "never formed; leave need_weights off"),
        ({}, dict(key_padding_mask=HOLES), "row 0 has padding inside"),
        ({}, dict(attn_mask=torch.eye(3)), "finite biases"),
        ({}, dict(attn_mask=torch.eye(3, dtype=torch.bool)), "no band next to the diagonal .query 0 sees 2 keys from 1 to 2"),
        ({}, dict(attn_mask=torch.ones(3, 3, dtype=torch.bool)), "no band next to the diagonal .query 0 sees 0 keys"),
        (
            {},
            dict(attn_mask=torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 0]]).bool()),
            "no band next to the diagonal .query 2 sees 2 keys from 0 to 2",
        ),
        ({}, dict(attn_mask=torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]).bool()), "no band next to the diagonal"),
        ({}, dict(attn_mask=causal(3, 3).mT, is_causal=True), "shows keys after the query|no band"),
        ({}, dict(attn_mask=causal(4, 4)), r"must be \[T, S\] = \[3, 3\]"),
        ({}, dict(attn_mask=torch.stack([causal(3, 3), torch.zeros(3, 3, dtype=torch.bool)])), "differs between rows or heads"),
    ],
    ids=str,
)
def test_what_attention_cannot_honour_is_refused(changes, options, message):
    ours = lt.nn.MultiheadAttention(8, 2, batch_first=True, **changes)
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match=message):
        ours(x, x, x, **options)


LAYERS = dict(d_model=16, nhead=4, dim_feedforward=24, dropout=0.0)
STYLES = [dict(), dict(norm_first=True), dict(activation="gelu", bias=False, batch_first=True), dict(batch_first=True, layer_norm_eps=1e-3)]


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_of_such_layers(style, training):
    """In torch's own stack, with its masks and padding; in evaluation torch has kernels and nested tensors of its own."""
    layers = [getattr(where, "TransformerEncoderLayer")(**LAYERS, **style) for where in (nn, lt.nn)]
    theirs, ours = (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training) for layer in layers)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 16) if style.get("batch_first") else torch.randn(9, 2, 16)
    for options in (dict(), dict(mask=causal(9, 9)), dict(mask=causal(9, 9), is_causal=True), dict(src_key_padding_mask=padded(9, 6))):
        assert_same(theirs, ours, x, call=lambda m, x: m(x, **options))


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_a_decoder_of_such_layers(style):
    layers = [getattr(where, "TransformerDecoderLayer")(**LAYERS, **style) for where in (nn, lt.nn)]
    theirs, ours = (nn.TransformerDecoder(layer, 2) for layer in layers)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    shape = (lambda b, t: (b, t, 16)) if style.get("batch_first") else (lambda b, t: (t, b, 16))
    inputs = torch.randn(shape(2, 9)), torch.randn(shape(2, 5))
    for options in (
        dict(),
        dict(tgt_mask=causal(9, 9), memory_key_padding_mask=padded(5, 3)),
        dict(tgt_mask=causal(9, 9), tgt_is_causal=True),
    ):
        assert_same(theirs, ours, *inputs, call=lambda m, x, memory: m(x, memory, **options))


@pytest.mark.parametrize("mask", [None, causal(23, 23), band(23, 23, 4, 0)], ids=["two-sided", "causal", "window"])
@pytest.mark.parametrize(
    "plan", [lt.Plan(chunk_tokens=8), lt.Plan(chunk_tokens=5, store_outputs=0.0, boundaries="tensor")], ids=["stream", "tensor"]
)
def test_streamed_stacks(mask, plan):
    """lt.apply on torch's encoder and decoder, made of these layers."""
    for stack, inputs in (("Encoder", (torch.randn(2, 23, 16),)), ("Decoder", (torch.randn(2, 23, 16), torch.randn(2, 5, 16)))):
        layer = getattr(lt.nn, f"Transformer{stack}Layer")(**LAYERS, batch_first=True, norm_first=True)
        options, plain = (dict(mask=mask), dict(enable_nested_tensor=False)) if stack == "Encoder" else (dict(tgt_mask=mask), {})
        model = getattr(nn, f"Transformer{stack}")(layer, 2, norm=nn.LayerNorm(16), **plain)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        expected = outcome(model, lambda m, *x: m(*x, **options), *inputs)
        report = lt.apply(model, plan)
        found = outcome(model, lambda m, *x: m(*x, **options), *inputs)
        assert len(report.entries) == 2 and all(entry.became == "streamed" for entry in report.entries)
        for name, value in expected.items():
            assert (found[name] - value).norm() <= EXACT * max(float(value.norm()), 1.0), (stack, name)


def test_what_a_streamed_layer_cannot_honour_is_refused():
    model = nn.TransformerEncoder(lt.nn.TransformerEncoderLayer(**LAYERS, batch_first=True), 2, enable_nested_tensor=False)
    lt.apply(model, lt.Plan(chunk_tokens=4))
    with pytest.raises(ValueError, match="pack the documents into one row"):
        model(torch.randn(2, 9, 16), src_key_padding_mask=padded(9, 6))
    with pytest.raises(ValueError, match=r"must be .* 9, 9.*found shape .5, 5"):
        model.layers[0](torch.randn(2, 9, 16), causal(5, 5))
    decoder = nn.TransformerDecoder(lt.nn.TransformerDecoderLayer(**LAYERS, batch_first=True), 1)
    lt.apply(decoder, lt.Plan(chunk_tokens=4))
    with pytest.raises(ValueError, match="memory_mask.*leave them out"):
        decoder(torch.randn(1, 9, 16), torch.randn(1, 5, 16), memory_mask=causal(9, 5))
    with pytest.raises(ValueError, match="batch_first=True"):
        lt.apply(nn.TransformerEncoder(lt.nn.TransformerEncoderLayer(**LAYERS), 2, enable_nested_tensor=False), lt.Plan(chunk_tokens=4))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_a_streamed_two_sided_layer_is_the_same_in_both_passes(training):
    """Its seed is drawn once a call: the loss moves along its own gradient as a linear function does."""
    layer = lt.nn.TransformerEncoderLayer(**LAYERS | dict(dropout=0.3), batch_first=True)
    layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0  # attention's alone
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
    lt.apply(model, lt.Plan(chunk_tokens=4))
    (x, direction, weights), step = torch.randn(3, 1, 9, 16), 1e-5

    def loss(x):
        torch.manual_seed(3)
        return (model(x) * weights).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((leaf.grad * direction).sum(), slope, rtol=1e-6, atol=0)


CONVOLUTIONS = [
    dict(kernel_size=1),
    dict(kernel_size=4),
    dict(kernel_size=5, padding=4),
    dict(kernel_size=5, padding=7),
    dict(kernel_size=23, padding=22),
    dict(kernel_size=6, padding="same"),
    dict(kernel_size=5, padding="valid", bias=False),
    dict(kernel_size=4, dilation=3, padding=9),
    dict(kernel_size=5, stride=3, padding=2),
    dict(kernel_size=5, padding=3, padding_mode="reflect"),
    dict(kernel_size=5, padding=3, padding_mode="circular"),
    dict(kernel_size=4, padding="same", padding_mode="replicate"),
    dict(kernel_size=3, out_channels=12, padding=1),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(options):
    theirs, ours = pair("Conv1d", **(dict(in_channels=6, out_channels=6, groups=6) | options))
    assert_same(theirs, ours, torch.randn(2, 6, 23))
    assert_same(theirs, ours, torch.randn(6, 29))


@pytest.mark.parametrize("make, shape, message", [
    (dict(groups=1), None, "give groups=in_channels, or use torch.nn.Conv1d"), (dict(groups=3), None, "does not mix channels"),
    (dict(groups=6), (2, 5, 23), r"must be \[B, 6, T\]"), (dict(groups=6), (2, 6, 3), "reaches over 4 tokens, and there are 3"),
])
def test_convolutions_that_are_refused(make, shape, message):
    with pytest.raises(ValueError, match=message):
        lt.nn.Conv1d(6, 6, 4, **make)(torch.randn(shape or (1, 6, 9)))


@pytest.mark.parametrize("options", [dict(), dict(eps=1e-3), dict(elementwise_affine=False)], ids=str)
def test_rms_norm(options):
    theirs, ours = pair("RMSNorm", 12, **options)
    assert_same(theirs, ours, torch.randn(2, 5, 12))
    theirs, ours = pair("RMSNorm", (3, 4), **options)
    assert_same(theirs, ours, torch.randn(2, 5, 3, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [dict(), dict(bias=False), dict(label_smoothing=0.2), dict(weighted=True), dict(ignore_index=5)], ids=str
)
def test_linear_and_cross_entropy(reduction, options):
    options = dict(options)
    weights = torch.rand(9) if options.pop("weighted", False) else None
    bias = options.pop("bias", True)
    ours = lt.nn.LinearCrossEntropy(8, 9, bias, class_weights=weights, reduction=reduction, chunk_tokens=4, **options)
    theirs, criterion = nn.Linear(8, 9, bias), nn.CrossEntropyLoss(weight=weights, reduction=reduction, **options)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    target = torch.randint(9, (2, 11))
    target[0, :3] = options.get("ignore_index", -100)
    x = torch.randn(2, 11, 8)
    assert_same(theirs, ours, x, call=lambda m, x: criterion(m(x).mT, target), own_call=lambda m, x: m(x, target))
    assert torch.equal(ours(x), theirs(x))


def test_losses_that_are_refused():
    with pytest.raises(ValueError, match="class_weights and label_smoothing"):
        lt.nn.LinearCrossEntropy(8, 9, class_weights=torch.ones(9), label_smoothing=0.1)
    with pytest.raises(ValueError, match="class probabilities are not taken"):
        lt.nn.LinearCrossEntropy(8, 9)(torch.randn(3, 8), torch.rand(3))


class Gated(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.gate_up, self.down, self.dropout = nn.Linear(8, 24), nn.Linear(12, 8), nn.Dropout(dropout)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.dropout(self.down(F.silu(gate) * up))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_token_local_module_by_chunks(chunk):
    theirs = Gated()
    ours = lt.nn.by_chunks(theirs, chunk)
    assert type(ours) is Gated and ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same(theirs, ours, torch.randn(2, 11, 8))
    theirs.down.weight.requires_grad_(False)
    x = torch.randn(2, 11, 8, requires_grad=True)
    ours.zero_grad()
    ours(x).sum().backward()
    assert ours.down.weight.grad is None and ours.gate_up.weight.grad is not None


def test_chunks_hold_less():
    """Of activations as wide as the hidden layer, one chunk's."""
    module, x, sizes = Gated(), torch.randn(1, 64, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        lt.nn.by_chunks(module, 4)(x)
    parameters = sum(p.numel() for p in module.parameters())
    assert sum(sizes) <= x.numel() + parameters


@pytest.mark.parametrize("module, message", [
    (nn.Sequential(nn.Linear(8, 8), nn.Softmax(1)), "it looks across tokens"), (Gated(0.5), "draws random numbers"),
    (nn.Sequential(nn.Linear(8, 8), nn.Flatten()), r"gives out \[1, 104\]"), (nn.SiLU(), "give features="),
], ids=["mixes", "dropout", "shape", "no width"])
def test_modules_that_cannot_run_by_chunks(module, message):
    with pytest.raises(ValueError, match=message):
        lt.nn.by_chunks(module, 4)
