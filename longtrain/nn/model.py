"""A Llama-style language model whose step can be streamed along the sequence; loads and saves Llama-style safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtrain.nn.config import ModelConfig
from longtrain.nn.decoder import Decoder
from longtrain.nn.ends import TokenLoss
from longtrain.ops.linear_cross_entropy import LossOptions
from longtrain.span import Layout


@dataclass(slots=True)
class ModelOutput:
    """`loss`: scalar (``[B, T]`` per-token losses for reduction "none") when labels were given; `logits [B, T, V]` otherwise."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class LanguageModel(nn.Module):
    """Decoder-only language model. Parameter names are those of Hugging Face's Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.token_loss = TokenLoss()
        self.make_layout = Layout.make
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                own = config.embedding_range if isinstance(module, nn.Embedding) else None
                nn.init.normal_(module.weight, std=own or config.initializer_range)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        token_weights: Tensor | None = None,
        reduction: str = "mean",
        loss_options: LossOptions = LossOptions(),
        logits_at: Tensor | None = None,
    ) -> ModelOutput:
        """Loss of predicting each next token, or logits when `labels` is None.

        `input_ids`, `labels`, `token_weights`: ``[B, T]``, labels at the same positions as the ids (the shift is inside), -100
        ignored. `cu_seqlens [documents + 1]`: packed documents, B = 1; attention, positions and loss stay inside each.
        `normalizer`: what the summed loss is divided by; by default the valid targets of this call. `token_weights[t]` weighs the
        loss of predicting token t. `logits_at [N]`: without labels, positions of the one row whose logits ``[N, V]`` are formed, instead of
        all; of a sequence that processes share, each has those of its own positions and zeros for the others.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, tokens], found shape {list(input_ids.shape)}")
        if cu_seqlens is not None and input_ids.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs documents into one row: batch must be 1, found {input_ids.shape[0]}")
        for name, tensor in (("labels", labels), ("token_weights", token_weights)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(f"{name} must have input_ids' shape {list(input_ids.shape)}, found {list(tensor.shape)}")
        documents = self.make_layout(input_ids.shape[1], cu_seqlens)
        dropout_seed = None
        if self.training and self.config.attention_dropout > 0:
            dropout_seed = int(torch.randint(2**62, ()))
        hidden_BTE = self.model(documents.take(input_ids), documents, dropout_seed, to_loss=labels is not None)
        if labels is None and logits_at is not None:
            place_N = documents.places(logits_at)
            logits_NV = self.lm_head(self.model.norm(hidden_BTE[0, place_N.clamp_min(0)]))
            return ModelOutput(logits=logits_NV.masked_fill(place_N[:, None] < 0, 0))
        if labels is None:
            return ModelOutput(logits=self.lm_head(self.model.norm(hidden_BTE)))
        weights_BT = None
        if token_weights is not None:
            weights_BT = torch.zeros_like(token_weights)
            weights_BT[:, :-1] = token_weights[:, 1:]
            weights_BT = documents.take(weights_BT)
        loss = self.token_loss(
            hidden_BTE,
            self.model.norm,
            self.lm_head,
            documents.take(documents.next_token_targets(labels)),
            normalizer=normalizer,
            token_weights_BT=weights_BT,
            reduction=reduction,
            options=loss_options,
        )
        return ModelOutput(loss=loss)

    def save_safetensors(self, path: str | Path) -> None:
        """Write the weights under their Llama names; a tied head is written once, as the embedding."""
        state = self.state_dict()
        if self.config.tie_embeddings:
            del state["lm_head.weight"]
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, str(path), metadata={"format": "pt"})

    def load_safetensors(self, path: str | Path) -> None:
        """Read weights written by `save_safetensors` or by Hugging Face's Llama. Raises ValueError naming what is missing or extra."""
        state = load_file(str(path))
        if self.config.tie_embeddings and "model.embed_tokens.weight" in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        own = self.state_dict()
        wrong = [f"{n}: {list(state[n].shape)} for {list(own[n].shape)}" for n in own if n in state and state[n].shape != own[n].shape]
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra or wrong:
            raise ValueError(
                f"{path} does not fit this model: missing {missing[:3] or 'none'}, not in the model {extra[:3] or 'none'}, "
                f"wrong shape {wrong[:3] or 'none'}; check the model section against the checkpoint's config"
            )
        self.load_state_dict(state)
