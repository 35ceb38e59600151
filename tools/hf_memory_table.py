"""Memory of a streamed step of Qwen3-8B's shape, bytes a token by part, predicted and measured: python tools/hf_memory_table.py [--write]

Measured are one and two layers of the shape with widths divided by --scale (head dim, dtype and code are the real ones), on two lengths:
the slope is what a token costs, the second layer's share is what a further layer costs. What is as wide as the model is multiplied
back by --scale, layers are added up to 36. Every live byte of the step is counted as it is made (a torch dispatch mode), the token store's
by name. With --write the table goes to docs/hf_memory.md; a measured part that is more than 3% off its prediction stops the command.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import longtrain as lt
from longtrain.offload import DeviceStore
from longtrain.plan import Offload, Split
from longtrain.stream.work import Alive

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM = 36, 4096, 12288, 32, 8, 128
CHUNK, LENGTHS, BOUND = 64, (512, 1024), 0.03
STREAMBP, CHECKPOINTING = 0.43e6, 2.33e6
"""Published bytes a token of an 8B model: StreamBP (arXiv:2506.03077), gradient checkpointing."""

AWAY = Offload(inputs=Split(host=1.0), outputs=Split(host=1.0), gradients=Split(host=1.0), host_bytes=2**28)
PLANS = {
    "outputs stored": dict(store_outputs=1.0),
    "outputs computed again": dict(store_outputs=0.0),
    "the same, segments of 4": dict(store_outputs=0.0, segment_layers=4),
    "outputs stored, all in host memory": dict(store_outputs=1.0, offload=AWAY),
}
PARTS = {
    "layer inputs": "2 E a segment",
    "attention outputs and LSE": "2 H D + 4 H a layer stored, or of a segment but its last",
    "gradient of the hidden states": "2 E",
    "keys and values of a segment": "2 x 2 K D a layer",
    "their gradient sums, float32": "2 x 4 K D a layer",
    "ids, labels, positions, rotary tables": "3 x 8 + 2 x 2 D",
}


PEAKS = ("highest point of the forward pass and the loss", "highest point of the backward pass")


def predicted(plan: dict) -> dict[str, float]:
    """Bytes a token in bfloat16 on the device, of all layers, when the backward pass of the last segment begins."""
    k, here = plan.get("segment_layers", 1), "offload" not in plan
    outputs = LAYERS if plan["store_outputs"] else k - 1
    sizes = (
        2 * WIDTH * LAYERS // k * here,
        (2 * HEADS * HEAD_DIM + 4 * HEADS) * outputs * here,
        2 * WIDTH * here,
        4 * KV_HEADS * HEAD_DIM * k,
        8 * KV_HEADS * HEAD_DIM * k,
        24 + 4 * HEAD_DIM,
    )
    return dict(zip(PARTS, map(float, sizes), strict=True))


class AliveByShape(Alive):
    """What each storage was made for, too."""

    def __init__(self) -> None:
        super().__init__()
        self.made_for = weakref.WeakKeyDictionary()

    def count(self, tensors: Sequence[Tensor]) -> None:
        super().count(tensors)
        for tensor in tensors:
            self.made_for.setdefault(tensor.untyped_storage(), (tuple(tensor.shape[2:]), tensor.dtype))

    def of(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of the storages made for tensors ``[B, tokens, *shape]``."""
        return sum(storage.nbytes() for storage, made_for in self.made_for.items() if made_for == (shape, dtype))


class CountedStore(DeviceStore):
    """The device's token store, which tells what it holds under names that begin or end so."""

    def bytes_of(self, *affixes: str) -> int:
        names = [name for name in self.names() if str(name).startswith(affixes) or str(name).endswith(affixes)]
        return sum(extent.tensor.nbytes for name in names for extent in self._extents[name].values())


def measure(layers: int, tokens: int, scale: int, plan: dict) -> dict[str, float]:
    """Bytes by part when the backward of the last segment begins, and at the highest points of both passes."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    kv_heads = KV_HEADS // scale
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(vocab_size=256, hidden_size=WIDTH // scale, intermediate_size=FFN // scale, num_hidden_layers=layers, head_dim=HEAD_DIM,
                    num_attention_heads=HEADS // scale, num_key_value_heads=kv_heads, max_position_embeddings=max(LENGTHS)),
        dtype=torch.bfloat16,
    )
    store = None if "offload" in plan else CountedStore()
    report = lt.apply(model, lt.Plan(chunk_tokens=CHUNK, loss_chunk_tokens=CHUNK, **plan), store=store)
    ids = torch.randint(256, (1, tokens))
    model(input_ids=ids[:, : 2 * CHUNK], labels=ids[:, : 2 * CHUNK]).loss.backward()  # gradients are there from the first step on
    samples = []

    def sample(phase: str, done: int, count: int) -> None:
        if store is None:  # what is on its way out is gone: how much of that there is at a time is a matter of the machine's speed
            report.store.settle()
        if phase != "backward" or done != 1:
            return
        kv, sums = (alive.of((kv_heads, HEAD_DIM), dtype) for dtype in (torch.bfloat16, torch.float32))
        labels = (("input of layer",), ("mixer output", "LSE"), ("gradient of",))
        parts = (*(0 if store is None else store.bytes_of(*label) for label in labels), kv, sums)
        samples.append(dict(zip(PARTS, (*parts, alive.now - sum(parts)), strict=True)))

    report.on_progress(sample)
    with AliveByShape() as alive:
        ids = ids.clone()
        loss = model(input_ids=ids, labels=ids.clone()).loss
        peaks, alive.most = [alive.most], 0
        loss.backward()
    report.undo()
    return {**samples[1], **dict(zip(PEAKS, (*peaks, alive.most), strict=True))}  # the norm behind the layers has its backward first


def per_token(scale: int, plan: dict) -> dict[str, float]:
    """Measured bytes a token of all layers at full width: by part, and at the highest points."""
    k, slopes = plan.get("segment_layers", 1), []
    for layers in (k, 2 * k):
        a, b = (measure(layers, tokens, scale, plan) for tokens in LENGTHS)
        slopes.append({what: (b[what] - a[what]) / (LENGTHS[1] - LENGTHS[0]) for what in a})
    one, two = slopes
    *wide, narrow = PARTS
    grown = {what: one[what] + (LAYERS // k - 1) * (two[what] - one[what]) for what in one}
    # ids and rotary tables are as wide as they are
    return {
        narrow: one[narrow],
        **{what: grown[what] * scale for what in wide},
        **{what: (grown[what] - one[narrow]) * scale + one[narrow] for what in PEAKS},
    }


HEADER = f"""# Memory of a step at Qwen3-8B's shape

Made by `python tools/hf_memory_table.py --write` with transformers {{version}} and torch {{torch}}, on a CPU, bfloat16, widths divided by
{{scale}} and multiplied back: bytes a token of what grows with the sequence, all {LAYERS} layers, when the backward pass of the last
segment begins. Weights, their gradients, and what one chunk of {CHUNK} tokens holds do not grow with it. The loss takes the last hidden
states chunk by chunk from the token store; those that the embedding makes are whole, as the model makes them, until the layers have run.
Last, how many times as much others hold.

"""


def table(scale: int) -> tuple[str, list[str]]:
    """The table in Markdown, and what is off."""
    found = {name: (predicted(plan), per_token(scale, plan)) for name, plan in PLANS.items()}
    lines = [
        "| part | bytes | " + " | ".join(f"{name}: predicted | measured" for name in PLANS) + " |",
        "|---|---|" + "---:|" * 2 * len(PLANS),
    ]
    row = lambda part, formula, pairs: f"| {part} | {formula} | " + " | ".join(f"{a} | {b}" for a, b in pairs) + " |"
    number = lambda size: f"{size:,.0f}"
    for part, formula in PARTS.items():
        lines.append(row(part, formula, [(number(expected[part]), number(measured[part])) for expected, measured in found.values()]))
    lines.append(row("**together**", "", [(number(sum(a.values())), number(sum(b[part] for part in PARTS))) for a, b in found.values()]))
    lines += [row(what, "", [("", number(measured[what])) for _, measured in found.values()]) for what in PEAKS]
    for label, size in (("StreamBP, published", STREAMBP), ("gradient checkpointing, published", CHECKPOINTING)):
        lines.append(
            row(label, number(size), [("", f"{size / max(measured[what] for what in PEAKS):.2f}x") for _, measured in found.values()])
        )
    off = [
        f"{name}, {part}: predicted {expected[part]:,.0f}, measured {measured[part]:,.0f}"
        for name, (expected, measured) in found.items() for part in PARTS
        if abs(measured[part] - expected[part]) > BOUND * sum(expected.values())
    ]
    return "\n".join(lines) + "\n", off


def main(arguments: list[str] | None = None) -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=8, choices=(1, 2, 4, 8), help="widths are divided by this (default 8)")
    parser.add_argument("--write", action="store_true", help="write docs/hf_memory.md")
    options = parser.parse_args(arguments)
    text, off = table(options.scale)
    print(text)
    if off:
        raise SystemExit("more than 3% of the whole off its prediction:\n" + "\n".join(off))
    if options.write:
        path = Path(__file__).resolve().parents[1] / "docs" / "hf_memory.md"
        path.write_text(HEADER.format(version=transformers.__version__, torch=torch.__version__, scale=options.scale) + text)


if __name__ == "__main__":
    main()
