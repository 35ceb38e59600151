"""Documents in columns: the split, joining, the vocabulary."""

import numpy as np
import pytest

from longtrain.data.corpus import check_vocabulary, corpus_in_memory, held_out, join, name_key, say_tokenizer, split
from longtrain.data.sources import DataError, Document


def corpus(*lengths, source="documents", first=0, named="d"):
    numbers = [np.frombuffer((first + i).to_bytes(4, "little"), dtype=np.uint8) for i in range(len(lengths))]
    return corpus_in_memory([Document(f"{named}{first + i}", np.resize(numbers[i], n)) for i, n in enumerate(lengths)], source)


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


def test_the_split_is_of_contents_so_copies_stay_together_and_names_do_not_matter():
    once = corpus(*[20] * 200)
    train, validation = split(join([once, corpus(*[20] * 200, named="copy-of-d")]), 0.1, 0)
    assert set(names(validation)) == {f"{kind}{name}" for name in names(split(once, 0.1, 0)[1]) for kind in ("", "copy-of-")}
    assert len(train) + len(validation) == 400
    few = join([corpus(9, 10), corpus(9, 10, named="copy-of-d")])
    for seed in range(8):  # far too few for the fraction: the nearest is taken, with its copy
        assert [len(part) for part in split(few, 1e-4, seed)] == [2, 2] == [len(part) for part in split(few, 0.9999, seed)]
    with pytest.raises(DataError, match=r"one document 3 times \(d0\)"):
        split(join([corpus(9)] * 3), 0.5, 0)


def test_documents_with_names_of_their_own_are_held_out_by_them():
    documents = [Document(name, np.zeros(5, dtype=np.uint8)) for name in ("ast.py", "bdb.py", "cgi.py")]
    by_name = corpus_in_memory(documents, by_name=True)
    assert by_name.key_N.tolist() == [name_key(d.name) for d in documents] and by_name.digest != corpus_in_memory(documents).digest
    assert [len(part) for part in split(by_name, 1e-4, 0)] == [2, 1]


def test_long_documents_that_begin_alike_are_told_apart_by_their_length():
    begins = np.zeros(70_000, dtype=np.uint8)
    keys = corpus_in_memory([Document("a", begins), Document("b", begins[:-1]), Document("c", begins[:65_536])]).key_N
    assert len(set(keys.tolist())) == 3


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
    assert [joined.tokens(i).tolist() for i in range(2)] == [[7, 0, 0, 0, 7], [0] * 3]


def test_the_digest_tells_contents_apart_and_not_names():
    digests = {corpus(3, 4).digest, corpus(4, 3).digest, corpus(3, 4, first=1).digest, join([corpus(3), corpus(4)]).digest}
    assert len(digests) == 4 and corpus(3, 4, named="moved/d").digest in digests


def test_ids_outside_the_vocabulary_are_named_with_their_position():
    docs = corpus_in_memory(
        [Document("ok", np.array([1, 99], dtype=np.uint8)), Document("bad", np.array([3, 100, 250], dtype=np.uint8))]
    )
    check_vocabulary(docs, 251)
    with pytest.raises(DataError, match="bad: token id 100 at position 1 is outside the vocabulary of 100; .* 251"):
        check_vocabulary(docs, 100)


def test_a_tokenizer_is_told_by_its_whole_file_name_and_the_begin_of_its_sum():
    told = say_tokenizer({"kind": "tokenizers", "file": "tokenizer.json", "sha256": "0123456789abcdef"})
    assert told == "tokenizers (file tokenizer.json, sha256 0123456789ab)"
