"""Hidden states behind the last layer stay in the token store: the loss takes them from there, and who reads them gets them."""

import gc

import hf_families
import pytest
import torch

import longtrain as lt
from longtrain.hf.promise import LazyHidden
from longtrain.stream.work import Alive
from tests.hf.test_families import UPCASTS

PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)
TOKENS, WIDTH = 96, 32


def batch(name="masked prompts"):
    return dict(hf_families.batches())[name]


class Whole(Alive):
    """Notes how many tensors as long as the sequence and as wide as the model were made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.now
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now > before and isinstance(out, torch.Tensor) and out.shape == (1, TOKENS, WIDTH):
            self.made += 1
        return out


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gemma2", {}), ("cohere", {}), ("gpt2", dict(n_positions=TOKENS)), ("mixtral", {}))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("how", ["loss", "logprobs"])
def test_hidden_states_are_never_whole_between_the_embedding_and_its_gradient(family, changes, how):
    """cohere scales its logits, gemma2 caps them, gpt2 reshapes its hidden states to what they are."""
    model, ids = hf_families.build(family, max_position_embeddings=TOKENS, **changes), torch.randint(3, hf_families.VOCAB, (1, TOKENS))

    def step():
        if how == "loss":
            model(input_ids=ids, labels=ids).loss.backward()
        else:
            logp, entropy = lt.token_logprobs(model, ids)
            (logp.sin().sum() + entropy.sum()).backward()

    counts = {}
    for boundaries in ("stream", "tensor"):
        report = lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8, boundaries=boundaries))
        step()
        with Whole() as counted:
            step()
        counts[boundaries] = counted.made
        assert not report.store.names()
        report.undo()
    scaled = {"gemma2": 2}.get(family, 0) + {"gpt2": 2}.get(family, 0)  # the embedding times a number; positions added
    assert counts["stream"] <= 2 + scaled < counts["tensor"], counts


@pytest.mark.parametrize("grad", [True, False])
def test_who_reads_them_gets_them(grad):
    model = hf_families.build("llama")
    call = lambda: model.model(batch()["input_ids"], use_cache=False).last_hidden_state
    own = call()
    wanted = torch.autograd.grad(own[:, 2:].sin().sum(), list(model.model.parameters()))
    report = lt.apply(model, PLAN)
    with torch.set_grad_enabled(grad):
        hidden = call()
        assert isinstance(hidden, LazyHidden) and hidden.values is None and "not computed" in repr(hidden)
        assert hidden.shape == own.shape and hidden.dtype == own.dtype and hidden.requires_grad == grad
        assert hidden[:, :, :] is hidden and hidden[..., :] is hidden and hidden.view(own.shape) is hidden and hidden.values is None
        part = hidden[:, 2:]
        assert type(part) is torch.Tensor and (part - own[:, 2:]).norm() <= UPCASTS * own.norm()
    if grad:
        found = torch.autograd.grad(part.sin().sum(), list(model.model.parameters()))
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).norm() <= UPCASTS * b.norm()
    del hidden, part
    report.undo()
    assert type(call()) is torch.Tensor


class Doubled(torch.autograd.Function):
    """A function of somebody else's, which is handed the hidden states as they are."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_a_function_that_is_handed_them_passes_its_gradient_on_and_hooks_fire():
    model = hf_families.build("llama")
    call = lambda: model.model(batch()["input_ids"], use_cache=False).last_hidden_state
    wanted = torch.autograd.grad(Doubled.apply(call()).sin().sum(), list(model.model.parameters()))
    lt.apply(model, PLAN)
    hidden, seen = call(), []
    hidden.register_hook(lambda grad: seen.append(grad.shape))
    found = torch.autograd.grad(Doubled.apply(hidden).sin().sum(), list(model.model.parameters()))
    assert seen == [hidden.shape]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= UPCASTS * b.norm()


def test_logits_can_be_read_behind_the_loss_without_gradients_and_are_refused_with_them():
    model = hf_families.build("llama")
    own = model(**batch(), use_cache=False).logits
    report = lt.apply(model, PLAN)
    with torch.no_grad():
        out = model(**batch())
        assert float(out.loss) > 0 and (out.logits[:, 1:] - own[:, 1:]).norm() <= UPCASTS * own.norm()
    out = model(**batch())
    with pytest.raises(RuntimeError, match=r'without labels or under torch.no_grad\(\), or use Plan\(boundaries="tensor"\)'):
        out.logits.sum()
    report.undo()
    lt.apply(model, lt.Plan(chunk_tokens=8, loss_chunk_tokens=8, boundaries="tensor"))
    out = model(**batch())
    assert (out.logits[:, 1:] - own[:, 1:]).norm() <= UPCASTS * own.norm()


def test_an_edit_in_place_is_noticed():
    model = hf_families.build("llama")
    lt.apply(model, PLAN)
    hidden = model.model(batch()["input_ids"], use_cache=False).last_hidden_state
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        hidden.sum()


def test_nothing_is_left_in_the_store_when_nobody_reads_them():
    model = hf_families.build("llama")
    report = lt.apply(model, PLAN)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = model(**batch())
            del out
            gc.collect()
            assert not report.store.names()
            hidden = model.model(batch()["input_ids"], use_cache=False).last_hidden_state
            del hidden
            gc.collect()
            assert not report.store.names()


def test_two_calls_before_their_losses():
    """As preference objectives make them: the second call does not take the first one's hidden states."""
    model = hf_families.build("llama")
    rows = batch()["input_ids"].split(1)

    def outcome():
        model.zero_grad()
        a, b = (lt.token_logprobs(model, row)[0].sum() for row in rows)
        (a - 2 * b).backward()
        return {"loss": (a - b).detach(), **{name: p.grad for name, p in model.named_parameters()}}

    own = outcome()
    lt.apply(model, PLAN)
    assert hf_families.difference(outcome(), own) <= UPCASTS
