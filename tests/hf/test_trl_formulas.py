"""SFT, DPO and GRPO: streamed losses and gradients against what TRL's own trainers make of full logits, in float32."""

from types import SimpleNamespace

import hf_families
import pytest
import torch

import longtrain as lt
from longtrain.objectives import dpo_loss, grpo_loss, sequence_logprobs
from tests.hf.test_trainers import settings, text, tokenizer

trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

CLOSE = 1e-6
PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)
PROMPT, COMPLETION = 9, 20


class FullLogits:
    """In the place of the model that a trainer's formula is given: log-probabilities and entropies of full logits."""

    def __init__(self, model, temperature=1.0):
        self.model, self.temperature = model, temperature

    def __call__(self, labels, fused_lm_head, **arguments):
        assert fused_lm_head
        logits = self.model(**arguments).logits[:, :-1] / self.temperature
        assert type(logits) is torch.Tensor
        mask, logp = labels[:, 1:] != -100, logits.log_softmax(-1)
        chosen = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        return SimpleNamespace(log_probs=chosen * mask, entropy=entropy * mask, mean_logits=logits.mean(-1), is_top1=mask, label_mask=mask)


def policy(seed=0):
    """Weights of ordinary size: log-probabilities near those of chance. Completions are short, since a float32 sum of n of them is rounded
    to n times 4e-7, and a preference is a difference of four such sums."""
    model = hf_families.build("llama").float()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0).add_(torch.randn_like(parameter), alpha=0.02 * seed)
    return model


def outcome(model, loss):
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def rows(*fields):
    generator = torch.Generator().manual_seed(0)
    return datasets.Dataset.from_list(
        [{field: ("" if field == "prompt" else " ") + text(generator, 4, 10) for field in fields} for _ in range(4)]
    )


def first_batch(trainer):
    return {name: value for name, value in next(iter(trainer.get_train_dataloader())).items()}


def compare(found, expected):
    error = hf_families.difference(found, expected)
    assert error <= CLOSE, f"{error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("items", [None, 37])
def test_sft(tmp_path, items):
    model = policy()
    trainer = trl.SFTTrainer(
        policy(),
        trl.SFTConfig(**settings(tmp_path, max_steps=1, max_length=48)),
        train_dataset=rows("prompt", "completion"),
        processing_class=tokenizer(),
    )
    batch = first_batch(trainer)
    assert bool((batch["labels"] == -100).any())
    given = None if items is None else torch.tensor(items)
    expected = outcome(model, trainer.compute_loss(FullLogits(model), dict(batch), num_items_in_batch=given))
    lt.apply(model, PLAN)
    compare(outcome(model, model(**batch, num_items_in_batch=given).loss), expected)


@pytest.mark.slow
def test_dpo(tmp_path):
    model, reference = policy(), policy(1)
    arguments = trl.DPOConfig(**settings(tmp_path, max_steps=1, max_length=48), beta=0.3)
    trainer = trl.DPOTrainer(
        policy(), policy(1), arguments, train_dataset=rows("prompt", "chosen", "rejected"), processing_class=tokenizer()
    )
    batch = first_batch(trainer)
    trainer.ref_model = FullLogits(reference)
    expected = outcome(model, trainer.compute_loss(FullLogits(model), dict(batch)))
    for each in (model, reference):
        lt.apply(each, PLAN)
    ids, attention, counts = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    ours = sequence_logprobs(lt.token_logprobs(model, ids, attention_mask=attention)[0], counts).chunk(2)
    with torch.no_grad():
        theirs = sequence_logprobs(lt.token_logprobs(reference, ids, attention_mask=attention)[0], counts).chunk(2)
    compare(outcome(model, dpo_loss(*ours, *theirs, beta=0.3)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type, unbiased_kl", [("bnpo", False), ("dapo", True)])
def test_grpo(tmp_path, loss_type, unbiased_kl):
    """Clipped, with a reference; completions of different lengths, ratios on both sides of the clip."""
    model = policy()
    arguments = trl.GRPOConfig(
        **settings(tmp_path, max_steps=1), num_generations=2, max_completion_length=COMPLETION, beta=0.05, temperature=0.9, epsilon=0.2,
        epsilon_high=0.3, loss_type=loss_type, use_bias_correction_kl=unbiased_kl,
    )
    trained = policy()
    trained.save_pretrained(tmp_path / "reference")
    trained.config._name_or_path = str(tmp_path / "reference")
    trainer = trl.GRPOTrainer(
        trained,
        lambda completions, **unused: [0.0] * len(completions),
        arguments,
        train_dataset=rows("prompt"),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, hf_families.VOCAB, (4, PROMPT + COMPLETION), generator=generator)
    prompt = (torch.arange(PROMPT) >= torch.tensor([0, 3, 5, 1])[:, None]).long()
    completion = (torch.arange(COMPLETION) < torch.tensor([20, 11, 7, 16])[:, None]).long()
    mask, advantages = torch.cat([prompt, completion], 1), torch.tensor([1.0, -0.5, 0.3, -1.2])
    with torch.no_grad():
        logp = FullLogits(model, 0.9)(ids, True, input_ids=ids, attention_mask=mask, use_cache=False).log_probs[:, PROMPT - 1 :]
    old, ref = (logp + 0.3 * torch.randn(logp.shape, generator=generator) for _ in range(2))
    batch = dict(prompt_ids=ids[:, :PROMPT], prompt_mask=prompt, completion_ids=ids[:, PROMPT:], completion_mask=completion,
                 advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref,
                 num_items_in_batch=torch.tensor(50.0))  # fmt: skip
    expected = outcome(model, trainer.compute_loss(FullLogits(model, 0.9), batch))
    lt.apply(model, PLAN)
    found, _ = lt.token_logprobs(model, ids, attention_mask=mask, temperature=0.9)
    normalizer = None if loss_type == "bnpo" else 50.0 / arguments.steps_per_generation
    loss = grpo_loss(
        found[:, PROMPT:],
        old,
        advantages,
        completion,
        clip=(0.2, 0.3),
        ref_logp_BT=ref,
        kl_coef=0.05,
        unbiased_kl=unbiased_kl,
        normalizer=normalizer,
    )
    compare(outcome(model, loss), expected)
