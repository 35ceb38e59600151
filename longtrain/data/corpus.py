"""Documents in columns, whether they are in memory or in mapped files: millions of them take 40 bytes each, tokens are read on demand.

Validation documents are drawn by the hash of their contents, one by one: what is held out stays held out when data is added, moved or
renamed, and copies of a document are on the same side. (Modules of the standard library and made-up documents: by their names.)
"""

from __future__ import annotations

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longtrain.data.sources import DataError, Document

KEY_BYTES = 65_536
BYTES = {"kind": "bytes"}
"""The tokenizer of documents whose tokens are their bytes."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Corpus:
    """N documents. Column names end in N."""

    blocks: tuple[np.ndarray, ...]
    """Tokens of many documents, one behind the other: arrays in memory or mapped files."""
    block_N: np.ndarray
    """Which block holds the document."""
    start_N: np.ndarray
    """Its first token there."""
    length_N: np.ndarray
    """Its tokens, int64."""
    key_N: np.ndarray
    """`content_key`, uint64; `name_key` where names mean the same everywhere, and of data built in format 1."""
    source_N: np.ndarray
    """Its place in `sources`."""
    number_N: np.ndarray
    """What `name_of` calls it."""
    sources: tuple[str, ...]
    name_of: Callable[[int], str]
    tokenizer: dict
    """What made the tokens: data made by different tokenizers cannot be mixed."""
    vocabulary: int
    """Token ids are below."""
    largest: int
    """The largest that there is."""
    digest: str
    """Of contents and keys: where they come from, and what they are called, does not matter."""
    mapped: tuple[mmap.mmap, ...] = ()
    learned: tuple[np.ndarray | None, ...] = ()
    """Of each block: ranges of its tokens ``[S, 2]``, ascending, that are targets; None (or no entry): all of them are."""

    def __len__(self) -> int:
        return len(self.length_N)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``[start, stop)`` of a document, in the type they are stored in."""
        first = int(self.start_N[document])
        stop = int(self.length_N[document]) if stop is None else stop
        return self.blocks[self.block_N[document]][first + start : first + stop]

    @property
    def has_prompts(self) -> bool:
        """Whether some tokens are read, but no targets."""
        return any(ranges is not None for ranges in self.learned)

    def is_target(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """``[stop - start]`` bool; None where all of a document is learned from."""
        block = int(self.block_N[document])
        if not self.learned or (ranges := self.learned[block]) is None:
            return None
        first = int(self.start_N[document]) + start
        here = ranges[np.searchsorted(ranges[:, 1], first, side="right") :]
        here = here[: np.searchsorted(here[:, 0], first + stop - start)] - first
        target = np.zeros(stop - start, dtype=bool)
        for a, b in here.clip(0, stop - start).tolist():
            target[a:b] = True
        return target

    def with_targets(self, document_P: np.ndarray, start_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
        """``[P]`` bool: whether a piece of a document has a target behind its first token, which nothing predicts."""
        found_P = np.ones(len(document_P), dtype=bool)
        for block, ranges in enumerate(self.learned):
            if ranges is not None:
                mine_P = np.flatnonzero(self.block_N[document_P] == block)
                first_P = self.start_N[document_P[mine_P]] + start_P[mine_P]
                next_P = np.searchsorted(ranges[:, 1], first_P + 1, side="right")
                begins = np.append(ranges[:, 0], np.iinfo(np.int64).max)
                found_P[mine_P] = begins[next_P] < first_P + length_P[mine_P]
        return found_P

    def name(self, document: int) -> str:
        return self.name_of(int(self.number_N[document]))

    def take(self, documents: np.ndarray) -> Corpus:
        """A corpus of some of the documents."""
        columns = {c: getattr(self, c)[documents] for c in ("block_N", "start_N", "length_N", "key_N", "source_N", "number_N")}
        return replace(self, **columns)

    def release(self) -> None:
        """Forget which pages of the mapped files were read, so that they do not count as this process's memory."""
        for file in self.mapped:
            file.madvise(mmap.MADV_DONTNEED)


def content_key(begins: bytes | np.ndarray, size: int) -> int:
    """64 bits of a document: of its first `KEY_BYTES` bytes, as its file or record has them (whatever the tokenizer), and their number."""
    hashed = hashlib.blake2b(begins[:KEY_BYTES], digest_size=8, salt=size.to_bytes(16, "little"))
    return int.from_bytes(hashed.digest(), "little")


def name_key(name: str) -> int:
    """64 bits of a document's name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def corpus_in_memory(documents: Sequence[Document], source: str = "documents", *, by_name: bool = False) -> Corpus:
    """Of byte tokens; held out by their contents, or by their names where these are not where files happen to lie."""
    count = len(documents)
    key_N = np.array([name_key(d.name) if by_name else content_key(d.tokens, len(d.tokens)) for d in documents], dtype=np.uint64)
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(len(document.tokens).to_bytes(8, "little"))
        digest.update(document.tokens)
    digest.update(key_N)
    return Corpus(
        blocks=tuple(d.tokens for d in documents),
        block_N=np.arange(count),
        start_N=np.zeros(count, dtype=np.int64),
        length_N=np.array([len(d.tokens) for d in documents], dtype=np.int64),
        key_N=key_N,
        source_N=np.zeros(count, dtype=np.int32),
        number_N=np.arange(count),
        sources=(source,),
        name_of=lambda number: documents[number].name,
        tokenizer=BYTES,
        vocabulary=256,
        largest=max((int(d.tokens.max()) for d in documents if len(d.tokens)), default=0),
        digest=digest.hexdigest(),
    )


def join(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of several. Raises DataError where their tokenizers differ."""
    first = corpora[0]
    for other in corpora[1:]:
        if other.tokenizer != first.tokenizer:
            raise DataError(
                f"{first.sources[0]} was tokenized by {say_tokenizer(first.tokenizer)} and {other.sources[0]} by "
                f"{say_tokenizer(other.tokenizer)}, and one model cannot read both; build one of them again"
            )
    firsts = np.cumsum([0] + [len(c) for c in corpora])

    def name_of(number: int) -> str:
        part = bisect_right(firsts, number) - 1
        return corpora[part].name(number - int(firsts[part]))

    def column(name: str, shifts: Sequence[int]) -> np.ndarray:
        return np.concatenate([getattr(c, name) + shift for c, shift in zip(corpora, shifts, strict=True)])

    return Corpus(
        blocks=tuple(b for c in corpora for b in c.blocks),
        block_N=column("block_N", np.cumsum([0] + [len(c.blocks) for c in corpora[:-1]])),
        start_N=np.concatenate([c.start_N for c in corpora]),
        length_N=np.concatenate([c.length_N for c in corpora]),
        key_N=np.concatenate([c.key_N for c in corpora]),
        source_N=column("source_N", np.cumsum([0] + [len(c.sources) for c in corpora[:-1]])),
        number_N=np.arange(firsts[-1]),
        sources=tuple(s for c in corpora for s in c.sources),
        name_of=name_of,
        tokenizer=first.tokenizer,
        vocabulary=max(c.vocabulary for c in corpora),
        largest=max(c.largest for c in corpora),
        digest=hashlib.blake2b("".join(c.digest for c in corpora).encode(), digest_size=16).hexdigest(),
        mapped=tuple(m for c in corpora for m in c.mapped),
        learned=tuple(ranges for c in corpora for ranges in (c.learned or (None,) * len(c.blocks))),
    )


def say_tokenizer(tokenizer: dict) -> str:
    """`bytes`, `mulaw (rate 16000)`, `tokenizers (file tokenizer.json, sha256 12ab...)`."""
    rest = ", ".join(f"{key} {value[:12] if key == 'sha256' else value}" for key, value in tokenizer.items() if key != "kind")
    return f"{tokenizer['kind']} ({rest})" if rest else tokenizer["kind"]


def held_out(key_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """``[N]`` bool: each key by itself, with probability `fraction`; where that gives none or all, all but the nearest.

    splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 15) of the key, shifted by the seed.
    """
    mixed_N = key_N + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    mixed_N ^= mixed_N >> np.uint64(31)
    out_N = mixed_N < np.uint64(int(fraction * 2**64))
    if not out_N.any():
        out_N = mixed_N == mixed_N.min()
    if out_N.all():
        out_N = mixed_N < mixed_N.max()
    return out_N


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Training and validation documents. Raises DataError where there is only one document, or copies of one."""
    if not len(corpus) or (corpus.key_N == corpus.key_N[0]).all():
        copies = f" {len(corpus)} times" if len(corpus) > 1 else ""
        raise DataError(
            f"the data is one document{copies} ({corpus.name(0)}), so none can be held out for validation; give at least two documents"
        )
    out_N = held_out(corpus.key_N, fraction, seed)
    return corpus.take(np.flatnonzero(~out_N)), corpus.take(np.flatnonzero(out_N))


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raise DataError naming the first token that the model has no embedding for, and its position."""
    if corpus.largest < vocab_size:
        return
    for document in range(len(corpus)):
        tokens = corpus.tokens(document)
        outside = tokens >= vocab_size
        if outside.any():
            position = int(outside.argmax())
            raise DataError(
                f"{corpus.name(document)}: token id {tokens[position]} at position {position} is outside the vocabulary of "
                f"{vocab_size}; set model.vocab_size to at least {corpus.largest + 1}, or build the data with the model's own tokenizer"
            )
