"""What profiling costs: processor time of a step without, with a sampling and with a complete profile, in turn; medians.

    OMP_NUM_THREADS=1 python tools/bench_profile.py [--seq-len 4096] [--chunk 512] [--rounds 5]

Processor seconds of all threads. One of them looks at the process every 25 ms of the clock, so on a machine that does other work too, where
a step takes longer by the clock than by the processor, profiles seem dearer than they are. What a profile does once, before the first step
(a look at all objects) and after the last one (the report), is not part of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("hidden", 256), ("vocab", 4096), ("seq-len", 4096), ("chunk", 512), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args(argv)
    torch.manual_seed(0)
    for kind in ("plain", "streamed"):
        config = ModelConfig(
            vocab_size=a.vocab, num_layers=a.layers, hidden_size=a.hidden, intermediate_size=4 * a.hidden, num_heads=a.hidden // 64,
            num_kv_heads=a.hidden // 64,
        )  # fmt: skip
        model = LanguageModel(config)
        optimizer = torch.optim.AdamW(model.parameters())
        if kind == "streamed":
            lt.apply(model, lt.Plan(chunk_tokens=a.chunk))
        ids = torch.randint(a.vocab, (1, a.seq_len))
        times = measure(lambda: step(model, optimizer, ids), a.rounds)
        alone = statistics.median(times["without"])
        for mode, seconds in times.items():
            print(
                f"{kind:9}{mode:9} {statistics.median(seconds):7.3f} s a step  {statistics.median(seconds) / alone - 1:+6.1%}", flush=True
            )
    return 0


def step(model: LanguageModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(run, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"without": [], "sampling": [], "complete": []}
    run()
    with tempfile.TemporaryDirectory(prefix="longtrain-profile-") as scratch:
        for _ in range(rounds):
            for mode, seconds in times.items():
                with nullcontext() if mode == "without" else lt.profile(scratch, sampling=mode == "sampling", quiet=True):
                    run()
                    began = time.process_time()
                    run()
                    seconds.append(time.process_time() - began)
    return times


if __name__ == "__main__":
    sys.exit(main())
