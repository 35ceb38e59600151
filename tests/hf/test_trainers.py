"""Real trainers on tiny random models: the same losses with and without longtrain."""

import hf_families
import pytest
import torch

import longtrain as lt

PLAN = lt.Plan(chunk_tokens=8, loss_chunk_tokens=8)
WORDS = [f"w{i}" for i in range(3, hf_families.VOCAB)]
CLOSE = 1e-4
"""Relative, on float32 losses after up to 20 steps, which double a difference in the seventh digit several times. Adam's eps is 1e-3: with
1e-8, rounding in a gradient of nothing else moves a weight by the whole learning rate."""


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w3")


def text(generator, low=6, high=24):
    words = torch.randint(len(WORDS), (int(torch.randint(low, high, (), generator=generator)),), generator=generator)
    return " ".join(WORDS[i] for i in words)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def settings(tmp_path, **changes):
    return dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        gradient_checkpointing=False,
        **changes,
    )


def model(applied, family="llama", **changes):
    built = hf_families.build(family, **changes).float()
    return built, lt.apply(built, PLAN) if applied else None


def assert_same(with_longtrain, without, steps):
    assert len(without) == steps and len(set(without)) > 1
    assert with_longtrain == pytest.approx(without, rel=CLOSE, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_of_transformers(tmp_path, accumulate):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [dict(input_ids=row, labels=row) for row in torch.randint(3, hf_families.VOCAB, (8, 29))]

    def run(applied):
        arguments = TrainingArguments(**settings(tmp_path, max_steps=4, gradient_accumulation_steps=accumulate))
        trainer = Trainer(model(applied)[0], arguments, train_dataset=data, eval_dataset=data[:4])
        return [*losses(trainer), trainer.evaluate()["eval_loss"]]

    assert_same(run(True), run(False), 5)


@pytest.mark.slow
def test_a_loop_of_accelerate():
    """In float32: accelerate's state is one for the process. Its autocast is in examples/accelerate_loop.py."""
    accelerate = pytest.importorskip("accelerate")
    rows = torch.randint(3, hf_families.VOCAB, (4, 2, 29), generator=torch.Generator().manual_seed(0))

    def run(applied):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        built = model(applied)[0]
        built, optimizer = accelerator.prepare(built, torch.optim.AdamW(built.parameters(), lr=1e-3))
        found = []
        for row in rows:
            with accelerator.accumulate(built):
                out = built(input_ids=row, labels=row)
                accelerator.backward(out.loss)
                accelerator.clip_grad_norm_(built.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            found.append(float(out.loss.detach()))
        return found

    assert_same(run(True), run(False), 4)


def test_lora_has_adapter_gradients_alone():
    peft = pytest.importorskip("peft")
    built = peft.get_peft_model(hf_families.build("llama"), peft.LoraConfig(r=4, target_modules="all-linear")).double()
    for name, parameter in built.named_parameters():
        if "lora_B" in name:  # starts at zero, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.2)
    for _, batch in hf_families.batches():
        own = hf_families.gradients(built, batch, use_cache=False)
        report = lt.apply(built, PLAN)
        streamed = hf_families.gradients(built, batch)
        report.undo()
        assert hf_families.difference(streamed, own) <= 1e-6
        assert all("lora_" in name for name in streamed if name != "loss") and len(streamed) == 1 + 3 * 7 * 2


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_sft_of_trl(tmp_path, packing):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    data = datasets.Dataset.from_list([dict(prompt=text(generator), completion=" " + text(generator)) for _ in range(40)])

    def run(applied):
        arguments = trl.SFTConfig(**settings(tmp_path, max_steps=20, packing=packing, max_length=48, padding_free=packing))
        return losses(trl.SFTTrainer(model(applied)[0], arguments, train_dataset=data, processing_class=tokenizer()))

    assert_same(run(True), run(False), 20)


@pytest.mark.slow
def test_dpo_of_trl(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    rows = [dict(prompt=text(generator), chosen=" " + text(generator), rejected=" " + text(generator)) for _ in range(40)]

    def run(applied):
        arguments = trl.DPOConfig(**settings(tmp_path, max_steps=20, max_length=48))
        reference = model(applied)[0]
        return losses(
            trl.DPOTrainer(
                model(applied)[0], reference, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
            )
        )

    assert_same(run(True), run(False), 20)


@pytest.mark.slow
def test_grpo_of_trl(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    data = datasets.Dataset.from_list([dict(prompt=text(generator, 4, 9)) for _ in range(40)])

    def reward(completions, **unused):
        return [float(sum("5" in word for word in c.split())) + 0.1 * len(c) for c in completions]

    def run(applied):
        policy = hf_families.build("llama").float()
        policy.save_pretrained(tmp_path / "reference")  # the trainer loads its reference from where the policy came from
        policy.config._name_or_path = str(tmp_path / "reference")
        arguments = trl.GRPOConfig(
            **settings(tmp_path, max_steps=20, num_generations=2, max_completion_length=12, beta=0.05, temperature=0.9)
        )
        trainer = trl.GRPOTrainer(policy, reward, arguments, train_dataset=data, processing_class=tokenizer())
        if applied:
            lt.apply(policy, PLAN), lt.apply(trainer.ref_model, PLAN)
        return losses(trainer)

    assert_same(run(True), run(False), 20)


@pytest.mark.slow
def test_gradient_checkpointing_of_a_trainer_is_refused(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [dict(input_ids=row, labels=row) for row in torch.randint(3, hf_families.VOCAB, (4, 29))]
    arguments = TrainingArguments(**settings(tmp_path, max_steps=1) | dict(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="gradient_checkpointing=False"):
        Trainer(model(True)[0], arguments, train_dataset=data).train()
