"""lt.apply on transformers models: what it says, what it refuses, what it restores; batches and models beyond the table's."""

from collections import UserDict
from functools import partial

import hf_families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import longtrain as lt
from longtrain.hf import check_version
from longtrain.hf.mask import Mask
from tests.hf.test_families import EXACT, UPCASTS

PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)


def one_row():
    return dict(hf_families.batches())["one row"]


def compare(model, *batches, plan=PLAN, tolerance=UPCASTS, reference=None):
    own = [hf_families.gradients(model, batch, use_cache=False) for batch in reference or batches]
    report = lt.apply(model, plan)
    report.check_replay()
    for batch, expected in zip(batches, own, strict=True):
        error = hf_families.difference(hf_families.gradients(model, batch), expected)
        assert error <= tolerance, f"{error:.1e}"
    return report


def test_the_report_and_its_undo():
    model = hf_families.build("jamba")
    names, before = list(model.state_dict()), {m: dict(m.__dict__) for m in model.modules()}
    report = lt.apply(model, lt.Plan(chunk_tokens=8, layer_fallback="unstreamed"))
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["model.layers.0", "model.layers.1", "model.layers.2", "model.final_layernorm", "lm_head"]
    assert lines[1].split()[1:] == ["streamed"] and lines[4].split()[1:] == ["streamed", "loss"]
    assert "left as it is: its output in chunks of 5 differs" in lines[0]
    assert "the layer before it is not streamed" in lines[3]
    assert list(model.state_dict()) == names
    assert [("forward" in layer.__dict__) for layer in model.model.layers] == [False, True, False]
    report.undo()
    for module, attributes in before.items():
        assert {k: v for k, v in module.__dict__.items() if v is not attributes.get(k)}.keys() <= {"_forward_pre_hooks", "_forward_hooks"}
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache


@pytest.mark.parametrize("plan", [
    lt.Plan(chunk_tokens=64), lt.Plan(chunk_tokens=1), lt.Plan(chunk_tokens=8, segment_layers=2, store_outputs=0.4, store_kv=0.5),
    lt.Plan(chunk_tokens=7, boundaries="tensor", store_outputs=0.0),
], ids=["one chunk", "one token", "segments", "tensor boundaries"])
def test_every_plan(plan):
    compare(hf_families.build("qwen3"), *(batch for _, batch in hf_families.batches()), plan=plan)


def test_embeddings_instead_of_ids_receive_their_gradient():
    model, embeds = hf_families.build("llama"), torch.randn(2, 29, 32, dtype=torch.float64, requires_grad=True)
    call = lambda: torch.autograd.grad(
        model(inputs_embeds=embeds, labels=torch.ones(2, 29, dtype=torch.long), use_cache=False).loss, embeds
    )[0]
    own = call()
    lt.apply(model, PLAN)
    assert (call() - own).norm() <= UPCASTS * own.norm()


def test_frozen_weights_get_no_gradient():
    model = hf_families.build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "embed" in name)
    compare(model, one_row())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_cu_seqlens_are_documents():
    """By flash-attention keyword arguments alone, and beside position_ids: as the documents one by one."""
    model, batch = hf_families.build("llama"), one_row()
    edges, count = [0, 11, 12, 29], int((batch["labels"][:, 1:] != -100).sum())
    cu = torch.tensor(edges, dtype=torch.int32)
    keyword = dict(batch, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=17, max_length_k=17)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:])])[None]
    own = hf_families.gradients(model, dict(batch, position_ids=positions), use_cache=False)
    assert count == 28
    lt.apply(model, PLAN)
    for call in (keyword, dict(keyword, position_ids=positions)):
        assert hf_families.difference(hf_families.gradients(model, call), own) <= UPCASTS


def test_documents_do_not_leak():
    model = hf_families.build("mistral")
    batch = dict(hf_families.batches())["packed"]
    lt.apply(model, PLAN)
    with torch.no_grad():
        hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
        other = batch["input_ids"].clone()
        other[:, :12] = 5
        changed = model.model(other, position_ids=batch["position_ids"]).last_hidden_state
    assert torch.equal(hidden[:, 12:], changed[:, 12:]) and not torch.equal(hidden[:, :12], changed[:, :12])


class RecordedDropout(nn.Module):
    """Dropout that notes the masks it drew, or applies given ones."""

    def __init__(self, p):
        super().__init__()
        self.p, self.drawn, self.given = p, [], None

    def forward(self, x):
        if not self.training:
            return x
        if self.given is not None:
            return x * self.given
        self.drawn.append((torch.rand_like(x) >= self.p) / (1 - self.p))
        return x * self.drawn[-1]


def test_dropout_is_that_of_a_plain_graph_with_the_same_masks():
    """Hidden dropout by masks drawn chunk by chunk and recorded; attention dropout by its hash, from the same seeds."""
    model = hf_families.build("gpt_neox", attention_dropout=0.3)
    places = [(layer, name) for layer in model.base_model.layers for name in ("post_attention_dropout", "post_mlp_dropout")]
    for layer, name in places:
        setattr(layer, name, RecordedDropout(0.2))
    batch = one_row()
    report = lt.apply(model, PLAN)
    for layer, name in places:
        getattr(layer, name).drawn.clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    streamed = hf_families.gradients(model, batch)
    report.undo()
    model.set_attn_implementation("longtrain")
    for layer, name in places:
        dropout = getattr(layer, name)
        dropout.given = torch.cat(dropout.drawn[:4], dim=1)  # four chunks forward; the replays behind them draw the same
        replayed = torch.cat(dropout.drawn[:3:-1], dim=1)
        assert torch.equal(replayed, dropout.given)
    torch.set_rng_state(state)
    # the streamed layers drew their attention seed first, then one mask a chunk and place
    seeds = []
    for _ in model.base_model.layers:
        seeds.append(int(torch.randint(2**62, ())))
        for span in (8, 8, 8, 5):
            torch.rand(1, span, 32, dtype=torch.float64), torch.rand(1, span, 32, dtype=torch.float64)
    class Given(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.randint:
                return torch.tensor(seeds.pop(0))
            return func(*args, **(kwargs or {}))

    with Given():
        plain = hf_families.gradients(model, batch, use_cache=False)
    assert not seeds
    assert hf_families.difference(streamed, plain) <= UPCASTS


def test_bad_calls_are_refused_with_their_remedy():
    model, batch = hf_families.build("mixtral"), one_row()
    lt.apply(model, PLAN)
    hole = torch.ones_like(batch["input_ids"])
    hole[0, 9] = 0
    restarts = torch.cat([torch.arange(9), torch.arange(20)])[None]
    for changes, message in (
        (dict(use_cache=True), "use_cache=False"),
        (dict(output_attentions=True), "output_attentions=True"),
        (dict(output_hidden_states=True), 'boundaries="tensor"'),
        (dict(attention_mask=hole), "padding inside"),
        (dict(attention_mask=torch.ones(1, 1, 29, 29)), "mask tensor of shape"),
        (dict(attention_mask=torch.ones_like(hole), position_ids=restarts), "leave attention_mask out"),
        (dict(some_scores=torch.ones(1, 29)), "given some_scores.*leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, **changes)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(**batch)


def test_bad_models_are_refused_with_their_remedy():
    model = hf_families.build("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        lt.apply(model, PLAN)
    model.gradient_checkpointing_disable()
    report = lt.apply(model, PLAN)
    with pytest.raises(ValueError, match="undo"):
        lt.apply(model, PLAN)
    report.undo()
    with torch.device("meta"):
        meta = hf_families.build("llama")
    with pytest.raises(ValueError, match="meta device"):
        lt.apply(meta, PLAN)


def more_than_it_says(self, *args, attention_mask, **kwargs):
    self.scaling = 0.1 if isinstance(attention_mask, Mask) else 0.2
    return super(type(self), self).forward(*args, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("version, fits", [("4.57.1", False), ("5.20.0", False), ("5.21.0", True), ("5.23.0", True), ("6.0.0.dev0", False)])
def test_the_range_of_transformers(version, fits):
    if fits:
        check_version(version)
        return
    with pytest.raises(ImportError, match=r"5.21, < 6; found .*longtrain\[hf\]"):
        check_version(version)


def test_attention_that_does_more_than_it_says_is_refused():
    """The proof against the family's own eager attention: a call that hides an option from the interface is found out."""
    model = hf_families.build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("Sly", (type(layer.self_attn),), {"forward": more_than_it_says})
    with pytest.raises(ValueError, match="differs from its own eager attention"):
        lt.apply(model, PLAN)


def numbers_its_tokens(self, hidden_states, *args, past_key_values=None, **kwargs):
    before = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
    positions = torch.arange(hidden_states.shape[1]) + before
    hidden_states = hidden_states * (1 + torch.floor(positions / 16))[:, None]  # as Llama 4 does from 8,192 tokens on
    return super(type(self), self).forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 40])
def test_layers_that_number_their_tokens_go_on_where_the_chunk_before_ended(chunk_tokens):
    """From a token on that no proof reaches."""
    model = hf_families.build("llama")
    for layer in model.model.layers[1:]:
        layer.self_attn.__class__ = type("Numbering", (type(layer.self_attn),), {"forward": numbers_its_tokens})
    batches = dict(hf_families.batches())
    chosen = (batches[name] for name in ("one row", "packed", "masked prompts"))
    compare(model, *chosen, plan=lt.Plan(chunk_tokens=chunk_tokens, loss_chunk_tokens=8))


def test_the_temperature_of_llama_4_follows_the_token():
    model = hf_families.build("llama4_text", no_rope_layers=[1, 0, 1], floor_scale=16, attn_scale=0.5)
    compare(model, one_row())


def hands_on(self, hidden_states, *args, shared, **kwargs):
    shared["values"] = hidden_states
    return super(type(self), self).forward(hidden_states, *args, **kwargs)


def takes_over(self, hidden_states, *args, shared, **kwargs):
    return super(type(self), self).forward(hidden_states + shared["values"], *args, **kwargs)


@pytest.mark.parametrize("chunk_tokens", [8, 40])
def test_layers_that_hand_something_to_later_ones_are_refused(chunk_tokens):
    """As keys and values that several layers share: of the last chunk alone, and without a gradient."""
    model = hf_families.build("llama")
    model.model.forward = partial(model.model.forward, shared=UserDict())
    for layer, forward in ((model.model.layers[0], hands_on), (model.model.layers[2], takes_over)):
        layer.__class__ = type("Sharing", (type(layer),), {"forward": forward})
    with pytest.raises(ValueError, match="layers.0 cannot be streamed: .*it hands later layers what it made of all tokens .*'values'"):
        lt.apply(model, PLAN)
    report = compare(model, one_row(), plan=lt.Plan(chunk_tokens=chunk_tokens, loss_chunk_tokens=8, layer_fallback="unstreamed"))
    assert [entry.became for entry in report.entries][:3] == ["left as it is", "streamed", "left as it is"]


@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_that_fails_when_it_is_observed_keeps_its_mode(trains):
    model = hf_families.build("llama").train(trains)
    layer = model.model.layers[1]

    def fails(*args, **kwargs):
        if layer.training != trains and kwargs["attention_mask"].mix is not None:
            raise ZeroDivisionError("in the other mode")
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = fails
    lt.apply(model, lt.Plan(chunk_tokens=8, layer_fallback="unstreamed"))
    assert all(module.training == trains for module in model.modules())


def test_a_leak_between_tokens_is_refused():
    model = hf_families.build("llama")
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type(
        "Leaky", (type(mlp),), {"forward": lambda self, x: super(type(self), self).forward(x) + 1e-3 * x.mean(1, keepdim=True)}
    )
    with pytest.raises(ValueError, match="layers.1 cannot be streamed.*something besides mix looks across tokens"):
        lt.apply(model, PLAN)


def test_hidden_states_with_tensor_boundaries():
    model, batch = hf_families.build("gpt_neox"), one_row()
    call = lambda: model(**batch, use_cache=False, output_hidden_states=True)
    own = call().hidden_states
    lt.apply(model, lt.Plan(chunk_tokens=8, boundaries="tensor"))
    for a, b in zip(call().hidden_states, own, strict=True):
        assert (a - b).norm() <= EXACT * b.norm()


def test_hidden_states_inside_a_segment_are_refused():
    model, batch = hf_families.build("gpt_neox"), one_row()
    lt.apply(model, lt.Plan(chunk_tokens=8, boundaries="tensor", segment_layers=2))
    with pytest.raises(ValueError, match=r"none between the layers of a segment; use Plan\(segment_layers=1\)"):
        model(**batch, output_hidden_states=True)


def test_layers_that_are_given_different_arguments_are_no_segment():
    """Masks with a window and without; in Gemma 4 rotary positions for heads of another size too."""
    for family in ("gemma3_text", "gemma4_text"):
        model = hf_families.build(family)
        with pytest.raises(ValueError, match=r"layers.0 to 2 would be one segment.*different arguments.*use Plan\(segment_layers=1\)"):
            lt.apply(model, lt.Plan(chunk_tokens=8, segment_layers=3))
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_argument_that_was_none_when_traced_is_refused():
    """Cross-attention: the encoder's states run along its own tokens, and the mixers of a chunk are those of self-attention."""
    model, batch = hf_families.build("gpt2", add_cross_attention=True), one_row()
    lt.apply(model, PLAN)
    for tokens in (29, 5):
        with pytest.raises(ValueError, match="given encoder_hidden_states.*leave it out"):
            model(**batch, encoder_hidden_states=torch.randn(1, tokens, 32, dtype=torch.float64))


def test_evaluation_and_generation_between_steps():
    model, batch = hf_families.build("llama"), one_row()
    own = hf_families.gradients(model, batch, use_cache=False)
    expected = model.generate(batch["input_ids"][:, :9], max_new_tokens=5, do_sample=False)
    lt.apply(model, PLAN)
    for _ in range(2):
        assert hf_families.difference(hf_families.gradients(model, batch), own) <= UPCASTS
        assert torch.equal(model.generate(batch["input_ids"][:, :9], max_new_tokens=5, do_sample=False), expected)
        with torch.no_grad():
            assert float(model(**batch).loss) == pytest.approx(float(own["loss"]), rel=UPCASTS)


def test_one_step_of_training_in_bfloat16():
    model = hf_families.build("qwen3").bfloat16()
    ids = torch.randint(3, 97, (1, 200))
    own = hf_families.gradients(model, dict(input_ids=ids, labels=ids), use_cache=False)
    lt.apply(model, lt.Plan(chunk_tokens=64, loss_chunk_tokens=64))
    streamed = hf_families.gradients(model, dict(input_ids=ids, labels=ids))
    # both round to 8 bits at every operation; a wrong mask or loss would be off by tens of percent
    assert hf_families.difference(streamed, own) <= 0.03
    assert all(torch.isfinite(g).all() for g in streamed.values())
    assert F.cosine_similarity(streamed["lm_head.weight"].flatten().float(), own["lm_head.weight"].flatten().float(), dim=0) > 0.999


def test_autocast_is_that_of_the_forward_pass():
    model, batch = hf_families.build("llama").float(), one_row()

    def outcome():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    own = outcome()
    lt.apply(model, PLAN)
    streamed = outcome()
    assert hf_families.difference(streamed, own) <= 0.03  # bfloat16 on both sides: 8 bits
    assert hf_families.difference(streamed, hf_families.gradients(model, batch)) > 1e-4, "autocast had no effect"
