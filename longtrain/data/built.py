"""Tokens on disk: a directory that `longtrain data build` writes and training maps into memory.

    manifest.json     what it is; stands there only when everything else does (while it is built: building.json)
    inputs.json       the files it was built from: path, bytes, time of change
    00000.tokens      tokens of whole documents, little-endian, one behind the other
    00000.documents   a row a document: its tokens, where its name ends, the key of its contents, which input it came from
    00000.names       the names, one behind the other
    00000.learned     of conversations: the ranges of the shard's tokens that are targets, [start, stop), ascending

The next shards have the same files. `open_built` checks that they are all there in their sizes; `check_contents` reads them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longtrain.data.corpus import Corpus
from longtrain.data.sources import DataError

FORMAT, READABLE = 2, (1, 2)
"""Of format 1 the keys, by which documents are held out, are of names."""
MANIFEST, BUILDING, INPUTS = "manifest.json", "building.json", "inputs.json"
DOCUMENT = np.dtype([("length", "<i8"), ("name_stop", "<i8"), ("key", "<u8"), ("input", "<i4")])
BLOCK_BYTES = 2**20


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest that holds every id."""
    return np.dtype("u1" if vocabulary <= 2**8 else "<u2" if vocabulary <= 2**16 else "<u4")


def write_json(path: Path, value: object) -> None:
    """`path` holds the old value or the new one, never a part. OSError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable, or build the data again") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove the directory and build the data again") from error


def read_manifest(directory: Path) -> dict:
    """Raises DataError where `directory` holds no finished build."""
    if not (directory / MANIFEST).exists():
        if (directory / BUILDING).exists():
            done = read_json(directory / BUILDING)["shards"]
            raise DataError(f"{directory} is half built ({len(done)} shards so far); run its `longtrain data build` again: it goes on")
        found = (
            f"{directory} holds no built data ({MANIFEST} is missing)"
            if directory.is_dir()
            else f"there is no directory {directory} (from {Path.cwd()})"
        )
        raise DataError(f"{found}; name one that `longtrain data build` wrote")
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") not in READABLE:
        raise DataError(
            f"{directory} has format {manifest.get('format')}, this version reads {READABLE[0]} to {FORMAT}; build the data again"
        )
    return manifest


def open_built(directory: str | Path, source: str | None = None) -> Corpus:
    """Its documents, under the name of `source`. Raises DataError for what is missing or has another size than it was built with."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for shard in manifest["shards"]:
        for part in shard["bytes"]:
            path, expected = directory / f"{shard['name']}.{part}", shard["bytes"][part]
            if not path.exists():
                raise DataError(f"{path} is missing; restore it, or remove {directory} and build the data again")
            if path.stat().st_size != expected:
                found = f"{path} has {path.stat().st_size} bytes and was built with {expected}"
                raise DataError(f"{found}; restore it, or remove {directory} and build the data again")
    dtype = token_dtype(manifest["vocabulary"])
    names = [directory / shard["name"] for shard in manifest["shards"]]
    mapped = tuple(_map(path.with_suffix(".tokens")) for path in names)
    tables = [np.frombuffer(_map(path.with_suffix(".documents")), dtype=DOCUMENT) for path in names]
    texts = [_map(path.with_suffix(".names")) for path in names]
    learned = ((path, shard["bytes"].get("learned")) for path, shard in zip(names, manifest["shards"], strict=True))
    firsts = np.cumsum([0] + [len(table) for table in tables]).tolist()
    length_N, key_N = (np.concatenate([table[column] for table in tables]) for column in ("length", "key"))
    contents = [{part: shard["crc32"].get(part) for part in ("tokens", "learned")} for shard in manifest["shards"]]

    def name_of(number: int) -> str:
        shard = bisect_right(firsts, number) - 1
        row, stops = number - firsts[shard], tables[shard]["name_stop"]
        return texts[shard][int(stops[row - 1]) if row else 0 : int(stops[row])].decode("utf-8", "surrogateescape")

    return Corpus(
        blocks=tuple(np.frombuffer(m, dtype=dtype) for m in mapped),
        block_N=np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables]),
        start_N=np.concatenate([np.cumsum(table["length"]) - table["length"] for table in tables]),
        length_N=length_N,
        key_N=key_N,
        source_N=np.zeros(firsts[-1], dtype=np.int32),
        number_N=np.arange(firsts[-1]),
        sources=(source or directory.resolve().name,),
        name_of=name_of,
        tokenizer=manifest["tokenizer"],
        vocabulary=manifest["vocabulary"],
        largest=manifest["largest"],
        digest=hashlib.blake2b(json.dumps(contents).encode() + length_N.tobytes() + key_N.tobytes(), digest_size=16).hexdigest(),
        mapped=mapped,
        learned=tuple(_ranges(path) if size else None for path, size in learned),
    )


def _ranges(path: Path) -> np.ndarray:
    return np.frombuffer(_map(path.with_suffix(".learned")), dtype="<i8").reshape(-1, 2)


def read_inputs_of(directory: Path) -> np.ndarray:
    """``[N]``: which of the manifest's inputs each document came from."""
    names = [shard["name"] for shard in read_manifest(directory)["shards"]]
    return np.concatenate([np.fromfile(directory / f"{name}.documents", dtype=DOCUMENT)["input"] for name in names])


def check_contents(directory: Path) -> Iterator[str]:
    """Read everything; a sentence for each file that is not what was written."""
    for shard in read_manifest(directory)["shards"]:
        for part in shard["crc32"]:
            path, crc = directory / f"{shard['name']}.{part}", 0
            with open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    crc = zlib.crc32(block, crc)
            if crc != (built := shard["crc32"][part]):
                yield f"{path} is damaged: its checksum is {crc:08x} and was {built:08x}; restore it, or build the data again"


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
