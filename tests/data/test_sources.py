"""Where documents come from, and what is said when there are none."""

import pytest

from longtrain.data.sources import DataError, read_stdlib, read_text


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
