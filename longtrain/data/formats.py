"""Readers of input files: text, bytes, JSONL, parquet, FASTA, WAV. Each yields the documents of one file in parts of bounded size.

A reader goes on where it is told to (`offset` bytes and `number` records into the file), which is how a build resumes. What cannot be
read comes out as `LeftOut`, with the place and what to do, and the reader goes on behind it where it can.
"""

from __future__ import annotations

import codecs
import importlib
import json
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longtrain.data.sources import DataError

BLOCK_BYTES = 2**20

Ranges = Sequence[tuple[int, int]]


class Part(NamedTuple):
    """Some of a document: the next bytes (text is UTF-8) or tokens, and whether they are its last ones."""

    name: str
    content: bytes | np.ndarray
    last: bool
    offset: int
    """How far into the file the reader is: bytes, ..."""
    number: int
    """... and records."""
    learned: Ranges | None = None
    """Ranges of the whole document's characters (then: of its tokens) that are targets; None: all of it."""
    key: int = 0
    """Of the last part: `content_key` of the whole document, which whoever reads its parts knows."""


class LeftOut(NamedTuple):
    """A document, or a whole file, that cannot be read; parts of it that came before are to be forgotten."""

    why: str
    offset: int
    number: int


Reader = Callable[[Path, int, int, dict], Iterator[Part | LeftOut]]


def read_text(path: Path, offset: int, number: int, options: dict) -> Iterator[Part | LeftOut]:
    """The file is one document of UTF-8."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    for part in read_bytes(path, offset, number, options):
        at = None
        zero = part.content.find(b"\0")
        if zero >= 0:
            at = f"byte {read + zero} is 0"
        elif part.last or decoder.getstate()[0] or not part.content.isascii():
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(part.content, part.last)
            except UnicodeDecodeError as error:
                at = f"byte {read - pending + error.start} is not UTF-8"
        if at is not None:
            why = f"{path} is binary, not text ({at}); leave it out, or build from it with --format bytes"
            yield LeftOut(why, part.offset, part.number)
            return
        read += len(part.content)
        yield part


def read_bytes(path: Path, offset: int, number: int, options: dict) -> Iterator[Part]:
    """The file is one document, whatever is in it."""
    if number:
        return
    with open(path, "rb", buffering=0) as file:
        block = file.read(BLOCK_BYTES)
        while True:
            following = file.read(BLOCK_BYTES) if block else b""
            offset += len(block)
            yield Part(str(path), block, not following, offset, 1)
            if not following:
                return
            block = following


def read_jsonl(path: Path, offset: int, number: int, options: dict) -> Iterator[Part | LeftOut]:
    """A JSON object a line; its `field` is a document."""
    field = options["field"]

    def text_of(record: Any) -> tuple[str, None]:
        found = record.get(field) if isinstance(record, dict) else None
        if isinstance(found, str):
            return found, None
        if isinstance(record, dict) and field not in record:
            held = ", ".join(sorted(record)[:6]) or "nothing"
            raise ValueError(f"has no field {field!r} (it has {held}); correct the line, or name the field with --field")
        raise ValueError(f"is no object whose {field!r} is text; correct the line, or name the field with --field")

    return read_json_lines(path, offset, number, text_of)


def read_json_lines(path: Path, offset: int, number: int, text_of: Callable[[Any], tuple[str, Ranges | None]]) -> Iterator[Part | LeftOut]:
    """A document a line, named `file:line`: `text_of` gives its text and `Part.learned`, or raises ValueError with what is wrong."""
    decode = json.JSONDecoder().decode
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            offset, number = offset + len(line), number + 1
            if not line.strip():
                continue
            try:
                text, learned = text_of(decode(line.decode("utf-8")))
                part = Part(f"{path}:{number}", text.encode("utf-8"), True, offset, number, learned)
            except UnicodeError as error:
                why = f"is not UTF-8 ({error.reason}); correct the line"
            except (json.JSONDecodeError, RecursionError) as error:
                why = f"is not JSON ({error}); correct the line"
            except ValueError as error:
                why = str(error)
            else:
                yield part
                continue
            if number == 1 and b"\0" in line:
                yield LeftOut(f"{path} is binary, not JSONL; leave it out", offset, number)
                return
            yield LeftOut(f"{path}:{number} {why}", offset, number)


def read_parquet(path: Path, offset: int, number: int, options: dict) -> Iterator[Part | LeftOut]:
    """The column `field` of a parquet file, a document a row, named `file:row` (from 0)."""
    parquet = import_extra("pyarrow.parquet", "parquet")
    import pyarrow

    size, field = path.stat().st_size, options["field"]
    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            held = ", ".join(file.schema_arrow.names[:6])
            yield LeftOut(f"{path} has no column {field!r} (it has {held}); leave it out, or name the column with --field", size, number)
            return
        rows, first = file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            if first + file.metadata.row_group(group).num_rows <= number:
                first += file.metadata.row_group(group).num_rows
                continue
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
                for value in batch.column(0):
                    first += 1
                    if first <= number:
                        continue
                    text, offset = value.as_py(), size * first // rows
                    content = text.encode("utf-8") if isinstance(text, str) else text
                    if isinstance(content, bytes):
                        yield Part(f"{path}:{first - 1}", content, True, offset, first)
                    else:
                        why = f"{path}:{first - 1} holds no text in {field!r} ({type(text).__name__}); correct the row"
                        yield LeftOut(why, offset, first)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        yield LeftOut(f"{path} is no readable parquet file ({reason}); restore it, or leave it out", size, number)


def read_fasta(path: Path, offset: int, number: int, options: dict) -> Iterator[Part | LeftOut]:
    """Sequences as documents, named `file:identifier`: letters, `*`, `-` and `.`, without line ends."""
    case = {"keep": bytes, "upper": bytes.upper, "lower": bytes.lower}[options["case"]]
    with open(path, "rb") as file:
        file.seek(offset)
        data, at, line_begins = file.read(BLOCK_BYTES), 0, True
        if data and data[:1] != b">":
            why = f"{path} is no FASTA (it begins with {data[:1]!r}, not b'>'); leave it out, or name its --format"
            yield LeftOut(why, len(data), number)
            return
        name, state = "", "ended"
        while data:
            if line_begins and data.startswith(b">", at):
                if state == "open":
                    yield Part(name, b"", True, offset, number)
                while (stop := data.find(b"\n", at)) < 0 and (more := file.read(BLOCK_BYTES)):
                    data, at = data[at:] + more, 0
                stop = len(data) if stop < 0 else stop + 1
                identifier = (data[at + 1 : stop].split() or [b"%d" % number])[0]
                name, state = f"{path}:{identifier.decode('utf-8', 'replace')}", "open"
                offset, number, at = offset + stop - at, number + 1, stop
            else:
                stop = data.find(b"\n>", at) + 1
                ends, stop = stop > 0, stop or len(data)
                sequence = data[at:stop].translate(None, b" \t\r\n")
                odd = sequence.translate(None, b"*-.")
                offset, at, line_begins = offset + stop - at, stop, data.endswith(b"\n", at, stop)
                if state == "open" and odd and not odd.isalpha():
                    character = next(odd[i : i + 1] for i in range(len(odd)) if not odd[i : i + 1].isalpha())
                    yield LeftOut(f"{name} holds {character!r}, which no sequence has; correct it, or leave it out", offset, number)
                    state = "ended"
                elif state == "open":
                    yield Part(name, case(sequence), ends, offset, number)
                    state = "ended" if ends else "open"
            if at == len(data):
                data, at = file.read(BLOCK_BYTES), 0
        if state == "open":
            yield Part(name, b"", True, offset, number)


def read_wav(path: Path, offset: int, number: int, options: dict) -> Iterator[Part | LeftOut]:
    """The file is one document: a token a sample, channels averaged, by the mu-law (ITU-T G.711, mu = 255) in 256 steps."""
    if number:
        return
    size = path.stat().st_size
    try:
        with wave.open(str(path), "rb") as file:
            if file.getframerate() != options["rate"]:
                raise wave.Error(f"it has {file.getframerate()} samples a second, the first file {options['rate']}")
            width, channels, left = file.getsampwidth(), file.getnchannels(), file.getnframes()
            if not left:
                yield Part(str(path), b"", True, size, 1)
            while left:
                frames = file.readframes(min(left, max(1, BLOCK_BYTES // (width * channels))))
                count = len(frames) // (width * channels)
                if not count:
                    raise wave.Error(f"it ends {left} samples early")
                left -= count
                samples = _samples(frames[: count * width * channels], width).reshape(-1, channels).mean(1)
                yield Part(str(path), mu_law(samples).tobytes(), not left, size - left * width * channels, 1)
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends early"
        yield LeftOut(f"{path} is no WAV that can be read here ({reason}); convert it to PCM at one rate, or leave it out", size, number)


def wav_rate(paths: list[Path]) -> int:
    """Samples a second of the first WAV file that can be read."""
    for path in paths:
        try:
            with wave.open(str(path), "rb") as file:
                return file.getframerate()
        except (wave.Error, EOFError, OSError):
            continue  # the reader names it
    raise DataError(f"none of {len(paths)} files is a WAV file that can be read ({paths[0]} is the first); convert them to PCM")


def _samples(frames: bytes, width: int) -> np.ndarray:
    """PCM as float64 in [-1, 1)."""
    if width == 1:
        return (np.frombuffer(frames, dtype=np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        padded = np.zeros((len(frames) // 3, 4), dtype=np.uint8)
        padded[:, 1:] = np.frombuffer(frames, dtype=np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(frames, dtype=f"<i{width}") / 2.0 ** (8 * width - 1)


def mu_law(samples_N: np.ndarray) -> np.ndarray:
    """``[N]`` uint8 of samples in [-1, 1]: sign(x) ln(1 + 255 |x|) / ln 256, from -1 to 1 in 256 equal steps."""
    compressed_N = np.sign(samples_N) * np.log1p(255 * np.abs(samples_N)) / np.log(256)
    return np.clip((compressed_N + 1) * 128, 0, 255).astype(np.uint8)


READERS: dict[str, Reader] = {
    "text": read_text, "bytes": read_bytes, "jsonl": read_jsonl, "parquet": read_parquet, "fasta": read_fasta, "wav": read_wav
}  # fmt: skip
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".wav": "wav"}
SUFFIXES |= dict.fromkeys((".fa", ".fasta", ".fna", ".faa"), "fasta")


def format_of(path: Path) -> str:
    """What its name says; text where it says nothing."""
    return SUFFIXES.get(path.suffix.lower(), "text")


def import_extra(module: str, extra: str):
    """An optional dependency. Raises DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module.partition('.')[0]} is not installed ({error}); get it with: pip install longtrain[{extra}]") from None
