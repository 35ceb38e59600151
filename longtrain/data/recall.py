"""Made-up documents to learn associative recall from: pairs of a key and its value, keys that come again, a value that is always the
same."""

from __future__ import annotations

import numpy as np

from longtrain.data.sources import Document

VOCABULARY = 64
DOCUMENTS = {64: 12_288, 256: 3_072}
"""How many of how many tokens. The short ones, half of all tokens, are where a model learns it first."""
RUN_PAIRS = 4


def make_recall(seed: int) -> list[Document]:
    """1.6 million tokens from 0 to 63 in documents of 64 and of 256, drawn with `seed`."""
    random, alphabet = np.random.default_rng([seed, 3]), np.arange(VOCABULARY, dtype=np.uint8)
    return [
        Document(f"recall-{tokens}-{number}", recall_document(tokens, alphabet, random))
        for tokens, count in DOCUMENTS.items()
        for number in range(count)
    ]


def recall_document(tokens: int, alphabet: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A document ``[tokens]`` to learn recall from: pairs of a key and its value, in runs of 4 pairs on average.

    Half of the runs are of keys that are new, as long as there are any; the others repeat pairs from a place chosen at random. Inside such
    a run the next key follows from the one before as well: without that half of the signal, learning takes many times as long.
    """
    keys, values = key_value_halves(alphabet)
    order, value_of = random.permutation(keys), random.choice(values, len(keys))
    pairs, used = [], 0
    while 2 * len(pairs) < tokens:
        run = int(random.geometric(1 / RUN_PAIRS))
        if not used or (used < len(keys) and random.random() < 0.5):
            pairs += range(used, min(used + run, len(keys)))
            used = min(used + run, len(keys))
        else:
            start = int(random.integers(len(pairs)))
            pairs += pairs[start : start + run]
    return np.stack([order[pairs], value_of[pairs]], 1).reshape(-1)[:tokens]


def key_value_halves(alphabet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values: the lower and the upper half of the tokens in use, sorted. Raises ValueError for fewer than four."""
    if len(alphabet) < 4:
        raise ValueError(f"a recall probe needs at least 4 different tokens, and the data has {len(alphabet)}")
    return alphabet[: len(alphabet) // 2], alphabet[len(alphabet) // 2 :]
