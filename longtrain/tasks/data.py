"""The tasks: what their sequences are, and how they are drawn. A sequence is padded with 0 behind its end; real tokens begin at 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DIGITS_INSTALL = "the task digits needs scikit-learn, which carries its images: pip install longtrain[tasks]"


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """``ids [N, T]`` uint8, 0 behind a sequence's end; ``labels [N]`` int64."""

    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """`train` and `test` (or validation examples in its place) have no sequence in common. `vocab_size` counts the padding."""

    name: str
    vocab_size: int
    classes: int
    train: Examples
    test: Examples

    @property
    def chance(self) -> float:
        """Share of the test examples that have their commonest label: the most that is right of one answer to all."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))


def make_task(name: str, tokens: int, train: int, test: int, seed: int, *, noise: int = 0, validation: bool = False) -> Task:
    """Draw a task of `train` and `test` examples of at most `tokens` tokens, each among `noise` random ones.

    With `validation` there are as many others in the place of `test`. Raises ValueError where there are no such examples.
    """
    draw, vocab_size, classes = TASKS[name]
    random = np.random.default_rng([seed, sorted(TASKS).index(name)])
    examples = draw(tokens, train + test * (1 + validation), random)
    if noise:
        examples = _in_noise(examples, noise, vocab_size, random)
    parts = slice(train), slice(train + test * validation, None)
    split = [Examples(examples.ids[part], examples.labels[part]) for part in parts]
    return Task(name, vocab_size, classes, *split)


def _in_noise(examples: Examples, noise: int, vocab_size: int, random: np.random.Generator) -> Examples:
    """Every sequence somewhere among `noise` tokens drawn evenly from the vocabulary (noise-padded images: Chang et al. 2019,
    arXiv:1902.09689; there the noise comes behind them)."""
    tokens = examples.ids.shape[1]
    ids = np.empty((len(examples.ids), tokens + noise), np.uint8)
    for row, sequence in zip(ids, examples.ids, strict=True):
        row[:], start = random.integers(1, vocab_size, tokens + noise), random.integers(noise + 1)
        row[start : start + tokens] = sequence
    return Examples(ids, examples.labels)


# ListOps (Nangia and Bowman 2018, arXiv:1804.06028; at length in the Long Range Arena, arXiv:2011.04006): nested prefix expressions of
# digits, whose value is asked for.   [MAX 4 [MIN 2 9 ] 0 ] -> 4
OPERATIONS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: sorted(values)[(len(values) - 1) // 2],
    "SM": lambda values: sum(values) % 10,
}
LISTOPS_TOKENS = [*map(str, range(10)), *(f"[{name}" for name in OPERATIONS), "]"]
NESTED = 0.3


def listops(tokens: int, examples: int, random: np.random.Generator) -> Examples:
    """Expressions of a third of `tokens` to `tokens` tokens, all different, 2 arguments or more, of which 3 in 10 nested: up to 4 deep and
    of 5 arguments; for more than 128 tokens, where those end, up to 10 and 10, as in the Long Range Arena."""
    deepest, most, room = (4, 5, math.inf) if tokens <= 128 else (10, 10, tokens)
    token_ids = {token: i for i, token in enumerate(LISTOPS_TOKENS, start=1)}
    ids, labels, seen = np.zeros((examples, tokens), np.uint8), np.empty(examples, np.int64), set()
    while len(seen) < examples:
        expression, value = _expression(1, deepest, most, room, random) or ([], 0)
        text = " ".join(expression)
        if tokens // 3 <= len(expression) <= tokens and text not in seen:
            ids[len(seen), : len(expression)], labels[len(seen)] = [token_ids[token] for token in expression], value
            seen.add(text)
    return Examples(ids, labels)


def _expression(depth: int, deepest: int, most: int, room: float, random: np.random.Generator) -> tuple[list[str], int] | None:
    """Tokens and value; None as soon as there are more than `room` tokens."""
    name = list(OPERATIONS)[random.integers(len(OPERATIONS))]
    written, values = [f"[{name}"], []
    for _ in range(random.integers(2, most + 1)):
        if len(written) >= room:
            return None
        if depth < deepest and random.random() < NESTED:
            nested = _expression(depth + 1, deepest, most, room - len(written), random)
            if nested is None:
                return None
            inner, value = nested
        else:
            value = int(random.integers(10))
            inner = [str(value)]
        written += inner
        values.append(value)
    return [*written, "]"], OPERATIONS[name](values)


# Pathfinder (Linsley et al. 2018, arXiv:1805.08315; in the Long Range Arena as a sequence of pixels): two winding paths and two dots. Are
# both dots on the same path?  Pixels: 1 empty, 2 path, 3 dot.
EMPTY, PATH, DOT = 1, 2, 3
PATH_PIXELS = 6


def pathfinder(tokens: int, examples: int, random: np.random.Generator) -> Examples:
    """Square images of `tokens` pixels, row by row; half of them with both dots at the ends of one path. ValueError for no square."""
    side = int(tokens**0.5)
    if side * side != tokens or side < 8:
        raise ValueError(f"pathfinder's tokens are a square image of at least 8 x 8 pixels, found {tokens}; give {max(8, side) ** 2}")
    ids, labels = np.empty((examples, tokens), np.uint8), random.permutation(np.arange(examples) % 2)
    for image, label in zip(ids, labels, strict=True):
        image[:] = _paths(side, bool(label), random).reshape(-1)
    return Examples(ids, labels.astype(np.int64))


def _paths(side: int, same: bool, random: np.random.Generator) -> np.ndarray:
    """Dots at both ends of the first path, or at one of them and one of the second's, about as far apart: how far tells nothing."""
    while True:
        paths = first, second = _walk(side, random), _walk(side, random)
        if first is None or second is None:
            continue
        near, own, other = first[0], first[-1], second[0]
        if abs(math.dist(near, own) - math.dist(near, other)) > 0.5:
            continue
        if all(max(abs(r - x), abs(c - y)) > 2 for r, c in first for x, y in second):  # since a gap between dashes is one pixel
            break
    image = np.full((side, side), EMPTY, np.uint8)
    for path in paths:
        for number, pixel in enumerate(path):
            if number % 4 != 3:  # dashed
                image[pixel] = PATH
    image[near] = image[own if same else other] = DOT
    return image


def _walk(side: int, random: np.random.Generator) -> list[tuple[int, int]] | None:
    """A winding path of 6 pixels, next to each other, that does not meet itself; None where the drawn one leaves the image."""
    (row, column), heading, turn = (random.random(2) * side).tolist(), random.random() * 2 * math.pi, random.normal(0, 0.15)
    path: list[tuple[int, int]] = []
    for bend in random.normal(0, 0.05, 4 * side).tolist():
        pixel = (int(row), int(column))
        if not (0 <= row < side and 0 <= column < side):
            return None
        if not path or pixel != path[-1]:
            if any(abs(pixel[0] - r) + abs(pixel[1] - c) <= 1 for r, c in path[:-1]):
                return None
            path.append(pixel)
            if len(path) == PATH_PIXELS:
                return path
        turn += bend
        heading += turn * 0.5
        row, column = row + 0.5 * math.sin(heading), column + 0.5 * math.cos(heading)
    return None


def digits(tokens: int, examples: int, random: np.random.Generator) -> Examples:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (16 greys), row by row, every pixel repeated to a square of `tokens`.

    Raises ValueError where there are not so many, ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(DIGITS_INSTALL) from error
    images, labels = load_digits(return_X_y=True)
    times = int((tokens / 64) ** 0.5)
    if 64 * times * times != tokens or examples > len(images):
        raise ValueError(f"digits has {len(images)} images of 64, 256, 1024, .. tokens; found examples {examples}, tokens {tokens}")
    order = random.permutation(len(images))[:examples]
    squares = images[order].reshape(-1, 8, 8).repeat(times, 1).repeat(times, 2)
    return Examples(squares.reshape(examples, tokens).astype(np.uint8) + 1, labels[order].astype(np.int64))


TASKS = {"listops": (listops, len(LISTOPS_TOKENS) + 1, 10), "pathfinder": (pathfinder, 4, 2), "digits": (digits, 18, 10)}
"""How to draw it, its vocabulary with the padding, its classes."""
