"""TRL's DPO and GRPO trainers on long sequences, the policy's frozen weights in 4 bits beside a PEFT adapter (for DPO).

    python examples/trl_dpo_grpo.py               # tiny random Llamas and a word tokenizer, under a minute on a CPU

`lt.apply` the policy, and the reference where there is one: of an adapter, the reference is the policy without it. TRL turns gradient
checkpointing on by default: `gradient_checkpointing=False` is required.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl_sft_lora import WORDS, word_tokenizer

import longtrain as lt

PLAN = lt.Plan(chunk_tokens=128, loss_chunk_tokens=128)
COMMON = dict(
    per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", gradient_checkpointing=False,
    bf16=False, disable_tqdm=True,
)  # fmt: skip


def policy() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=203,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def dpo(folder: str) -> None:
    model = policy()
    print(f"{lt.nn.freeze_linears(model, 'nf4')} linear layers in 4 bits")
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    print(lt.apply(model, PLAN))
    answer = lambda start: " " + " ".join((WORDS * 3)[start : start + 300])
    rows = [dict(prompt=" ".join(WORDS[i : i + 40]), chosen=answer(i + 40), rejected=answer(i + 90)) for i in range(0, 100, 5)]
    arguments = DPOConfig(folder, max_steps=5, max_length=400, **COMMON)
    DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer()).train()


def grpo(folder: str) -> None:
    model = policy()
    model.save_pretrained(folder)  # the trainer loads its reference from where the policy came from
    model.config._name_or_path = folder
    rewards = lambda completions, **unused: [float(text.count("w7 ") + text.count("w1")) for text in completions]
    rows = [dict(prompt=" ".join(WORDS[i : i + 40])) for i in range(20)]
    arguments = GRPOConfig(folder, max_steps=3, num_generations=2, max_completion_length=100, beta=0.04, **COMMON)
    trainer = GRPOTrainer(model, rewards, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer())
    for each in (model, trainer.ref_model):
        lt.apply(each, PLAN)
    trainer.train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        dpo(str(Path(directory) / "dpo"))
        grpo(str(Path(directory) / "grpo"))
