"""What `tools/fuzz_stream.py` draws, by one seed: a model, a plan, calls, and what is done with them."""

import random
import tempfile
from dataclasses import replace

import fuzz_offload
import hf_families
import torch
from torch import Tensor, nn

import longtrain as lt
from longtrain.hf.layer import CU_SEQLENS
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.ops.linear_cross_entropy import LossOptions

VOCAB = hf_families.VOCAB
KINDS = ("attention", "window", "linear", "delta", "lact", "conv")
OWN_HOW = ("loss", "loss", "logits", "logprobs")
HF_HOW = ("loss", "loss", "tuple", "logits", "smoothed", "kept", "logprobs", "hidden", "decoder")
LOSSY = ("autocast", "fp8")
TWISTS = ("", "", "", "undo", "copy", "state", "step", "shared", "eval", "no_grad", "inference", "offload", "lora", "checkpointing", *LOSSY)


class Case:
    """Everything that is drawn: a model, a plan, calls, how a number is made of each (`how`) and what is done besides (`twist`)."""

    def __init__(self, seed: int, families: list[str]) -> None:
        self.seed, self.draw, self.dropout = seed, random.Random(seed), False
        torch.manual_seed(seed)
        pick = self.pick = self.draw.choice
        self.family, self.tokens, self.batch, self.twist = pick(families), pick((1, 2, *range(3, 71))), pick((1, 1, 2, 3)), pick(TWISTS)
        own = self.family == "own"
        self.how, self.model = pick(OWN_HOW if own else HF_HOW), (self.own() if own else self.pretrained()).double()
        self.layers = next(len(module) for module in self.model.modules() if isinstance(module, nn.ModuleList))
        self.calls = [self.own_call() if own else self.call() for _ in range(pick((1, 1, 2)))]
        if pick((True, False, False)):
            for parameter in self.model.parameters():
                parameter.requires_grad_(pick((True, False)))
        if self.twist == "lora" and not own and self.how != "decoder":
            from peft import LoraConfig, get_peft_model

            target = r".*(q_proj|o_proj|query_key_value|qkv_proj|dense|c_fc|in_proj)"
            self.model = get_peft_model(self.model, LoraConfig(r=2, target_modules=target, init_lora_weights=False)).double()
        if self.twist == "checkpointing" and not own:
            self.model.gradient_checkpointing_enable()
        self.plan = self.draw_plan()

    def own(self) -> LanguageModel:
        draw, pick, windows = self.draw, self.pick, [self.draw.randint(1, 30) for _ in range(2)]
        heads, layers = pick((1, 2, 4)), pick((None, tuple(pick(KINDS) for _ in range(draw.randint(1, 4)))))
        shape = dict(num_heads=heads, num_kv_heads=pick([k for k in (1, 2, 4) if heads % k == 0]), head_dim=4, layers=layers)
        shape |= dict(rope_fraction=pick((0.0, 0.5, 1.0)), num_layers=draw.randint(1, 4), tie_embeddings=pick((True, False)))
        shape |= dict(attention_dropout=pick((0.0, 0.0, 0.3)))
        shape |= dict(window=tuple(windows) if "window" in (layers or ()) else pick((None, (*windows, None))) if layers is None else None)
        shape |= dict(conv_taps=pick((1, 4, 17, 100)), conv_implicit=pick((True, False))) if "conv" in (layers or ()) else {}
        shape |= dict(lact_chunk=pick((1, 4, 16))) if "lact" in (layers or ()) else {}
        model = LanguageModel(ModelConfig(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, **shape))
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
        return model

    def pretrained(self) -> nn.Module:
        pick, given = self.pick, hf_families.FAMILIES.get(self.family, {})
        drawn = dict(tie_word_embeddings=pick((True, False)), num_key_value_heads=pick((1, 2, 4)), num_hidden_layers=pick((1, 2, 3, 4)))
        drawn |= dict(sliding_window=pick((1, 3, 7, 40)), attention_bias=pick((True, False)), attention_dropout=pick((0.0, 0.0, 0.0, 0.2)))
        fixed = {*given} - {"sliding_window"} | ({"num_hidden_layers"} if any("layer" in name for name in given) else set())
        drawn = {name: value for name, value in drawn.items() if name not in fixed}
        self.dropout = bool(drawn.get("attention_dropout"))
        return hf_families.build(self.family, **drawn)

    def labels(self, ids: Tensor) -> Tensor:
        start = self.draw.randint(0, self.tokens - 1)
        masked = self.pick((slice(0, 0), slice(0, 0), slice(0, start), slice(start, start + 16), slice(0, None)))
        labels = ids.masked_fill(torch.rand(ids.shape) < self.pick((0, 0, 0.5)), -100)
        labels[:, masked] = -100
        return labels

    def edges(self) -> list[int]:
        return [0, *sorted(self.draw.choices(range(self.tokens + 1), k=self.draw.randint(1, 4))), self.tokens]

    def own_call(self) -> dict:
        pick, ids = self.pick, torch.randint(VOCAB, (self.batch, self.tokens))
        call = dict(input_ids=ids) | (dict(cu_seqlens=torch.tensor(self.edges())) if self.batch == 1 and pick((True, False)) else {})
        if self.how != "loss":
            at = self.how == "logits" and self.batch == 1 and pick((True, False))
            return call | (dict(logits_at=torch.randint(self.tokens, (5,))) if at else {})
        call |= dict(labels=self.labels(ids), **pick((dict(), dict(normalizer=17), dict(reduction="sum"), dict(reduction="none"))))
        call |= dict(token_weights=torch.rand(ids.shape)) if pick((True, False, False)) else {}
        options = dict(softcap=pick((None, 3.0)), z_loss=pick((0.0, 0.1)), label_smoothing=pick((0.0, 0.2)))
        return call | (dict(loss_options=LossOptions(**options)) if pick((True, False, False)) else {})

    def call(self) -> dict:
        pick, shape = self.pick, (self.batch, self.tokens)
        ids, mask = torch.randint(3, VOCAB, shape), torch.ones(shape, dtype=pick((torch.int64, torch.bool)))
        call = dict(input_ids=ids, labels=self.labels(ids), use_cache=False)
        rows = pick(("", "", "packed", "cu", "ones", "left", "right", "shifted"))
        if rows in ("left", "right"):
            for row in range(self.batch):
                pads = self.draw.randint(0, self.tokens - 1)
                mask[row, slice(0, pads) if rows == "left" else slice(self.tokens - pads, None)] = 0
                call["labels"][row, pads if rows == "left" else 0] = -100  # the last padding token predicts nothing
            call["labels"][mask == 0] = -100
        if rows in ("left", "right", "ones"):
            call |= dict(attention_mask=mask) | (dict(position_ids=(mask.long().cumsum(1) - 1).clamp_min(0)) if pick((True, False)) else {})
        elif rows == "shifted":
            call["position_ids"] = torch.arange(3, self.tokens + 3)[None]
        elif rows:
            edges = [self.edges() for _ in range(self.batch if rows == "packed" else 1)]
            call["position_ids"] = torch.stack([torch.cat([torch.arange(b - a) for a, b in zip(e, e[1:])]) for e in edges])
            if rows == "cu" and self.batch == 1:
                call |= dict.fromkeys(CU_SEQLENS, torch.tensor(edges[0], dtype=torch.int32))
        call |= dict(num_items_in_batch=pick((7, torch.tensor(7)))) if pick((True, False, False)) else {}
        call |= dict(output_router_logits=True) if "num_experts" in hf_families.FAMILIES[self.family] and pick((True, False, False)) else {}
        if self.how != "logprobs" and self.twist not in LOSSY and pick((True, False, False, False)):
            width = self.model.get_input_embeddings().weight.shape[1]
            call["inputs_embeds"] = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
            del call["input_ids"]
        return call

    def draw_plan(self) -> lt.Plan:
        draw, pick, tokens, offload = self.draw, self.pick, self.tokens, None
        chunk = pick((1, 2, 3, 5, 8, 13, draw.randint(1, tokens), tokens, tokens + 7))
        share = lambda: pick((0.0, 1.0, 1.0, round(draw.random(), 2)))
        each = lambda: pick((share(), tuple(share() for _ in range(self.layers))))
        if self.twist in LOSSY and "num_experts" in hf_families.FAMILIES.get(self.family, ()):
            self.twist = "offload"  # a rounding may choose another expert
        if self.twist in ("fp8", "offload"):
            offload = replace(fuzz_offload.draw_offload(draw, self.layers, tempfile.gettempdir()), staging_bytes=1 << 20)
            pressed = lambda splits: tuple(replace(split, compress=True) for split in splits)
            offload = replace(offload, inputs=pressed(offload.inputs), outputs=pressed(offload.outputs)) if self.twist == "fp8" else offload
        bounds = ("stream",) if offload else ("tensor", "tensor", "stream") if self.how == "hidden" else ("stream", "stream", "tensor")
        return lt.Plan(
            chunk_tokens=chunk, segment_layers=pick((1, 1, 1, 2, 3)), store_outputs=each(), store_kv=pick((0.0, each())), offload=offload,
            kv_block_tokens=pick((None, None, None, chunk, 3 * chunk)), boundaries=pick(bounds),
            loss_chunk_tokens=pick((None, 1, 7, draw.randint(1, tokens))), layer_fallback=pick(("error", "unstreamed")),
        )  # fmt: skip
