"""torch.compile of a streamed model's pieces: norms, attention's projections and MLPs, each for the one shape of a chunk.

    python examples/hf_compile.py                 # a tiny random Qwen3; most of the minute is the compiler's

Attention itself, and what streams, stay as they are. Pieces see one shape (the chunk), with and without gradients: everything is compiled
in the first two steps. Give sequences a length that the chunk divides, or the last chunk has a shape of its own.
"""

import time

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import longtrain as lt

TOKENS, CHUNK, STEPS = 2048, 256, 5


def main() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )
    print(lt.apply(model, lt.Plan(chunk_tokens=CHUNK)))
    for layer in model.model.layers:
        for piece in layer.children():
            piece.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        ids = (torch.arange(TOKENS)[None] + torch.randint(512, (1, 1))) % 512
        started = time.perf_counter()
        # what would be compiled again from the third step on is an error here, so that nobody misses it
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: 'loss': {float(loss.detach()):.4f}, {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
