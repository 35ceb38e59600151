"""Documents in columns: the split, joining, the vocabulary."""

import numpy as np
import pytest

from longtrain.data.corpus import check_vocabulary, corpus_in_memory, held_out, join, split
from longtrain.data.sources import DataError, Document


def corpus(*lengths, source="documents", first=0):
    return corpus_in_memory([Document(f"d{first + i}", np.full(n, i % 256, dtype=np.uint8)) for i, n in enumerate(lengths)], source)


def names(part):
    return [part.name(i) for i in range(len(part))]


@pytest.mark.parametrize("fraction, seed", [(0.05, 0), (0.3, 1), (0.5, 2)])
def test_the_split_takes_whole_documents_once_and_repeats(fraction, seed):
    everything = corpus(*[10] * 2000)
    train, validation = split(everything, fraction, seed)
    assert sorted(names(train) + names(validation)) == sorted(names(everything))
    assert [names(part) for part in split(everything, fraction, seed)] == [names(train), names(validation)]
    deviation = (2000 * fraction * (1 - fraction)) ** 0.5
    assert abs(len(validation) - 2000 * fraction) < 4 * deviation


def test_what_is_held_out_stays_held_out_when_data_grows():
    small, large = split(corpus(*[20] * 100), 0.1, 3), split(join([corpus(*[5] * 300, first=100), corpus(*[20] * 100)]), 0.1, 3)
    assert set(names(small[0])) < set(names(large[0])) and set(names(small[1])) < set(names(large[1]))


def test_the_split_depends_on_the_seed():
    keys = corpus(*[20] * 40).key_N
    assert len({tuple(held_out(keys, 0.1, seed)) for seed in range(5)}) > 3


@pytest.mark.parametrize("fraction", [1e-4, 0.5])
def test_both_sides_have_a_document_and_one_document_is_refused(fraction):
    for seed in range(8):
        assert [len(part) for part in split(corpus(10, 1000), fraction, seed)] == [1, 1]
    with pytest.raises(DataError, match="one document.*; give at least two"):
        split(corpus(10), fraction, 0)


def test_joined_documents_keep_tokens_names_and_sources():
    joined = join([corpus(3, 4, source="a"), corpus(5, source="b", first=7)]).take(np.array([2, 0]))
    assert names(joined) == ["d7", "d0"] and [joined.sources[s] for s in joined.source_N] == ["b", "a"]
    assert [joined.tokens(i).tolist() for i in range(2)] == [[0] * 5, [0] * 3]


def test_the_digest_tells_names_and_contents_apart():
    digests = {corpus(3, 4).digest, corpus(4, 3).digest, corpus(3, 4, first=1).digest, join([corpus(3), corpus(4)]).digest}
    assert len(digests) == 4 and corpus(3, 4).digest in digests


def test_ids_outside_the_vocabulary_are_named_with_their_position():
    docs = corpus_in_memory(
        [Document("ok", np.array([1, 99], dtype=np.uint8)), Document("bad", np.array([3, 100, 250], dtype=np.uint8))]
    )
    check_vocabulary(docs, 251)
    with pytest.raises(DataError, match="bad: token id 100 at position 1 is outside the vocabulary of 100; .* 251"):
        check_vocabulary(docs, 100)
