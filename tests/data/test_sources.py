"""Where documents come from, and what is said when there are none."""

import numpy as np
import pytest

from longtrain.data.sources import DataError, Document, check_vocabulary, read_stdlib, read_text, split_documents


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_the_standard_library_is_long_real_code_in_a_fixed_order():
    documents = read_stdlib()
    names = [d.name for d in documents]
    assert names == sorted(names) and "typing.py" in names
    assert not any("site-packages" in n or "/test/" in n for n in names)
    assert sum(len(d.tokens) for d in documents) > 4_000_000
    assert max(len(d.tokens) for d in documents) > 65_536


def test_tests_empty_files_and_other_packages_are_left_out_of_the_standard_library(tmp_path):
    kept = {"b.py": b"b = 1", "a/c.py": b"c"}
    left_out = {"test/d.py": b"d", "site-packages/e.py": b"e", "empty.py": b"", "f.txt": b"f"}
    write(tmp_path, kept | left_out)
    assert [(d.name, bytes(d.tokens)) for d in read_stdlib(tmp_path)] == [("a/c.py", b"c"), ("b.py", b"b = 1")]


def test_text_files_directories_and_globs_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"x.txt": b"x", "d/y.txt": b"y", "d/e/z.md": b"\xff", "d/empty": b""})
    assert [bytes(d.tokens) for d in read_text(["d", "x.txt", "**/*.txt"])] == [b"\xff", b"y", b"x"]


@pytest.mark.parametrize("patterns, said", [(["none/*.txt"], "names no file"), (["empty"], "are all empty"), (["gone"], "names no file")])
def test_no_text_is_said_plainly(patterns, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"empty/a": b"", "empty/b": b""})
    with pytest.raises(DataError, match=f"data.files: .*{said}.*; "):
        read_text(patterns)


def test_a_python_without_source_is_said_plainly(tmp_path):
    with pytest.raises(DataError, match="no Python source.*; use another Python"):
        read_stdlib(tmp_path)


def documents(*lengths):
    return [Document(f"d{i}", np.full(n, i, dtype=np.uint8)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("fraction, seed", [(0.05, 0), (0.3, 1), (0.5, 2)])
def test_the_split_takes_whole_documents_once_and_repeats(fraction, seed):
    everything = documents(*range(10, 60))
    train, validation = split_documents(everything, fraction, seed)
    again = split_documents(everything, fraction, seed)
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in everything)
    assert ([d.name for d in train], [d.name for d in validation]) == tuple([d.name for d in part] for part in again)
    total = sum(range(10, 60))
    assert fraction * total <= sum(len(d.tokens) for d in validation) < fraction * total + 60


def test_the_split_depends_on_the_seed():
    everything = documents(*[20] * 40)
    held_out = {tuple(d.name for d in split_documents(everything, 0.1, seed)[1]) for seed in range(5)}
    assert len(held_out) > 1


def test_two_documents_give_one_to_each_side_and_one_is_refused():
    train, validation = split_documents(documents(10, 1000), 0.5, 0)
    assert len(train) == len(validation) == 1
    with pytest.raises(DataError, match="one document.*; give at least two"):
        split_documents(documents(10), 0.5, 0)


def test_ids_outside_the_vocabulary_are_named_with_their_position():
    docs = [Document("ok", np.array([1, 99], dtype=np.uint8)), Document("bad", np.array([3, 100, 250], dtype=np.uint8))]
    check_vocabulary(docs, 251)
    with pytest.raises(DataError, match="bad: token id 100 at position 1 is outside the vocabulary of 100; .* 251"):
        check_vocabulary(docs, 100)
