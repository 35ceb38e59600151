"""Twenty steps, predicted and then run: peak of the ledger, resident memory, time.

    python tools/predicted_measured.py --path /scratch             # the memory of those that are not there yet
    python tools/predicted_measured.py --only 3 7 --redo           # of these again
    python tools/predicted_measured.py --most-tokens 4096 --out FILE    # of shorter ones, in minutes
    python tools/predicted_measured.py --table                     # the table again
    python tools/predicted_measured.py --path /scratch --times     # how long they take, on a machine that does nothing else

Shapes, lengths and plans are drawn with a fixed seed: 2 to 16 layers, 4K to 128K tokens, windows where the square of the length would take
minutes; every third one is a model of transformers, and those of every fourth have stored tensors on disk. Each runs in a process of its
own, which writes what it predicts before it takes a step: bytes of the ledger (what torch's allocator gives out, parameters included) and
resident memory (that, what the process held beside the model, and what extents take beside their tensors). Then AdamW steps: the first, of
two chunks, makes moments; the resident peak of the second is read (VmHWM); the third is watched by lt.profile. malloc gives back at once
what is freed (`EXACT`). With --times each process calibrates (what `longtrain calibrate` does), predicts seconds, and then times three
steps, of which the median counts; malloc keeps what is freed (`TIMED`).

Bounds: ledger 3%, resident the larger of 3% and 32 MiB, ledger unattributed 2%, time 15%.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "predicted_measured.json"
SEED, COUNT, MIB = 9, 20, 2**20
BOUNDS = {"ledger": 0.03, "resident": 0.03, "unattributed": 0.02, "seconds": 0.15}
LENGTHS, LAYERS = (4096, 8192, 16384, 32768, 65536, 131072), (2, 3, 4, 6, 8, 12, 16)
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives back what is freed, so that what is resident is in use. It makes steps up to twice as long, by more or less from process to
process."""
TIMED = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 * MIB)}
TIMED |= {"OMP_NUM_THREADS": "1"}
"""It keeps what is freed; other cores are left to transfers."""
FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "olmo2", "phi3")
MOST_FLOP = 2e12
"""Of a step: half a minute of one core."""


@dataclass(frozen=True, slots=True)
class Case:
    number: int
    family: str
    """Of transformers, or "own"."""
    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    window: int | None
    dtype: str
    tokens: int
    plan: dict
    disk: bool

    def __str__(self) -> str:
        plan = ", ".join(f"{key} {value}" for key, value in self.plan.items() if key != "chunk_tokens")
        return (
            f"{self.family} L{self.layers} E{self.hidden} F{self.ffn} V{self.vocab} H{self.heads}/{self.kv_heads} {self.dtype}"
            + (f" window {self.window}" if self.window else "")
            + f", T {self.tokens}, C {self.plan['chunk_tokens']}, {plan}"
            + (", disk" if self.disk else "")
        )


def cases() -> list[Case]:
    draw = random.Random(SEED)
    found = []
    for number in range(COUNT):
        family = FAMILIES[number // 3 % len(FAMILIES)] if number % 3 == 2 else "own"
        tokens, layers, heads = LENGTHS[(number + number // 6) % len(LENGTHS)], draw.choice(LAYERS), draw.choice((2, 4))
        dim = draw.choice((32, 64))
        hidden, vocab = heads * dim * draw.choice((1, 2)), draw.choice((256, 2048, 8192))
        while layers > 2 and flop(layers, hidden, 3 * hidden, vocab, tokens, 512) > MOST_FLOP:
            layers -= 1
        can_window = family in ("own", "mistral")
        window = 512 if can_window and flop(layers, hidden, 3 * hidden, vocab, tokens, None) > MOST_FLOP else None
        while tokens > LENGTHS[0] and flop(layers, hidden, 3 * hidden, vocab, tokens, window) > MOST_FLOP:
            tokens //= 2
        segment = draw.choice([k for k in (1, 1, 2, 4) if k <= layers])
        plan = {"chunk_tokens": draw.choice((256, 512, 1024)), "segment_layers": segment if family != "gemma3_text" else 1,
                "store_outputs": draw.choice((0.0, 0.45, 1.0)), "store_kv": draw.choice((0.0, 1.0))}
        dtype = "bfloat16" if number % 7 == 6 else "float32"
        found.append(
            Case(
                number, family, layers, hidden, 3 * hidden, vocab, heads, draw.choice((1, 2)), window, dtype, tokens, plan, number % 4 == 3
            )
        )
    return found


def flop(layers: int, hidden: int, ffn: int, vocab: int, tokens: int, window: int | None) -> float:
    """Of a step, about."""
    pairs = tokens * min(tokens / 2, window or tokens)
    return layers * (3.5 * 4 * hidden * pairs + 8 * tokens * (4 * hidden * hidden + 3 * hidden * ffn)) + 6 * hidden * vocab * tokens


def build(case: Case):
    """The model in the dtype it trains in, on the CPU."""
    import torch

    torch.manual_seed(case.number)
    if case.family == "own":
        from longtrain.nn import LanguageModel, ModelConfig

        model = LanguageModel(ModelConfig(
            vocab_size=case.vocab, num_layers=case.layers, hidden_size=case.hidden, intermediate_size=case.ffn, num_heads=case.heads,
            num_kv_heads=case.kv_heads, window=(case.window,) if case.window else None))  # fmt: skip
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(
            vocab_size=case.vocab,
            hidden_size=case.hidden,
            intermediate_size=case.ffn,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            max_position_embeddings=max(LENGTHS),
            use_cache=False,
            head_dim=case.hidden // case.heads,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        window = {"sliding_window": case.window} if case.window else {"sliding_window": 512} if case.family == "gemma3_text" else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.family, **settings, **window))
    return model.to(getattr(torch, case.dtype)).train()


def child(case: Case, out: Path, path: str, times: bool) -> None:
    """Predicts, writes that, then measures; `times`: seconds alone."""
    import torch
    from step_process import status_bytes

    import longtrain as lt
    from longtrain.offload import check_disk
    from longtrain.planner import measure_model, peak, step_memory
    from longtrain.planner.calibrate import calibrate
    from longtrain.planner.cost import extents_bytes
    from longtrain.planner.seconds import step_time
    from longtrain.train.peak_memory import read_peak, reset_peak

    model = build(case)
    settings = dict(case.plan)
    if case.disk:
        disk = lt.DiskSettings(path=path, budget=1 << 32)
        check_disk(disk)
        away = lt.Split(device=0.25)
        settings["offload"] = lt.Offload(inputs=away, outputs=lt.Split(), gradients=away, disk=disk, staging_bytes=8 * MIB)
    plan = lt.Plan(**settings)
    footprint = measure_model(model, 2 * next(model.parameters()).element_size())  # torch's AdamW has its moments in the weights' dtype
    phases = step_memory(footprint, plan, case.tokens)
    top = peak(phases)
    held = status_bytes("VmRSS")
    ledger = top.total - top.items["workspace"]
    beside = extents_bytes(footprint, plan, case.tokens)
    predicted = {"ledger": ledger, "resident": held - footprint.parameters + ledger + beside, "phase": top.name}
    if times:
        machine = calibrate(torch.device("cpu"), getattr(torch, case.dtype), Path(path), say=lambda text: None)
        predicted["seconds"] = step_time(footprint, plan, case.tokens, 1, machine.rates).total
    out.write_text(json.dumps({"predicted": predicted}))

    report = lt.apply(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(case.vocab, (1, case.tokens), generator=torch.Generator().manual_seed(case.number))

    def step(tokens: int = case.tokens) -> None:
        model(input_ids=ids[:, :tokens], labels=ids[:, :tokens]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(2 * plan.chunk_tokens)
    gc.collect()
    reset_peak(torch.device("cpu"))
    taken = []
    for _ in range(3 if times else 1):
        began, cpu = time.perf_counter(), time.process_time()
        step()
        taken.append((time.perf_counter() - began, time.process_time() - cpu))
    seconds, cpu_seconds = sorted(taken)[len(taken) // 2]
    if times:
        out.write_text(json.dumps({"predicted": predicted, "measured": {"seconds": seconds, "cpu_seconds": cpu_seconds}}))
        return
    measured = {"resident": read_peak(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as directory:
        with lt.profile(directory, quiet=True, predicted=phases) as watched:
            step()
        top = watched.result["peak"]
        measured |= {"ledger": top["bytes"], "phase": top["phase"], "unattributed": top["unattributed"], "by_category": top["by_category"]}
    measured["phases"] = [(r["phase"], r["predicted"], r["measured"]) for r in watched.result["phases"]]
    report.undo()
    out.write_text(json.dumps({"predicted": predicted | {"items": phases_of(phases)}, "measured": measured}))


def phases_of(phases) -> dict:
    return {phase.name: phase.items for phase in phases}


def run_case(case: Case, path: str, times: bool = False) -> dict:
    """What its process wrote; only the prediction, and the error, where it died."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "case.json"
        command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), str(out), "--path", path, *["--times"] * times]
        done = subprocess.run(command, env=os.environ | (TIMED if times else EXACT), capture_output=True, text=True)
        found = json.loads(out.read_text()) if out.exists() else {}
    return found | ({"error": done.stderr[-2000:]} if done.returncode else {}) | {"case": str(case)}


def with_times(before: dict, found: dict) -> dict:
    """The seconds of `found` in place of those that were there."""
    parts = {part: before[part] | {k: v for k, v in found.get(part, {}).items() if "seconds" in k} for part in ("predicted", "measured")}
    return before | parts | {key: found[key] for key in ("error",) if key in found}


def table(results: dict[str, dict], which: list[Case]) -> str:
    """Markdown; a bound that is not kept is marked with !."""
    lines = [
        "| # | step | ledger, MiB: predicted, measured | error | resident | error | unattributed | s: predicted, measured | error |",
        "|" + "---|" * 9,
    ]
    broken = 0
    for case in which:
        found = results.get(str(case.number), {})
        if "measured" not in found:
            lines.append(
                f"| {case.number} | {case} | {'died: ' + found['error'].strip().splitlines()[-1] if 'error' in found else 'not run yet'} |"
                + " |" * 6
            )
            broken += "error" in found
            continue
        p, m = found["predicted"], found["measured"]
        cells = [str(case.number), str(case)]
        for key in ("ledger", "resident"):
            error = p[key] / m[key] - 1
            allowed = max(BOUNDS[key], 32 * MIB / m[key] if key == "resident" else 0)
            broken += abs(error) > allowed
            cells += [f"{p[key] / MIB:,.1f}, {m[key] / MIB:,.1f}", f"{error:+.1%}{' !' * (abs(error) > allowed)}"]
        share = m["unattributed"] / m["ledger"]
        broken += share > BOUNDS["unattributed"]
        cells.append(f"{share:.2%}{' !' * (share > BOUNDS['unattributed'])}")
        if "seconds" in p:
            error = p["seconds"] / m["seconds"] - 1
            broken += abs(error) > BOUNDS["seconds"]
            cells += [f"{p['seconds']:.2f}, {m['seconds']:.2f}", f"{error:+.1%}{' !' * (abs(error) > BOUNDS['seconds'])}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{broken} bounds not kept"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="these of the twenty")
    parser.add_argument("--redo", action="store_true", help="run again what is there already")
    parser.add_argument(
        "--times", action="store_true", help="measure again only how long the steps take that are there already, and predict that again"
    )
    parser.add_argument("--most-tokens", type=int, default=max(LENGTHS), help="shorten the sequences to this")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--path", default=".", help="a directory on a disk")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.child:
        child(Case(**json.loads(a.child[0])), Path(a.child[1]), a.path, a.times)
        return 0
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    chosen = [replace(case, tokens=min(case.tokens, a.most_tokens)) for case in cases() if a.only is None or case.number in a.only]
    for case in chosen:
        before = results.get(str(case.number), {})
        if not a.table and (("measured" in before) if a.times else (a.redo or "measured" not in before)):
            print(f"{case.number}: {case}", file=sys.stderr, flush=True)
            found = run_case(case, a.path, a.times)
            results[str(case.number)] = with_times(before, found) if a.times else found
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results, chosen)
    print(text)
    if a.only is None:
        shorter = f" --most-tokens {a.most_tokens} --out {a.out.name}" if a.most_tokens < max(LENGTHS) else ""
        a.out.with_suffix(".md").write_text(f"`python tools/predicted_measured.py{shorter}`\n\n{text}\n")
    return 0 if text.endswith("\n0 bounds not kept") else 1


if __name__ == "__main__":
    sys.exit(main())
