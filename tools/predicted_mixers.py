"""Step time of small models by what mixes their tokens, predicted and measured.

    export OMP_NUM_THREADS=1
    longtrain calibrate --path /scratch --out f32.json
    python tools/predicted_mixers.py --machine f32.json

A decoder of each kind of layer (attention, windows, linear attention, delta rule, test-time training, convolutions short and long) takes
streamed steps; the quickest one's processor seconds are held against the prediction. Bound: 20%.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import longtrain as lt
from longtrain.nn import LanguageModel, ModelConfig
from longtrain.planner import measure_model
from longtrain.planner.machines import find_machine
from longtrain.planner.seconds import step_time

BOUND = 0.2
KINDS = {
    "attention": {},
    "window": {"window": (512,)},
    "linear": {},
    "delta": {},
    "lact": {"lact_chunk": 1024},
    "conv": {"conv_taps": 4},
    "conv, long": {"conv_taps": 4096},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="a file of longtrain calibrate, in float32")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    for name, default in (("seq-len", 8192), ("chunk", 512), ("hidden", 256), ("layers", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args(argv)
    rates, broken = find_machine(a.machine).rates, 0
    print("| layers | predicted, s | measured, s | error | of it mixers |\n|---|---|---|---|---|")
    for kind in a.kinds:
        torch.manual_seed(0)
        heads = a.hidden // 64
        model = LanguageModel(
            ModelConfig(
                vocab_size=256, num_layers=a.layers, hidden_size=a.hidden, intermediate_size=4 * a.hidden, num_heads=heads,
                num_kv_heads=heads, layers=(kind.split(",")[0],), **KINDS[kind],
            )
        )  # fmt: skip
        plan, ids_BT = lt.Plan(chunk_tokens=a.chunk), torch.randint(256, (1, a.seq_len))
        predicted = step_time(measure_model(model), plan, a.seq_len, 1, rates, optimizer="none")
        lt.apply(model, plan)
        taken = []
        for _ in range(1 + a.steps):
            began = time.process_time()
            model(ids_BT, labels=ids_BT).loss.backward()
            taken.append(time.process_time() - began)
            model.zero_grad()
        error = predicted.total / min(taken[1:]) - 1
        mixers = sum(predicted.parts[name] for name in ("attention", "other mixers", "mixed again"))
        broken += abs(error) > BOUND
        mark = " !" * (abs(error) > BOUND)
        print(f"| {kind} | {predicted.total:.2f} | {min(taken[1:]):.2f} | {error:+.1%}{mark} | {mixers:.2f} |", flush=True)
    print(f"\n{broken} bounds not kept")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
