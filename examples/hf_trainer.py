"""transformers' Trainer on long sequences: `lt.apply` before the trainer, nothing else changes.

    python examples/hf_trainer.py                 # a tiny random Qwen3, a few seconds on a CPU
    python examples/hf_trainer.py path/to/model   # your own checkpoint, bfloat16

Gradient checkpointing must stay off (streaming recomputes by itself), and the KV cache is turned off by `apply`.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainingArguments

import longtrain as lt

TOKENS, STEPS = 2048, 5


def load() -> torch.nn.Module:
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


def main() -> None:
    model = load()
    report = lt.apply(model, lt.Plan(chunk_tokens=TOKENS // 8))
    print(report)
    # Every document counts up from a random token: what a model can learn in a few steps.
    starts = torch.randint(512, (STEPS * 2,)).tolist()
    rows = [(torch.arange(TOKENS) + start) % 512 for start in starts]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        Trainer(model, arguments, train_dataset=[dict(input_ids=row, labels=row) for row in rows]).train()


if __name__ == "__main__":
    main()
