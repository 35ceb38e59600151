"""Which families of transformers stream, how exactly, and why the others do not: python tools/hf_families.py [--write] [FAMILY ...]

Every family is built tiny with random weights, in float64. Its gradients with longtrain are compared with its own (sdpa attention, or eager
where it has no other), over five batches: one row, packed by position_ids, left-padded, right-padded, masked prompts; and with dropout,
against its own eager graph given the masks that the streamed one drew. With --write the table goes to docs/hf_families.md; a family whose
gradients are off stops the command.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import longtrain as lt
from longtrain.ops.attention.mask import dropout_keep

VOCAB, TOKENS, CHUNK = 97, 29, 8
BOUND = 1e-6
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, use_cache=True,
    # without random numbers, so that two runs are comparable
    attention_dropout=0.0, hidden_dropout=0.0, residual_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dropout=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, embedding_dropout=0.0, router_jitter_noise=0.0,
)
# And with them; what a family says of its own holds.
DROPOUT = {name: 0.2 for name in SMALL if "drop" in name}
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
DELTA = dict(layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
             linear_key_head_dim=8, linear_value_head_dim=8)
STATE = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16, chunk_size=16)
# What a family needs beyond that; None where nothing. The table is in this order.
FAMILIES: dict[str, dict] = {
    # dense
    "llama": dict(attention_bias=True), "mistral": dict(sliding_window=7),
    "qwen2": dict(use_sliding_window=True, sliding_window=7, max_window_layers=1), "qwen3": {}, "gemma": {},
    "gemma2": dict(sliding_window=7, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=1.5),
    "gemma3_text": dict(sliding_window=7, query_pre_attn_scalar=8, sliding_window_pattern=2), "phi": dict(partial_rotary_factor=0.5),
    "phi3": {}, "gpt_neox": dict(rotary_pct=0.5), "cohere": dict(logit_scale=0.3), "cohere2": dict(sliding_window=7, logit_scale=0.3),
    "olmo": {}, "olmo2": {}, "olmo3": dict(sliding_window=7), "glm": {}, "glm4": {},
    "granite": dict(logits_scaling=3.0, residual_multiplier=0.5),
    "starcoder2": dict(sliding_window=7), "stablelm": dict(use_parallel_residual=True),
    "smollm3": {}, "nemotron": {}, "helium": {}, "exaone4": dict(sliding_window=7, sliding_window_pattern=2), "seed_oss": {}, "arcee": {},
    "apertus": {}, "ernie4_5": {}, "hunyuan_v1_dense": {}, "persimmon": {}, "gpt2": dict(n_embd=32, n_head=4, n_layer=3, n_positions=64),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32), "biogpt": {}, "gpt_bigcode": dict(n_embd=32, n_head=4, n_layer=3, n_positions=64),
    "vaultgemma": {}, "ministral3": {},
    "gemma4_text": dict(sliding_window=7, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8),
    # mixture of experts
    "mixtral": EXPERTS, "qwen2_moe": dict(EXPERTS, shared_expert_intermediate_size=24), "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
    "gpt_oss": dict(EXPERTS, sliding_window=7), "granitemoe": EXPERTS, "phimoe": EXPERTS,
    "deepseek_v2": dict(EXPERTS, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1,
                        topk_group=1, num_key_value_heads=4, first_k_dense_replace=1),
    "deepseek_v3": dict(EXPERTS, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1,
                        topk_group=1, num_key_value_heads=4, first_k_dense_replace=1),
    "llama4_text": dict(EXPERTS, attention_chunk_size=9, intermediate_size_mlp=48, num_experts_per_tok=1,
                        layer_types=["chunked_attention"] * 2 + ["full_attention"]),
    "glm4_moe": EXPERTS, "ernie4_5_moe": EXPERTS, "flex_olmo": EXPERTS,
    # with layers that are no attention
    "lfm2_moe": dict(EXPERTS, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1),
    "olmo_hybrid": DELTA, "qwen3_5_text": DELTA, "mamba2": dict(STATE, state_size=8, num_heads=8, head_dim=8, n_groups=2),
    "falcon_h1": dict(STATE, mamba_d_ssm=64), "bamba": dict(STATE, attn_layer_indices=[1]),
    "granitemoehybrid": dict(EXPERTS, **STATE, layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=24),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=8, mamba_head_dim=8, n_groups=1, ssm_state_size=8,
                       chunk_size=16),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"]),
    "qwen3_next": dict(EXPERTS, **DELTA, shared_expert_intermediate_size=24),
    "jamba": dict(EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    "minimax": EXPERTS, "diffllama": dict(attention_dropout=0.0), "doge": {}, "bloom": dict(n_head=4, n_layer=3),
    "gptj": dict(n_embd=32, n_head=4, n_layer=3, rotary_dim=4), "mamba": {},
}


def build(family: str, **changes) -> nn.Module:
    """The family's causal language model, tiny, random, float64, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager") if "num_experts" in FAMILIES[family] else \
            AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # biases, norms and sinks that start at 0 or 1 would test nothing
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and "norm" in name), std=0.2)
    return model.double().train()


def batches() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The five batches, by name."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=generator)
    yield "one row", dict(input_ids=ids[:1], labels=ids[:1])
    documents = torch.cat([torch.arange(n) for n in (11, 1, TOKENS - 12)])[None]
    yield "packed", dict(input_ids=ids[:1], labels=ids[:1], position_ids=documents)
    for name, pads in (("left-padded", slice(0, 6)), ("right-padded", slice(TOKENS - 6, TOKENS))):
        mask = torch.ones_like(ids)
        mask[0, pads] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, pads.stop % TOKENS] = -100  # the last padding token predicts nothing
        yield name, dict(input_ids=ids, labels=labels, attention_mask=mask)
    labels = ids.clone()
    labels[0, :13], labels[1, :5] = -100, -100
    yield "masked prompts", dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))


def gradients(model: nn.Module, batch: dict[str, Tensor], **arguments) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch, **arguments).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def own_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own gradients, before longtrain. Eager attention makes NaN of a query that sees no key in float64 (its mask's lowest
    number is -inf in the float32 of its softmax), so there padded rows run one by one without their padding, at the same positions."""
    mask = batch.get("attention_mask")
    if model.config._attn_implementation != "eager" or mask is None or mask.all():
        return gradients(model, batch, use_cache=False)
    count = int((batch["labels"][:, 1:] != -100).sum())
    total = {}
    for row, seen in enumerate(mask.bool()):
        alone = {name: batch[name][row : row + 1, seen] for name in ("input_ids", "labels")}
        alone["position_ids"] = seen.nonzero().T
        part = gradients(model, alone, use_cache=False, num_items_in_batch=count)
        total = {name: total.get(name, 0) + value for name, value in part.items()}
    return total


class Dropouts(TorchFunctionMode):
    """Around a streamed step: notes the masks of every dropout of hidden states, chunk by chunk, and the seeds of attention's. Around a
    plain one (`given`): its dropouts, those of attention probabilities too, have these masks."""

    def __init__(self, given: Dropouts | None = None) -> None:
        super().__init__()
        self.seeds: list[int] = []
        self.outside: list[Tensor] = []
        self.inside: list[Tensor] = []
        """Masks of dropouts outside of streamed layers, and inside, in the order they were drawn."""
        self.given = given

    def masks(self, layers: int) -> list[Tensor]:
        """In the order of a plain step: before the layers, then layer by layer and place by place, of all chunks."""
        chunks = -(-TOKENS // CHUNK)
        places = len(self.inside) // (layers * chunks)
        by_layer = [self.inside[at : at + places * chunks] for at in range(0, len(self.inside), places * chunks or 1)]
        return self.outside + [torch.cat(of_layer[place::places], dim=-2) for of_layer in by_layer for place in range(places)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randint and self.given is None:
            drawn = func(*args, **kwargs)
            self.seeds.append(int(drawn))
            return drawn
        if func is F.softmax and self.given is not None and kwargs.get("dtype") == torch.float32 and args[0].dtype == torch.float64:
            # Eager attention rounds its probabilities, which dropout makes no better.
            return func(*args, **kwargs | {"dtype": torch.float64})
        if func is not F.dropout or not (args[2] if len(args) > 2 else kwargs.get("training", True)):
            return func(*args, **kwargs)
        x, p = args[0], args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        if p == 0:
            return x
        if self.given is None:
            mask = func(torch.ones_like(x), p)
            if torch._C._current_graph_task_id() < 0:  # not in a backward pass, whose replays draw the same again
                (self.outside if torch.is_grad_enabled() else self.inside).append(mask)
        elif x.ndim == 4:  # of the probabilities ``[1, H, T, T]``
            call = SimpleNamespace(dropout_seed=self.given.seeds.pop(0), dropout_p=p, head_offset=0)
            positions = torch.arange(x.shape[-1])
            mask = dropout_keep(call, torch.zeros(1, dtype=torch.int64), torch.arange(x.shape[1]), positions, positions) / (1 - p)
        else:
            mask = self.given.drawn.pop(0)
        return x * mask


def dropout_difference(family: str) -> float | None:
    """How far streamed gradients with dropout are from those of the family's own eager graph, given the masks; None where it has none."""
    model = build(family, **{**DROPOUT, **FAMILIES[family]})
    batch = next(iter(batches()))[1]
    torch.manual_seed(7)
    report = lt.apply(model, lt.Plan(chunk_tokens=CHUNK, loss_chunk_tokens=CHUNK, layer_fallback="unstreamed"))
    with Dropouts() as noted:
        streamed = gradients(model, batch)
    report.undo()
    if not (noted.seeds or noted.inside or noted.outside):
        return None
    noted.drawn = noted.masks(sum(entry.name.rsplit(".", 1)[-1].isdigit() for entry in report.entries))
    model.set_attn_implementation("eager")
    with Dropouts(noted):
        plain = gradients(model, batch, use_cache=False)
    if noted.seeds or noted.drawn:
        raise RuntimeError(f"{family}: {len(noted.seeds)} seeds and {len(noted.drawn)} masks were drawn and not used by the plain graph")
    return difference(streamed, plain)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over norm, of the gradients as one vector, or of the loss where that is worse."""
    if a.keys() != b.keys():
        return float("inf")
    squares = lambda tensors: sum(t.double().square().sum() for t in tensors) ** 0.5
    names = [name for name in a if name != "loss"]
    errors = [float(squares(a[n] - b[n] for n in group) / squares(b[n] for n in group)) for group in (names, ["loss"])]
    return max(float("inf") if error != error else error for error in errors)


@contextmanager
def rounded(model: nn.Module, unit: float = 2**-24) -> Iterator[None]:
    """Inside, what each layer of the model is given is rounded once, by at most `unit` of it. The model as it was before longtrain."""
    generator = torch.Generator().manual_seed(1)

    def round_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, *others = args
        return (x * (1 + (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) * unit), *others), kwargs

    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    handles = [layer.register_forward_pre_hook(round_input, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounding(model: nn.Module, batch: dict[str, Tensor], own: dict[str, Tensor]) -> float:
    """How far its own gradients go when what each layer is given is rounded to float32 once: recurrences in float32 kernels, under random
    weights, take a rounding error in the eighth digit to the fourth. The model as it was before longtrain."""
    with rounded(model):
        return difference(gradients(model, batch, use_cache=False), own)


def bound(model: nn.Module, batch: dict[str, Tensor], own: dict[str, Tensor]) -> float:
    """What streamed gradients may differ by: BOUND, or four roundings where the family's own arithmetic takes one further than that."""
    return max(BOUND, 4 * rounding(model, batch, own))


def try_family(family: str) -> tuple[str, str, str]:
    """Streamed layers of all, worst error, and what is not streamed and why."""
    model = build(family)
    own = [(name, batch, own_gradients(model, batch)) for name, batch in batches()]
    bounds = {name: bound(model, batch, expected) for name, batch, expected in own}
    try:
        report = lt.apply(model, lt.Plan(chunk_tokens=CHUNK, loss_chunk_tokens=CHUNK, layer_fallback="unstreamed"))
    except ValueError as error:
        return "refused", "", " ".join(str(error).split())
    errors = {name: difference(gradients(model, batch), expected) for name, batch, expected in own}
    if (dropped := dropout_difference(family)) is not None:
        errors["dropout"], bounds["dropout"] = dropped, max(bounds.values())
    if wrong := [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= bounds[name]]:
        raise SystemExit(f"{family}: streamed gradients are off, {', '.join(wrong)}")
    worst = max(errors, key=errors.get)
    layers = [entry for entry in report.entries if entry.name.rsplit(".", 1)[-1].isdigit()]
    streamed = sum(entry.became.startswith("streamed") for entry in layers)
    reasons: dict[str, list[str]] = {}
    for entry in report.entries:
        if entry.why:
            reasons.setdefault(entry.why, []).append(entry.name)
    left = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
    return f"{streamed} of {len(layers)}", f"{errors[worst]:.1e} ({worst})", left


HEADER = f"""# Families of transformers

Made by `python tools/hf_families.py --write` with transformers {{version}}; there is no code for any family. Each is built tiny with random
weights in float64, and its gradients with longtrain are compared with its own over one row, a packed row, left padding, right padding,
masked prompts ({TOKENS} tokens in chunks of {CHUNK}), and dropout where it has any, against its eager graph given the masks that were
drawn. The error is that of the worst: norm of the difference over norm, of all gradients or of the loss. transformers computes the loss,
and many families their norms and eager attention, in float32 whatever the model: hence 1e-7. Recurrent layers (delta rules, state spaces)
compute in float32 altogether, and take the error of one rounding of their input as far as the error here; the command stops where an error
is more than 1e-6 and more than four such roundings.

A layer that is not streamed is left as it is (with `Plan(layer_fallback="unstreamed")`; by default the model is refused), and its attention
still runs on longtrain's kernels. Convolutions and recurrent states of hybrid models are carried from chunk to chunk through the layer's
own cache; jamba's and mamba's full-sequence kernels take no state to begin with, and are left.

| family | layers streamed | error | not streamed, and why |
|---|---|---|---|
"""


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="by default all")
    parser.add_argument("--write", action="store_true", help="write docs/hf_families.md (all families)")
    options = parser.parse_args()
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"{', '.join(sorted(unknown))}: not among the families of this tool: {', '.join(FAMILIES)}")
    transformers.logging.set_verbosity_error()
    rows = []
    for family in FAMILIES if options.write else options.families or FAMILIES:
        rows.append(f"| {family} | " + " | ".join(try_family(family)) + " |")
        print(rows[-1], flush=True)
    if options.write:
        path = Path(__file__).resolve().parents[1] / "docs" / "hf_families.md"
        path.write_text(HEADER.format(version=transformers.__version__) + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
