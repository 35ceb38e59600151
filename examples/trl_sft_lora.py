"""Supervised fine-tuning with TRL and a PEFT adapter on long conversations: PEFT first, then `lt.apply`, then the trainer.

    python examples/trl_sft_lora.py               # a tiny random Llama and a word tokenizer, under a minute on a CPU

The same two lines serve `DPOTrainer` and `GRPOTrainer` (apply the reference model too). TRL turns gradient checkpointing on by default:
`gradient_checkpointing=False` is required.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import longtrain as lt

WORDS = [f"w{i}" for i in range(200)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=203,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=8, target_modules="all-linear"))
    print(lt.apply(model, lt.Plan(chunk_tokens=128)))
    rows = [dict(prompt=" ".join(WORDS[i : i + 40]), completion=" " + " ".join((WORDS * 4)[i : i + 400])) for i in range(0, 160, 4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=5,
            per_device_train_batch_size=2,
            max_length=512,
            packing=True,
            padding_free=True,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            disable_tqdm=True,
        )
        SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer()).train()


if __name__ == "__main__":
    main()
