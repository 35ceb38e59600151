"""Can the model use what stood far back? Sequences made on the spot whose one right answer stands a chosen number of tokens earlier.

recall   associative recall (Arora et al. 2023, arXiv:2312.04927): pairs of key and value, then one of the keys again; its value is
         asked for. Keys are the lower half of the tokens in use, values the upper half.

             k7 v3  k2 v9  k5 v1  ...  k2 -> v9

needle   a marker of eight random tokens and a value of four, hidden in text; the text ends in the marker again; the value is asked
         for, each token given the ones before it.

             text  marker value  more text  marker -> value

The distance is from a key, or the first token of a marker, to where it comes again. The answer is the likeliest of the tokens that could be
one, so
chance is one over their number: the accuracy of a model that knows which tokens are values, and nothing of this sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from longtrain.data.recall import key_value_halves
from longtrain.span import Layout
from longtrain.train.calls import logits_at

MARKER, VALUE = 8, 4
LARGEST_PREFIX = 64
"""At most so many tokens stand before the key, so that the sequence's beginning is not the place to look."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """One sequence ``ids [n]``; ``asked``: the positions whose next token is asked for, in order; ``answers``: those tokens."""

    ids: np.ndarray
    asked: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """`accuracy` over `answers` tokens of `examples` sequences; `chance` is that of a guess."""

    probe: str
    distance: int
    accuracy: float
    chance: float
    answers: int
    examples: int


def recall(distance: int, longest: int, alphabet: np.ndarray, text: np.ndarray, random: np.random.Generator) -> Probe:
    """A sequence of at most `longest` tokens that ends in a key which stood `distance` tokens before; `text` is not used.

    The other pairs are of other keys, all different while there are enough of them.
    """
    keys, values = key_value_halves(alphabet)
    prefix = int(random.integers(0, min(LARGEST_PREFIX, longest - distance - 1) // 2 + 1))
    asked_key, *others = random.permutation(keys)
    between = distance // 2 - 1
    others = np.concatenate([random.permutation(others) for _ in range(-(-(between + prefix) // len(others)) or 1)])[: between + prefix]
    sequence = np.concatenate([others[:prefix], [asked_key], others[prefix:]])
    value_of = dict(zip(keys.tolist(), random.choice(values, len(keys)).tolist(), strict=True))
    pairs = np.stack([sequence, [value_of[key] for key in sequence.tolist()]], 1).reshape(-1)
    ids = np.append(pairs, asked_key)
    return Probe(ids, np.array([len(ids) - 1]), np.array([value_of[int(asked_key)]]))


def needle(distance: int, longest: int, alphabet: np.ndarray, text: np.ndarray, random: np.random.Generator) -> Probe:
    """A stretch of `text` with a marker and its value in it, `distance` tokens before the marker comes again."""
    prefix = int(random.integers(0, min(LARGEST_PREFIX, longest - distance - MARKER - VALUE + 1) + 1))
    hay = distance - MARKER - VALUE
    start = int(random.integers(0, max(1, len(text) - prefix - hay)))
    stretch = np.resize(text[start:], prefix + hay) if prefix + hay else text[:0]
    marker, value = random.choice(alphabet, MARKER), random.choice(alphabet, VALUE)
    ids = np.concatenate([stretch[:prefix], marker, value, stretch[prefix:], marker, value[:-1]])
    return Probe(ids, np.arange(len(ids) - VALUE, len(ids)), value)


PROBES = {"recall": recall, "needle": needle}
SHORTEST = {"recall": 2, "needle": MARKER + VALUE}
ASKED = {"recall": 1, "needle": MARKER + VALUE - 1}
"""Tokens from where the key or the marker comes again to the end of the sequence."""


def check_distance(name: str, distance: int, longest: int) -> None:
    """Raise ValueError for a distance at which no sequence of `longest` tokens can ask."""
    shortest, most = SHORTEST[name], longest - ASKED[name]
    if not shortest <= distance <= most:
        raise ValueError(f"{distance} tokens is no distance for {name} in sequences of {longest}: choose from {shortest} to {most}")
    if name == "recall" and distance % 2:
        raise ValueError(f"{distance} is odd, and recall's keys stand at every other token; choose {distance - 1} or {distance + 1}")


@torch.no_grad()
def run_probe(
    model: nn.Module,
    name: str,
    distance: int,
    *,
    examples: int,
    longest: int,
    alphabet: np.ndarray,
    text: np.ndarray,
    seed: int,
    device: torch.device,
    join: Callable[[Tensor], Tensor] = lambda part: part,
) -> ProbeResult:
    """Ask `examples` sequences, packed into rows of at most `longest` tokens in which none sees another.

    `alphabet [n]`: the tokens in use, sorted; `text`: what needles hide in. The same seed asks the same questions. Only the logits of
    the asked positions are ever formed, and `join` sums the parts of processes that share a sequence. Raises ValueError for a distance that
    does not fit.
    """
    check_distance(name, distance, longest)
    model.eval()
    random = np.random.default_rng([seed, sorted(PROBES).index(name), distance])
    probes = [PROBES[name](distance, longest, alphabet, text, random) for _ in range(examples)]
    candidates = torch.from_numpy((key_value_halves(alphabet)[1] if name == "recall" else alphabet).astype(np.int64)).to(device)
    right = asked = 0
    for row in rows_of(probes, longest):
        starts = np.cumsum([0, *(len(p.ids) for p in row)])
        layout = Layout(int(starts[-1]), tuple(starts.tolist()))
        ids_BT = torch.from_numpy(np.concatenate([p.ids for p in row]).astype(np.int64))[None].to(device)
        at = torch.from_numpy(np.concatenate([p.asked + start for p, start in zip(row, starts, strict=False)])).to(device)
        logits = join(logits_at(model, ids_BT, layout, at)[:, candidates])
        answers = torch.from_numpy(np.concatenate([p.answers for p in row]).astype(np.int64)).to(device)
        right += int((candidates[logits.argmax(-1)] == answers).sum())
        asked += len(answers)
    return ProbeResult(
        probe=name, distance=distance, accuracy=right / asked, chance=1 / len(candidates), answers=asked, examples=examples
    )


def rows_of(probes: Sequence[Probe], longest: int) -> list[list[Probe]]:
    """As many probes in a row, in order, as `longest` tokens hold."""
    rows: list[list[Probe]] = []
    room = 0
    for probe in probes:
        if len(probe.ids) > room:
            rows.append([])
            room = longest
        rows[-1].append(probe)
        room -= len(probe.ids)
    return rows
