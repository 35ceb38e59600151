"""The section `data` of a run's YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longtrain.config.bounds import above_zero, at_least, between


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSource:
    """Data that `longtrain data build` has written."""

    path: str
    """Its directory. Example: built/books."""

    weight: float | None = None
    """Share of the training sequences that come from here, relative to the other weights: 3 beside 1 is three quarters. Given for every
    source, or for none: then each is read as often as its size says. Example: 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What the model reads: documents, packed into sequences."""

    source: Literal["stdlib", "text", "tokens", "recall"] = "stdlib"
    """`stdlib`: the source code of the running Python's own standard library, which is on every machine. `text`: `files`, as bytes.
    `tokens`: data built before by `longtrain data build`, of any size. `recall`: made-up documents to learn associative recall from."""

    files: tuple[str, ...] = ()
    """Files, directories or glob patterns (`**` goes through directories) for `source: text`; each file is one document.
    Relative paths start at the current directory. Example: [books/*.txt]."""

    tokens: tuple[TokenSource, ...] = ()
    """Built data for `source: tokens`: a list of {path} or {path, weight}, made by one tokenizer.
    Example: [{path: built/books, weight: 3}, {path: built/code, weight: 1}]."""

    seq_len: int
    """Tokens in one training sequence. Validation uses the same length. Example: 16384."""

    packing: Literal["best_fit", "concatenate", "one_document"] = "best_fit"
    """`best_fit`: documents longer than `seq_len` are cut into pieces, and pieces share a sequence where they fit. `concatenate`: shuffled
    documents follow each other and are cut every `seq_len` tokens. `one_document`: one piece a sequence, the rest padding.
    `longtrain data info` shows what each wastes."""

    isolate: bool = True
    """Whether documents that share a sequence are hidden from each other, in attention, positions and loss. With `false` a sequence is one
    document to the model."""

    long_documents: Literal["split", "refuse"] = "split"
    """What happens to documents longer than `seq_len`: they are cut into pieces that do not see each other, or the run is refused."""

    min_document_tokens: int = 0
    """Documents shorter than this are left out: raise it for a run that should see long contexts only."""

    long_from_tokens: int | None = None
    """Documents of at least so many tokens count as long, and are read `long_weight` times as often. Example: 32768."""

    long_weight: float = 1.0
    """How many times as often as their size says long documents are read, within their source: its share of the sequences stays.
    Example: 4."""

    validation_fraction: float = 0.05
    """Share of the documents that is held out. Whether a document is depends on its contents and `seed` alone: it stays when data is added,
    moved or tokenized otherwise, and copies of it are on the same side. (Of stdlib and recall: on its name.)"""

    seed: int = 0
    """Draws the validation documents and the order of the sequences."""

    def __post_init__(self) -> None:
        what_of = {"files": ("text", "files, directories or globs"), "tokens": ("tokens", "directories, {path: built/books}")}
        for key, (source, what) in what_of.items():
            given = getattr(self, key)
            if self.source == source and not given:
                raise ValueError(f"data.{key}: is missing, and source: {source} reads nothing else; list {what}")
            if self.source != source and given:
                raise ValueError(f"data.{key}: has no effect with source: {self.source}; set source: {source}, or remove it")
        weights = [source.weight for source in self.tokens]
        for index, weight in enumerate(weights):
            if weight is not None:
                above_zero(f"data.tokens[{index}].weight", weight)
            elif any(w is not None for w in weights):
                raise ValueError(f"data.tokens[{index}].weight: is missing while others have one; give it to all of them, or to none")
        paths = [source.path for source in self.tokens]
        for index, path in enumerate(paths):
            if path in paths[:index]:
                raise ValueError(f"data.tokens[{index}].path: {path} is listed twice; raise its weight instead")
        at_least("data.seq_len", self.seq_len, 2)
        at_least("data.min_document_tokens", self.min_document_tokens, 0)
        between("data.validation_fraction", self.validation_fraction, 0.0001, 0.5)
        at_least("data.seed", self.seed, 0)
        if not self.isolate and self.packing == "one_document":
            raise ValueError("data.isolate: has no effect with packing: one_document; remove it, or choose another packing")
        if self.long_from_tokens is not None:
            at_least("data.long_from_tokens", self.long_from_tokens, 2)
            above_zero("data.long_weight", self.long_weight)
        if (self.long_from_tokens is None) != (self.long_weight == 1):
            missing, given = ("long_from_tokens", "long_weight") if self.long_from_tokens is None else ("long_weight", "long_from_tokens")
            raise ValueError(f"data.{given}: has no effect without data.{missing}; give both, or neither")
