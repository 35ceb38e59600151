"""Drawn models, plans and calls, streamed and not: loss, logits and every gradient agree, or one clear error says why not.

    python tools/fuzz_stream.py --count 300                       # cases 0 to 299; one that fails prints the command that repeats it
    python tools/fuzz_stream.py --families own qwen3_next         # these only; "own" are longtrain's models

All is computed in float64, and what transformers converts to float32 stays as it is on both sides (`Wide`), so BOUND holds for every
family. Under autocast gradients may be twice as far from the float64 ones as the plain model's are; stored in FP8, as far as four roundings
of what every layer is given. Exit status 1 where a case was wrong, or ended in an error that is not clear.
"""

import argparse
import copy
import gc
import re
import sys
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import fuzz_offload
import hf_families
from fuzz_stream_cases import LOSSY, Case

import longtrain as lt
from longtrain.hf.layer import CU_SEQLENS

BOUND, SMALL = 1e-10, 1e-3
"""BOUND: relative norm; float64 rounds at 1.1e-16, sums have under 10^4 terms, and random weights take that up by less than 100. A tensor
whose gradient is less than the share SMALL of all gradients is held to that share: its rounding is that of larger numbers."""
FAMILIES = ["own"] * (len(hf_families.FAMILIES) // 2) + list(hf_families.FAMILIES)


class Wide(TorchDispatchMode):
    """Whatever would become float32 becomes float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def waves(x: Tensor) -> Tensor:
    return (x * torch.sin(torch.arange(x.numel(), dtype=x.dtype).view(x.shape))).sum()


def outcome(case: Case, model: nn.Module, call: dict, found: dict[str, Tensor], name: str) -> Tensor:
    """A number made of one call's result, in the drawn way; logits go into `found`."""
    without = lambda *names: {k: v for k, v in call.items() if k not in names}
    if case.how == "logprobs":
        return sum(map(waves, lt.token_logprobs(model, temperature=0.7, **without("labels", "use_cache", "num_items_in_batch"))))
    if case.how in ("loss", "tuple"):
        loss = model(**call).loss if case.how == "loss" else model(**call, return_dict=False)[0]
        return waves(loss) if loss.ndim else loss
    given, kept = without("labels", "num_items_in_batch"), slice(-3 if case.how == "kept" else None, None)
    seen = call.get("attention_mask", torch.ones(1, 1, dtype=torch.bool))[:, kept, None]
    if case.how == "decoder":
        return waves(model.base_model(**given).last_hidden_state * seen)
    if case.how == "hidden":
        return sum(waves(state * seen) for state in model(**given, output_hidden_states=True).hidden_states)
    logits = model(**given, **({"logits_to_keep": 3} if case.how == "kept" else {})).logits
    found[f"logits {name}"] = logits * seen
    if case.how == "smoothed":
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), call["labels"][:, 1:].flatten(), label_smoothing=0.1, reduction="sum")
    return waves(logits * seen)


def run(case: Case, models: list[nn.Module], *, plain: bool = False, autocast: bool = False) -> dict[str, Tensor]:
    """Losses, logits and gradients of models that are called one after the other before the backward pass; of all steps together."""
    found: dict[str, Tensor] = {}
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(case.twist, nullcontext)
    for step, call in enumerate(case.calls):
        torch.manual_seed(case.seed)  # of attention dropout
        with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = {name: value for name, value in call.items() if not plain or name not in CU_SEQLENS}
            loss = sum(outcome(case, model, given, found, f"{step}.{i}") for i, model in enumerate(models))
        if loss.requires_grad:
            loss.backward()
        found[f"loss {step}"] = loss.detach()
        with torch.no_grad():
            for p in (p for model in models for p in model.parameters() if case.twist == "step" and p.grad is not None):
                p -= 0.01 * p.grad
    leaves = {f"embeds {i}": call["inputs_embeds"] for i, call in enumerate(case.calls) if "inputs_embeds" in call}
    for name, leaf in {**leaves, **{f"{i} {name}": p for i, model in enumerate(models) for name, p in model.named_parameters()}}.items():
        if leaf.grad is not None:
            found[name], leaf.grad = leaf.grad, None
    return {name: tensor.detach() for name, tensor in found.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor], *, whole: bool = False) -> tuple[float, str]:
    """The largest relative difference, and of what; `whole`: of all gradients as one vector."""
    gradients = [name for name in b if not name.startswith(("loss", "logits"))]
    norm = sum(float(b[name].norm()) ** 2 for name in gradients) ** 0.5
    if a.keys() != b.keys():
        return float("inf"), f"what has a gradient: {sorted(a.keys() ^ b.keys())[:4]}"
    if whole:
        return sum(float((a[n].double() - b[n]).norm()) ** 2 for n in gradients) ** 0.5 / (norm or 1), "all gradients"
    worst = (0.0, "")
    for name, tensor in b.items():
        error = float((a[name] - tensor).norm() / max(float(tensor.norm()), SMALL * norm if name in gradients else 0.0, 1e-300))
        none = name.startswith("loss") and bool(tensor.isnan())  # transformers' mean over no targets
        worst = max(worst, (0.0 if none else float("inf") if error != error else error, name))
    return worst


def applied(case: Case, model: nn.Module) -> lt.Report:
    offload = case.plan.offload
    store = None if offload is None else fuzz_offload.open_store(offload, fuzz_offload.Anywhere())
    return lt.apply(model, case.plan, store=store)


def check(case: Case) -> tuple[str, str]:
    """Outcome and its reason. "no case": the plain model cannot do what was drawn; "refused": by one clear error."""
    models, lossy, autocast = [case.model.train(case.twist != "eval")], case.twist in LOSSY, case.twist == "autocast"
    if case.twist == "shared":
        models.append(copy.deepcopy(case.model))
        owner, _, part = next(name for name, p in case.model.named_parameters() if p.ndim == 2).rpartition(".")
        setattr(models[1].get_submodule(owner), part, getattr(models[0].get_submodule(owner), part))
    plain, bound = copy.deepcopy(models), BOUND
    try:
        for model in plain if case.dropout else ():
            model.set_attn_implementation("longtrain")
        with Wide():
            expected = run(case, plain, plain=True)
        if lossy:
            models, plain = ([model.float() for model in each] for each in (models, plain))
            with nullcontext() if autocast else hf_families.rounded(plain[0], 2**-4):
                bound = 1e-5 + (2 if autocast else 4) * difference(run(case, plain, plain=True, autocast=autocast), expected, whole=True)[0]
    except Exception as error:
        return "no case", f"{type(error).__name__}: {str(error)[:100]}"
    try:
        streamed = list(models)
        reports = [applied(case, model) for model in models]
        if case.twist == "undo":
            reports[0].undo()
            reports = [applied(case, models[0])]
        if case.twist == "copy":
            streamed = copy.deepcopy(models)
        if case.twist == "state":
            streamed = copy.deepcopy(plain)
            for parameter in streamed[0].parameters():
                nn.init.zeros_(parameter)
            streamed[0].load_state_dict(models[0].state_dict())
            reports.append(applied(case, streamed[0]))
        with nullcontext() if lossy else Wide():
            found = run(case, streamed, autocast=autocast)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        clear = isinstance(error, (ValueError, RuntimeError)) and "/longtrain/" in frame.filename and len(str(error)) > 40
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return "refused" if clear else "UNCLEAR", f"{said} ({Path(frame.filename).name}:{frame.lineno})"
    error, where = difference(found, expected, whole=lossy)
    if not error <= bound:
        return "WRONG", f"{where} by {error:.1e}, at most {bound:.1e}"
    del found, streamed
    gc.collect()
    if left := [str(name) for report in reports for name in report.store.names()]:
        return "WRONG", f"left in the store: {left[:3]}"
    for report in reports:
        report.undo()
    if case.twist != "step" and not lossy and not case.dropout:
        with Wide():
            error, where = difference(run(case, models, plain=True), expected)
    return ("exact", "") if error <= bound else ("WRONG", f"after undo {where} by {error:.1e}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(options.seed, options.seed + options.count):
        try:
            case = Case(seed, options.families)
        except Exception as error:  # of transformers or peft, which do not make such a model
            case, what, why = None, "no case", f"{type(error).__name__}: {str(error)[:100]}"
        else:
            what, why = check(case)
        outcomes[what, re.sub(r"\d+", "#", why)] += 1
        if what.isupper():
            print(f"{what}: {why}\n  {case.family}, {case.how}, {case.twist or 'as it is'}, {case.batch} x {case.tokens}, {case.plan}")
            again = "" if options.families == FAMILIES else f" --families {' '.join(options.families)}"
            print(f"  python tools/fuzz_stream.py --seed {seed} --count 1{again}", flush=True)
    for (what, why), number in sorted(outcomes.items()):
        print(f"{number:6} {what} {why}")
    return int(any(what.isupper() for what, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
