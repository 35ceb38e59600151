"""A training loop of one's own with accelerate: bfloat16 autocast, accumulation, and MLPs whose products are made of 8-bit floats.

    python examples/accelerate_loop.py                                # a tiny random Llama, seconds on a CPU
    accelerate launch --num_processes 2 examples/accelerate_loop.py   # DDP; each process its own sequences

`lt.apply` comes before `prepare`. Losses are sums over the targets of all micro-batches, divided by their number: `num_items_in_batch`.
"""

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import longtrain as lt

TOKENS, STEPS, ACCUMULATE = 2048, 5, 2


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".mlp." in name:
            scaled = lt.nn.FP8Linear(module.in_features, module.out_features, bias=False)
            scaled.load_state_dict(module.state_dict())
            model.set_submodule(name, scaled)
    report = lt.apply(model, lt.Plan(chunk_tokens=TOKENS // 8))
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATE, cpu=not torch.cuda.is_available())
    accelerator.print(report)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    torch.manual_seed(accelerator.process_index)
    for step in range(STEPS):
        # Every document counts up from a random token: what a model can learn in a few steps.
        rows = [(torch.arange(TOKENS)[None] + int(torch.randint(512, ()))).to(accelerator.device) % 512 for _ in range(ACCUMULATE)]
        targets, total = sum(row.shape[1] - 1 for row in rows), 0.0
        for row in rows:
            with accelerator.accumulate(model):
                # accelerate divides by the number of micro-batches, DDP by that of processes
                loss = model(input_ids=row, labels=row, num_items_in_batch=targets / ACCUMULATE).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += float(loss.detach()) / ACCUMULATE
        accelerator.print(f"step {step}: 'loss': {total:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
