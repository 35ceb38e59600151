"""Weights kept in 8 or 4 bits beside adapters: what the layer computes, that it streams, and adapters that are trained on."""

import hf_families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import longtrain as lt
from longtrain.nn.replacements.frozen import BLOCK, FrozenLinear, dequantized, normal_levels, quantized
from longtrain.stream.work import Alive

PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)
FORMATS = ["int8", "float8", "nf4"]
# Largest error of one weight, in its block's largest magnitude: half a step of 1 / 127; half of 2^-3 of a number up to the largest; half of
# the widest gap between two levels, which is that between the two lowest.
STEP = {"int8": 0.5 / 127, "float8": 2**-4, "nf4": 0.5 * (1 - 0.6961)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(5, 2 * BLOCK), (7, 30), (1, BLOCK)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_within_half_a_step_and_codes_are_small(format, shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-4, 4, shape[0])[:, None]).to(dtype)
    codes, scale = quantized(weight, format)
    whole = dequantized(codes, scale, format)
    blocks = weight.float().unflatten(1, (scale.shape[1], -1))
    largest = blocks.abs().amax(-1, keepdim=True)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22  # of the scale
    assert ((whole.view_as(blocks) - blocks).abs() <= (STEP[format] + 2 * rounding) * largest).all()
    assert codes.numel() * codes.element_size() == weight.numel() / (2 if format == "nf4" else 1) and scale.dtype == dtype
    again = quantized(whole.to(torch.float32), format)
    assert (dequantized(*again, format) - whole).norm() <= 4 * rounding * whole.norm(), "what was rounded once is rounded to itself"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_blocks_of_zeros_stay_zeros(format, dtype):
    weight = torch.randn(3, 2 * BLOCK).to(dtype)
    weight[1] = weight[2, BLOCK:] = 0
    whole = dequantized(*quantized(weight, format), format)
    assert whole.isfinite().all() and (whole[weight == 0] == 0).all()


def test_the_levels_are_those_of_the_paper():
    """QLoRA, appendix E."""
    paper = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152,
             0.4407098, 0.562617, 0.7229568, 1.0]  # fmt: skip
    assert normal_levels(torch.device("cpu")).tolist() == pytest.approx(paper, abs=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_rounded_weight_and_none_is_the_weights(format, bias):
    linear = nn.Linear(2 * BLOCK, 24, bias=bias, dtype=torch.float64)
    frozen, x, dy = (
        FrozenLinear(linear, format),
        torch.randn(3, 5, 2 * BLOCK, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, 24).double(),
    )
    with torch.no_grad():
        linear.weight.copy_(frozen.whole_weight())
    expected = F.linear(x, linear.weight, linear.bias)
    (wanted,) = torch.autograd.grad(expected, x, dy, retain_graph=True)
    y = frozen(x)
    (found,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert (frozen.double().whole_weight() - linear.weight).norm() == 0, "float8 codes survive a change of dtype"


def with_adapters(model, **settings):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **settings)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, which would leave lora_A without a gradient
            nn.init.normal_(parameter, std=0.2)
    return model


def assert_streams_as_it_runs(model, tolerance=1e-6):
    """Against itself unstreamed, over the five batches; only adapters have gradients."""
    for _, batch in hf_families.batches():
        own = hf_families.gradients(model, batch, use_cache=False)
        report = lt.apply(model, PLAN)
        report.check_replay()
        assert all(entry.why == "" for entry in report.entries), report
        streamed = hf_families.gradients(model, batch)
        report.undo()
        assert hf_families.difference(streamed, own) <= tolerance
        assert all("lora_" in name for name in streamed if name != "loss")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow), pytest.param("gpt_neox", marks=pytest.mark.slow)]
)
def test_quantised_frozen_weights_stream_beside_adapters(format, family):
    model = hf_families.build(family)
    exact = hf_families.gradients(model, next(iter(hf_families.batches()))[1], use_cache=False)["loss"]
    count = lt.nn.freeze_linears(model, format)
    assert count == sum(isinstance(m, FrozenLinear) for m in model.modules()) > 0 and type(model.get_output_embeddings()) is nn.Linear
    model = with_adapters(model)
    assert_streams_as_it_runs(model)
    lossy = hf_families.gradients(model, next(iter(hf_families.batches()))[1], use_cache=False)["loss"]
    assert abs(float(lossy - exact)) > 1e-4, "fewer bits had no effect"


def test_no_whole_weight_outlives_its_product():
    """Alive between forward and backward: codes were there before, and all that a layer makes is the size of its activations."""
    linear = nn.Linear(512, 512, bias=False)
    frozen, x = FrozenLinear(linear, "nf4"), torch.randn(4, 512, requires_grad=True)
    with Alive() as alive:
        y = frozen(frozen(x))
        assert alive.now <= 4 * y.nbytes < linear.weight.nbytes
        y.sum().backward()
    assert linear.weight.nbytes < alive.most


@pytest.mark.slow
def test_weights_that_bitsandbytes_has_quantised_are_refused_by_name():
    """Its layers find their scales on the very parameter, which a replay's alias is not."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = hf_families.build("llama", hidden_size=64, intermediate_size=128, head_dim=16, attention_bias=False).float()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            made = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
            )
            made.load_state_dict(module.state_dict())
            model.set_submodule(name, made.to("cpu"))
    model.requires_grad_(False)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(
        ValueError, match="layers.0 cannot be streamed.*a Linear4bit, keeps its weights quantised: longtrain.nn.freeze_linears"
    ):
        lt.apply(model, PLAN)


@pytest.mark.slow
def test_weights_that_torchao_has_quantised():
    quantization = pytest.importorskip("torchao.quantization")
    model = hf_families.build("llama", hidden_size=64, intermediate_size=128, head_dim=16).float()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    model.requires_grad_(False)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert_streams_as_it_runs(model, tolerance=1e-5)  # float32 throughout


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_that_was_trained_before_is_trained_on(tmp_path, dropout):
    """Saved and read by peft, then applied: the same gradients as unstreamed, and a second step from where the first one ended."""
    peft = pytest.importorskip("peft")
    model = with_adapters(hf_families.build("llama"), lora_dropout=dropout)
    batch = next(iter(hf_families.batches()))[1]
    report = lt.apply(model, PLAN)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hf_families.gradients(model, batch)
    optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    report.undo()
    again = peft.PeftModel.from_pretrained(hf_families.build("llama"), tmp_path, is_trainable=True).double()
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained.keys()
    # safetensors hold float64 as it is
    assert all(torch.equal(p, trained[name]) for name, p in again.named_parameters() if p.requires_grad)
    if dropout == 0:
        assert_streams_as_it_runs(again)
    lt.apply(again, PLAN)
    torch.manual_seed(3)
    first = hf_families.gradients(again, batch)
    torch.manual_seed(3)
    assert hf_families.difference(hf_families.gradients(again, batch), first) == 0 and len(first) == 1 + 3 * 7 * 2


def test_what_cannot_be_kept_in_fewer_bits_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no nn.Linear besides its head"):
        lt.nn.freeze_linears(hf_families.build("gpt2"), "int8")
    with pytest.raises(ValueError, match="one of int8, float8, nf4; found 'int4'"):
        lt.nn.freeze_linears(hf_families.build("llama"), "int4")
    with pytest.raises(ValueError, match="weight is torch.int8 already"):
        FrozenLinear(FrozenLinear(nn.Linear(4, 4), "int8"), "nf4")
    with pytest.raises(ValueError, match="two weights in a byte, and it has 5 input features; take int8"):
        FrozenLinear(nn.Linear(5, 4), "nf4")
