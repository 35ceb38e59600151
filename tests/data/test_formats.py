"""Readers: the same documents whatever the blocks, from wherever they are told to go on; what is broken is named."""

import json
import struct
import wave

import numpy as np
import pytest

from longtrain.data import formats
from longtrain.data.formats import READERS, LeftOut, format_of, mu_law

OPTIONS = {"field": "text", "case": "keep", "rate": 8000}


def read(kind, path, offset=0, number=0, **options):
    """Whole documents by name, what was left out, and where each document ended."""
    documents, left_out, ends, parts = {}, [], [], b""
    for part in READERS[kind](path, offset, number, {**OPTIONS, **options}):
        if isinstance(part, LeftOut):
            left_out.append(part.why)
            parts = b""
            continue
        parts += part.content
        if part.last:
            documents[part.name.removeprefix(str(path))] = parts
            ends.append((part.offset, part.number))
            parts = b""
    return documents, left_out, ends


@pytest.fixture(params=[1, 2, 7, 2**20])
def block(request, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", request.param)


def write_wav(path, samples, rate=8000, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setframerate(rate)
        file.setsampwidth(width)
        file.writeframes(samples)


FASTA = b">one first\nACGT\nacg\n\n>two\nTTTT*\n>none\n>three\nA-C.G\r\nN"


@pytest.fixture
def inputs(tmp_path):
    """One file of each kind, and what is in it."""
    records = [{"text": "ä b"}, {"text": "", "x": 1}, {"text": "c\n"}]
    (tmp_path / "t.txt").write_bytes("grüße, 文字 🙂\r\n".encode())
    (tmp_path / "j.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    (tmp_path / "f.fa").write_bytes(FASTA)
    write_wav(tmp_path / "w.wav", struct.pack("<8h", 0, 0, 100, 300, -32768, -32768, 32767, 32767), channels=2)
    return {
        "text": ("t.txt", {"": "grüße, 文字 🙂\r\n".encode()}),
        "bytes": ("t.txt", {"": "grüße, 文字 🙂\r\n".encode()}),
        "jsonl": ("j.jsonl", {":1": "ä b".encode(), ":3": b"", ":5": b"c\n"}),
        "fasta": ("f.fa", {":one": b"ACGTacg", ":two": b"TTTT*", ":none": b"", ":three": b"A-C.GN"}),
        "wav": ("w.wav", {"": mu_law(np.array([0, 200 / 2**15, -1, 32767 / 2**15])).tobytes()}),
    }


@pytest.mark.parametrize("kind", ["text", "bytes", "jsonl", "fasta", "wav"])
def test_documents_do_not_depend_on_the_blocks_they_are_read_in(kind, inputs, tmp_path, block):
    name, expected = inputs[kind]
    documents, left_out, _ = read(kind, tmp_path / name)
    assert documents == expected and not left_out


@pytest.mark.parametrize("kind", ["text", "bytes", "jsonl", "fasta", "wav"])
def test_reading_goes_on_behind_any_document(kind, inputs, tmp_path):
    name, expected = inputs[kind]
    _, _, ends = read(kind, tmp_path / name)
    for done, (offset, number) in enumerate(ends, start=1):
        documents, left_out, _ = read(kind, tmp_path / name, offset, number)
        assert list(documents.items()) == list(expected.items())[done:] and not left_out


@pytest.mark.parametrize(
    "content, at", [(b"abc\0def", "byte 3 is 0"), (b"ab\xffc", "byte 2 is not UTF-8"), ("aé".encode()[:-1], "byte 1 is not UTF-8")]
)
def test_binary_is_no_text_and_the_byte_is_named(content, at, tmp_path, block):
    (tmp_path / "x").write_bytes(content)
    documents, left_out, _ = read("text", tmp_path / "x")
    assert not documents and len(left_out) == 1
    assert left_out[0].startswith(f"{tmp_path / 'x'} is binary, not text ({at}") and "--format bytes" in left_out[0]
    assert read("bytes", tmp_path / "x")[0] == {"": content}


BROKEN_LINES = {
    '{"text": "a"': "is not JSON",
    "text": "is not JSON",
    '{"txt": 1, "id": 2}': "has no field 'text' (it has id, txt)",
    "{}": "has no field 'text' (it has nothing)",
    '{"text": 1}': "is no object whose 'text' is text",
    "[1]": "is no object",
    "null": "is no object",
    '{"text": "\\ud800"}': "is not UTF-8",
    "[" * 100_000: "is not JSON",
}


def test_every_broken_line_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps({"text": "good"})
    path.write_text("".join(f"{line}\n{good}\n" for line in BROKEN_LINES))
    documents, left_out, _ = read("jsonl", path)
    assert list(documents) == [f":{2 * i}" for i in range(1, len(BROKEN_LINES) + 1)] and set(documents.values()) == {b"good"}
    assert len(left_out) == len(BROKEN_LINES)
    for number, (why, said) in enumerate(zip(left_out, BROKEN_LINES.values(), strict=True)):
        assert why.startswith(f"{path}:{2 * number + 1} {said}") and "; correct" in why


def test_a_binary_file_is_not_called_broken_line_by_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\x89\0\1\n\0\2\n\3")
    documents, left_out, _ = read("jsonl", tmp_path / "x.jsonl")
    assert not documents and len(left_out) == 1 and "is binary, not JSONL; leave it out" in left_out[0]


def test_fasta_letters_keep_their_case_or_change_it(inputs, tmp_path):
    assert read("fasta", tmp_path / "f.fa", case="upper")[0][":one"] == b"ACGTACG"
    assert read("fasta", tmp_path / "f.fa", case="lower")[0][":one"] == b"acgtacg"


def test_what_is_no_sequence_is_named_and_the_next_one_read(tmp_path, block):
    (tmp_path / "x.fa").write_bytes(b">a\nAC1T\nAAAA\n>b\nGG\n")
    documents, left_out, _ = read("fasta", tmp_path / "x.fa")
    assert documents == {":b": b"GG"} and len(left_out) == 1 and ":a holds b'1', which no sequence has; correct it" in left_out[0]
    (tmp_path / "y.fa").write_bytes(b"ACGT\n>a\nA\n")
    assert "is no FASTA (it begins with b'A'" in read("fasta", tmp_path / "y.fa")[1][0]


@pytest.mark.parametrize(
    "width, packed",
    [
        (1, bytes([128, 192, 0])),
        (2, struct.pack("<3h", 0, 2**14, -(2**15))),
        (3, bytes([0, 0, 0, 0, 0, 64, 0, 0, 128])),
        (4, struct.pack("<3i", 0, 2**30, -(2**31))),
    ],
)
def test_every_sample_width_means_the_same(width, packed, tmp_path):
    write_wav(tmp_path / "x.wav", packed, width=width)
    assert read("wav", tmp_path / "x.wav")[0][""] == mu_law(np.array([0, 0.5, -1])).tobytes()


def test_mu_law_is_fine_where_it_is_quiet_and_inverts():
    samples = np.linspace(-1, 1, 4001)
    codes = mu_law(samples)
    assert codes[0] == 0 and codes[2000] == 128 and codes[-1] == 255 and (np.diff(codes.astype(int)) >= 0).all()
    middle = (codes.astype(float) + 0.5) / 128 - 1  # the inverse, of the middle of each step
    again = np.sign(middle) * np.expm1(np.abs(middle) * np.log(256)) / 255
    step = np.log(256) * (np.abs(samples) + 1 / 255) / 128  # of the inverse, per step
    assert (np.abs(again - samples) <= 0.52 * step).all()


def test_broken_audio_is_named(tmp_path):
    (tmp_path / "junk.wav").write_bytes(b"RIFFnot a wave file")
    write_wav(tmp_path / "fast.wav", b"\0\0", rate=44100)
    write_wav(tmp_path / "cut.wav", bytes(2000))
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:1000])
    for name, said in (("junk", "no WAV"), ("fast", "44100 samples a second, the first file 8000"), ("cut", "ends 522 samples early")):
        documents, left_out, _ = read("wav", tmp_path / f"{name}.wav")
        assert not documents and len(left_out) == 1 and said in left_out[0] and "; convert it" in left_out[0]


def test_parquet_rows_are_documents_from_any_row_on(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is not tested: pip install longtrain[parquet]")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    texts = [f"tëxt {i}" if i % 7 else None for i in range(50)]
    parquet.write_table(pyarrow.table({"id": range(50), "text": texts}), path, row_group_size=8)
    documents, left_out, ends = read("parquet", path)
    assert documents == {f":{i}": text.encode() for i, text in enumerate(texts) if text}
    assert len(left_out) == 8 and left_out[1].startswith(f"{path}:7 holds no text in 'text' (NoneType); correct")
    for done in (3, 8, 20):
        rest, _, _ = read("parquet", path, *ends[done - 1])
        assert list(rest.items()) == list(documents.items())[done:]
    assert "has no column 'body' (it has id, text)" in read("parquet", path, field="body")[1][0]
    path.write_bytes(path.read_bytes()[:500])
    assert "is no readable parquet file" in read("parquet", path)[1][0]


def test_the_format_is_what_the_name_says(tmp_path):
    names = {"a.jsonl": "jsonl", "a.FA": "fasta", "a.fna": "fasta", "a.wav": "wav", "a.parquet": "parquet", "a.md": "text", "a": "text"}
    assert {name: format_of(tmp_path / name) for name in names} == names
