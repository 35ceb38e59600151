"""`longtrain data info`: how long the documents are, where they come from, and what each packing makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from longtrain.data.built import check_contents, open_built, read_inputs_of, read_manifest
from longtrain.data.corpus import Corpus, join, say_tokenizer
from longtrain.data.packing import PackedDocuments

BAR_WIDTH = 40


def info(directories: Sequence[Path], seq_lens: Sequence[int], check: bool) -> int:
    """Print it; 1 where `check` finds damaged files. Raises DataError where a directory holds no whole build."""
    corpora = [open_built(directory) for directory in directories]
    for directory, corpus in zip(directories, corpora, strict=True):
        manifest = read_manifest(directory)
        left_out = f", {manifest['left_out']} left out when it was built" if manifest["left_out"] else ""
        targets = sum(int((ranges[:, 1] - ranges[:, 0]).sum()) for ranges in corpus.learned if ranges is not None)
        left_out += f", {targets:,} tokens of answers" if corpus.has_prompts else ""
        print(
            f"{directory}: {len(corpus):,} documents, {int(corpus.length_N.sum()):,} tokens by {say_tokenizer(corpus.tokenizer)}, "
            f"vocabulary {manifest['vocabulary']:,}, largest id {corpus.largest:,}{left_out}"
        )
        print("\n".join(input_lines(manifest["inputs"], read_inputs_of(directory), corpus.length_N)))
    corpus = join(corpora)
    print("\ntokens in a document       documents        tokens")
    print("\n".join(histogram_lines(corpus.length_N)))
    for seq_len in seq_lens:
        print(f"\n{f'in {seq_len:,} tokens':<16}{'sequences':>12}  {'padding':>8}  {'documents cut':>13}  {'tokens seen, mean':>17}")
        print("\n".join(packing_lines(corpus, seq_len)))
    damaged = [sentence for directory in directories for sentence in check_contents(directory)] if check else []
    if check:
        print("\n" + ("\n".join(damaged) or "every checksum is right"))
    return 1 if damaged else 0


def input_lines(inputs: Sequence[str], input_N: np.ndarray, length_N: np.ndarray) -> Iterator[str]:
    documents = np.bincount(input_N, minlength=len(inputs))
    tokens = np.bincount(input_N, length_N, minlength=len(inputs))
    for name, some, held in zip(inputs, documents.tolist(), tokens.tolist(), strict=True):
        yield f"  {some:>12,} documents  {int(held):>16,} tokens  {held / max(1, length_N.sum()):>6.1%}  {name}"


def histogram_lines(length_N: np.ndarray) -> Iterator[str]:
    """A line for each doubling of the length; bars are shares of the tokens."""
    bucket_N = np.frexp(length_N.astype(np.float64))[1] - 1  # floor of the logarithm to base 2
    documents, tokens = np.bincount(bucket_N), np.bincount(bucket_N, length_N)
    for bucket in range(int(bucket_N.min()), len(documents)):
        share = tokens[bucket] / tokens.sum()
        bar = "#" * round(share * BAR_WIDTH)
        numbers = f"{documents[bucket]:>9,}  {int(tokens[bucket]):>12,}  {share:>6.1%}"
        yield f"{2**bucket:>9,} to {2 ** (bucket + 1) - 1:>10,}  {numbers} {bar}".rstrip()


def packing_lines(corpus: Corpus, seq_len: int) -> Iterator[str]:
    """What each packing wastes: padding, and context lost where documents are cut (what a token sees before itself shrinks)."""
    for packing in ("best_fit", "concatenate", "one_document"):
        packed = PackedDocuments(corpus, seq_len, packing=packing)
        length_P, pieces_N = packed.pieces.length_P, np.bincount(packed.pieces.document_P)
        padding = 1 - length_P.sum() / (len(packed) * seq_len)
        seen = (length_P.astype(np.float64) ** 2).sum() / (2 * length_P.sum())
        yield f"{packing:<16}{len(packed):>12,}  {padding:>8.2%}  {(pieces_N > 1).sum() / len(corpus):>13.1%}  {seen:>17,.0f}"
