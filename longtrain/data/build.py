"""`longtrain data build`: input files into the directory that `built.py` describes, in bounded memory, resumable.

Work is kept a shard at a time: the shard's files are on disk before `building.json` counts them, with the place in the inputs where the
next shard begins. Whatever is there beyond that is written again. With a tokenizer a document is held whole, otherwise a few MiB.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from longtrain.data import formats
from longtrain.data.built import BUILDING, FORMAT, INPUTS, MANIFEST, read_json, token_dtype, write_json
from longtrain.data.chat import Chat, load_chat
from longtrain.data.corpus import say_tokenizer
from longtrain.data.formats import LeftOut
from longtrain.data.reading import Input, encode_documents, list_files, read_parts
from longtrain.data.shard import ShardWriter
from longtrain.data.sources import DataError
from longtrain.data.tokenize import Tokenizer, byte_tokens, load_tokenizer, mu_law_samples
from longtrain.units import format_bytes, format_time

MOST_DOCUMENTS = 2**20
"""In one shard: their rows are held in memory until it is on disk."""
REDRAW_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a build makes of its inputs."""

    format: str = "auto"
    """A key of `reading.READERS`, or `auto`: what each file's name says."""
    field: str = "text"
    """Where the text is in JSONL and parquet."""
    case: str = "keep"
    """Of FASTA letters: `keep`, `upper` or `lower`."""
    tokenizer: Path | None = None
    """A `tokenizer.json`, or its directory; None for bytes."""
    special_tokens: bool = False
    end_token: int | None = None
    """Put behind every document."""
    turns: str = "all"
    """Of conversations: learn from `all` of the assistant's turns, or the `last`."""
    shard_bytes: int = 2**28
    """A shard ends with the first document at which it has as many."""


def build(out: Path, inputs: Sequence[str], settings: Settings, log: TextIO) -> int:
    """Build, or go on building. Returns how many documents (or whole files) had to be left out, each named on `log`.

    Raises DataError where nothing can be built, or where `out` holds other data or cannot be written.
    """
    files = list_files(inputs, out)
    kinds = [formats.format_of(Path(f.path)) if settings.format == "auto" else settings.format for f in files]
    check_settings(settings, kinds)
    tokenizer = choose_tokenizer(settings, kinds, files)
    chat = load_chat(settings.tokenizer, settings.turns) if settings.format == "chat" else None
    wanted = {
        "format": FORMAT,
        "tokenizer": tokenizer.identity,
        "vocabulary": tokenizer.vocabulary,
        "reading": {"format": settings.format, "field": settings.field, "case": settings.case}
        | ({"turns": settings.turns, "chat_template": chat.sha256} if chat else {}),
        "shard_bytes": settings.shard_bytes,
        "inputs": list(inputs),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            state, finished = read_state(out, wanted, files)
            if finished:
                (out / BUILDING).unlink(missing_ok=True)
                print(f"{out} is built already: {say_built(state)}", file=log)
                return state["left_out"]
            return write_shards(out, state, files, kinds, settings, tokenizer, chat, log)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror}); make room or give permission there, then run the same command again: "
            "finished shards are kept"
        ) from error


def check_settings(settings: Settings, kinds: Sequence[str]) -> None:
    """Raise DataError for an option that would have no effect, or none that makes sense."""
    for option, given, useful in (
        ("--field", settings.field != Settings().field, {"jsonl", "parquet"} & set(kinds)),
        ("--case", settings.case != Settings().case, "fasta" in kinds),
        ("--special-tokens", settings.special_tokens, settings.tokenizer and settings.format != "chat"),
        ("--turns", settings.turns != Settings().turns, settings.format == "chat"),
        ("--end-token", settings.end_token is not None, settings.format != "chat"),
    ):
        if given and not useful:
            chat = "another --format than chat, whose template writes them"
            needs = {"--field": "JSONL or parquet", "--case": "FASTA", "--turns": "--format chat", "--end-token": chat}
            needs["--special-tokens"] = chat if settings.format == "chat" else "--tokenizer"
            needs = needs[option]
            raise DataError(f"{option} has no effect without {needs}; leave it out, or correct the inputs")
    if settings.format == "chat" and settings.tokenizer is None:
        raise DataError("--format chat needs a tokenizer with a chat template; give --tokenizer, the directory of a model trained to chat")
    if settings.end_token is not None and not 0 <= settings.end_token < 2**32:
        raise DataError(f"--end-token {settings.end_token} is no token id; give one from 0 to {2**32 - 1}")


def choose_tokenizer(settings: Settings, kinds: Sequence[str], files: Sequence[Input]) -> Tokenizer:
    """The one tokenizer of all files. Raises DataError where they would need two."""
    audio = [Path(f.path) for f, kind in zip(files, kinds, strict=True) if kind == "wav"]
    if audio and len(audio) < len(files):
        other = next(f.path for f, kind in zip(files, kinds, strict=True) if kind != "wav")
        raise DataError(f"{audio[0]} is audio and {other} is not, and their tokens mean different things; build them into two directories")
    if settings.tokenizer is not None and (audio or "bytes" in kinds):
        raise DataError(f"--tokenizer reads text, and {files[0].path} is read as {kinds[0]}; leave --tokenizer out")
    if audio:
        made = mu_law_samples(formats.wav_rate(audio))
    elif settings.tokenizer is not None:
        made = load_tokenizer(settings.tokenizer, settings.special_tokens)
    else:
        made = byte_tokens()
    if settings.end_token is None:
        return made
    identity = {**made.identity, "end_token": settings.end_token}
    return Tokenizer(identity, max(made.vocabulary, settings.end_token + 1), made.encode)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one build writes a directory. The lock goes with the process, however it ends."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{out} is being built by another process; wait for it, or name another directory") from None
    else:
        yield
    finally:
        os.close(handle)


def read_state(out: Path, wanted: dict, files: Sequence[Input]) -> tuple[dict, bool]:
    """What was built so far, and whether that is all. Raises DataError where it was begun with other settings or inputs."""
    for name in (MANIFEST, BUILDING):
        if not (out / name).exists():
            continue
        state = read_json(out / name)
        other = [f"{key}: {state.get(key)} there, {value} here" for key, value in wanted.items() if state.get(key) != value]
        if not other:
            before = {tuple(entry) for entry in read_json(out / INPUTS)}
            changed = sorted(path for path, *_ in before ^ {astuple(f) for f in files})
            other = [f"{path} was added, removed or changed" for path in changed[:3]]
        if other:
            what = "a finished build" if name == MANIFEST else "an unfinished build"
            raise DataError(f"{out} holds {what} that differs ({'; '.join(other)}); name another directory, or remove it to build anew")
        return state, name == MANIFEST
    strange = sorted(p.name for p in out.iterdir() if p.name != INPUTS and p.suffix != ".partial")
    if strange:
        raise DataError(f"{out} is not empty (it holds {strange[0]}) and no build was begun there; name another directory")
    write_json(out / INPUTS, [astuple(f) for f in files])
    state = {**wanted, "shards": [], "at": [0, 0, 0], "left_out": 0, "empty": 0, "largest": 0}
    write_json(out / BUILDING, state)
    return state, False


def write_shards(
    out: Path,
    state: dict,
    files: Sequence[Input],
    kinds: Sequence[str],
    settings: Settings,
    tokenizer: Tokenizer,
    chat: Chat | None,
    log: TextIO,
) -> int:
    """Read on from ``state["at"]`` to the end, and put the manifest in place."""
    if state["shards"]:
        print(f"going on behind {len(state['shards'])} shards: {say_built(state)}", file=log)
    options = {"field": settings.field, "case": settings.case, "rate": tokenizer.identity.get("rate"), "chat": chat}
    dtype = token_dtype(tokenizer.vocabulary)
    shard = ShardWriter(out, len(state["shards"]), dtype, settings.end_token)
    progress = Progress(log, files, state["at"])
    events = read_parts(files, kinds, state["at"], options)
    for index, part in events if tokenizer.encode is None else encode_documents(events, tokenizer.encode):
        progress.show(index, part.offset)
        if isinstance(part, LeftOut):
            shard.discard()
            state["left_out"] += 1
            progress.clear()
            print(part.why, file=log)
            continue
        shard.write(part.content)
        if part.last:
            if not shard.end(part.name, part.key, files[index].input, part.learned or ()):
                state["empty"] += 1
                progress.clear()
                print(f"{part.name} is empty: it holds no token, and nothing of it is built", file=log)
            state["at"] = [index, part.offset, part.number]
            if shard.bytes >= settings.shard_bytes or len(shard.rows) >= MOST_DOCUMENTS:
                shard = commit(out, state, shard)
    progress.clear()
    state["at"] = [len(files), 0, 0]
    shard = commit(out, state, shard)
    shard.remove()
    if not state["shards"]:
        for name in (BUILDING, INPUTS):
            (out / name).unlink()
        raise DataError(
            f"nothing to build: {len(files)} files hold no document that can be read "
            f"({state['left_out']} left out, {state['empty']} empty); name files with data"
        )
    write_json(out / MANIFEST, {key: value for key, value in state.items() if key != "at"})
    (out / BUILDING).unlink()
    print(f"built {out}: {say_built(state)}; {progress.rate()}", file=log)
    return state["left_out"]


def commit(out: Path, state: dict, shard: ShardWriter) -> ShardWriter:
    """Put a shard that holds documents on disk and into the state; the writer of the next one."""
    if not shard.rows:
        return shard
    state["shards"].append(shard.close())
    state["largest"] = max(state["largest"], shard.largest)
    write_json(out / BUILDING, state)
    return ShardWriter(out, len(state["shards"]), shard.dtype, shard.end_token)


class Progress:
    """A line that says how far the build is: on a terminal only."""

    def __init__(self, log: TextIO, files: Sequence[Input], at: Sequence[int]) -> None:
        self.log, self.shown = log, log.isatty()
        self.before = np.cumsum([0] + [f.bytes for f in files]).tolist()
        """Bytes of the files before each."""
        self.first = self.done = self.before[at[0]] + at[1]
        self.began = self.drawn_at = time.monotonic()

    def show(self, file: int, offset: int) -> None:
        self.done = self.before[file] + offset
        if self.shown and (now := time.monotonic()) - self.drawn_at >= REDRAW_SECONDS:
            self.drawn_at = now
            left = (self.before[-1] - self.done) * (now - self.began) / max(1, self.done - self.first)
            amount = f"{format_bytes(self.done)} of {format_bytes(self.before[-1])}"
            self.log.write(f"\rbuild  {amount}  {self.rate()}  ETA {format_time(left)}\x1b[K")
            self.log.flush()

    def rate(self) -> str:
        return f"{format_bytes((self.done - self.first) / max(1e-9, time.monotonic() - self.began))}/s"

    def clear(self) -> None:
        if self.shown:
            self.log.write("\r\x1b[K")
            self.log.flush()


def say_built(state: dict) -> str:
    """`1,203 documents, 4,500,000 tokens by bytes in 2 shards, 3 left out, 1 empty`."""
    documents, tokens = (sum(shard[key] for shard in state["shards"]) for key in ("documents", "tokens"))
    rest = "".join(f", {state[key]} {said}" for key, said in (("left_out", "left out, each was named"), ("empty", "empty")) if state[key])
    return f"{documents:,} documents, {tokens:,} tokens by {say_tokenizer(state['tokenizer'])} in {len(state['shards'])} shards{rest}"
