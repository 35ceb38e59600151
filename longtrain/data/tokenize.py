"""What makes tokens of a document: its bytes as they are, or a `tokenizer.json` through the `tokenizers` library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longtrain.data.chat import token_ranges
from longtrain.data.corpus import BYTES
from longtrain.data.formats import import_extra
from longtrain.data.sources import DataError

Learned = tuple[tuple[int, int], ...] | None
Encode = Callable[[Sequence[tuple[str, Learned]]], list[tuple[np.ndarray, Learned]]]
"""Texts into tokens; what is learned from of each, ranges of characters into ranges of tokens."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """`identity` is what built data is known by: data with equal identities can be mixed."""

    identity: dict
    vocabulary: int
    encode: Encode | None
    """None: the bytes are the tokens."""


def byte_tokens() -> Tokenizer:
    return Tokenizer(BYTES, 256, None)


def mu_law_samples(rate: int) -> Tokenizer:
    """Of audio with `rate` samples a second: the WAV reader gives tokens already."""
    return Tokenizer({"kind": "mulaw", "rate": rate}, 256, None)


def load_tokenizer(path: Path, special_tokens: bool) -> Tokenizer:
    """A local `tokenizer.json`, or the directory it is in. With `special_tokens` its template adds what it adds (a first token, say).
    Raises DataError."""
    tokenizers = import_extra("tokenizers", "tokenizers")
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--tokenizer {path} cannot be read ({error.strerror}); give the path of a tokenizer.json") from error
    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no class of its own
        raise DataError(f"--tokenizer {path} is no tokenizer.json ({error}); give one that the tokenizers library has written") from error
    library.no_truncation()
    library.no_padding()

    def encode(texts: Sequence[tuple[str, Learned]]) -> list[tuple[np.ndarray, Learned]]:
        encoded = library.encode_batch([text for text, _ in texts], add_special_tokens=special_tokens)
        return [
            (np.array(e.ids, dtype=np.uint32), None if learned is None else tuple(token_ranges([a for a, _ in e.offsets], learned)))
            for e, (_, learned) in zip(encoded, texts, strict=True)
        ]

    identity = {"kind": "tokenizers", "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    if special_tokens:
        identity["special_tokens"] = True
    return Tokenizer(identity, max(library.get_vocab(with_added_tokens=True).values()) + 1, encode)
