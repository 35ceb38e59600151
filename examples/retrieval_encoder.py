"""A retrieval encoder for long documents, in the setting of M2-BERT (arXiv:2402.07440): Monarch Mixer blocks instead of attention, and a
contrastive loss whose batch is embedded one sample at a time, so that a batch of 8 documents takes the memory of one.

    python examples/retrieval_encoder.py          # 95 s of processor time; finds 26 of 32 documents, before training 3

Documents of 1,024 tokens are three quarters common tokens; the others are of the document's own subject, four of 32 rare tokens. A query is
16 tokens of that subject in another language, which has its own token for each: what belongs together has to be learned. Documents and
queries are new at every step, and at the end.
"""

import torch
from torch import Tensor, nn

import longtrain as lt
from longtrain.contrastive import backward_by_sample, info_nce
from longtrain.nn import MonarchMixerBlock, RMSNorm, parameter_groups

COMMON, RARE, SUBJECT = 32, 32, 4
TOKENS, QUERY_TOKENS, WIDTH, LAYERS, PAIRS, STEPS = 1024, 16, 64, 2, 8, 100


class RetrievalEncoder(nn.Module):
    """Token ids ``[T]`` to an embedding ``[E]``: blocks that see the whole document, mean over its tokens, a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(COMMON + 2 * RARE, WIDTH)
        self.layers = nn.ModuleList(MonarchMixerBlock(WIDTH, TOKENS, layer_index=i) for i in range(LAYERS))
        self.norm, self.project = RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids_T: Tensor) -> Tensor:
        x_BTE = self.embed(ids_T)[None]
        for layer in self.layers:
            x_BTE = layer(x_BTE)
        return self.project(self.norm(x_BTE[0].mean(0)))


def make_pairs(pairs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and their documents."""
    queries, documents = [], []
    for _ in range(pairs):
        subject = COMMON + torch.randperm(RARE)[:SUBJECT]
        own = subject[torch.randint(SUBJECT, (TOKENS,))]
        documents.append(torch.where(torch.rand(TOKENS) < 0.75, torch.randint(COMMON, (TOKENS,)), own))
        queries.append(RARE + subject[torch.randint(SUBJECT, (QUERY_TOKENS,))])
    return queries, documents


@torch.no_grad()
def share_found(encoder: nn.Module, pairs: int) -> float:
    """How often a query's own document is nearest among `pairs` new ones."""
    queries, documents = (torch.stack([encoder(ids) for ids in side]) for side in make_pairs(pairs))
    cosine = nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(documents, dim=-1).mT
    return float((cosine.argmax(1) == torch.arange(pairs)).float().mean())


def main() -> None:
    torch.manual_seed(0)
    encoder = RetrievalEncoder()
    print(lt.apply(encoder, lt.Plan(chunk_tokens=512)))
    print(f"found among 32 before training: {share_found(encoder, 32):.3f} (chance {1 / 32:.3f})")
    optimizer = torch.optim.AdamW(parameter_groups(encoder, lr=6e-3, weight_decay=0.01))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for step in range(STEPS):
        queries, documents = make_pairs(PAIRS)
        loss = backward_by_sample(encoder, queries + documents, lambda e: info_nce(e[:PAIRS], e[PAIRS:]))
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {float(loss):.3f}", flush=True)
    print(f"found among 32 after training: {share_found(encoder, 32):.3f}")


if __name__ == "__main__":
    main()
