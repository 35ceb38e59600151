"""Building: complete, the same after any interruption, refused where it would mix things up."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest

from longtrain import cli
from longtrain.data import build as building
from longtrain.data import formats, reading
from longtrain.data import shard as sharding
from longtrain.data.build import Settings, build
from longtrain.data.built import DOCUMENT, check_contents, open_built, token_dtype
from longtrain.data.corpus import corpus_in_memory
from longtrain.data.sources import DataError, Document, read_text


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Thirty text files and a thirty-first that turns out binary at its end; a JSONL of forty lines, three of them broken and one empty."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", 256)
    chance = random.Random(0)
    directory = tmp_path / "texts"
    directory.mkdir()
    for index in range(30):
        (directory / f"{index:02}.txt").write_text("".join(chance.choices("abcdé \n", k=chance.randrange(1, 3000))))
    (directory / "17-binary.txt").write_bytes(b"text " * 500 + b"\0")
    lines = [json.dumps({"text": "".join(chance.choices("xyz ", k=200))}) for _ in range(40)]
    lines[10], lines[20], lines[21], lines[30] = "broken", "{}", "[", '{"text": ""}'
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    return tmp_path


def inputs(texts):
    return [str(texts / "texts"), str(texts / "lines.jsonl")]


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


SMALL = Settings(shard_bytes=4000)


def test_what_was_built_is_what_was_there(texts, monkeypatch):
    monkeypatch.setattr(sharding, "BUFFER_BYTES", 500)
    log = io.StringIO()
    assert build(texts / "out", inputs(texts), SMALL, log) == 4
    built, whole = open_built(texts / "out"), corpus_in_memory(read_text([str(texts / "texts" / "??.txt")]))
    lines = (texts / "lines.jsonl").read_text().split("\n")
    expected = {whole.name(i): whole.tokens(i).tobytes() for i in range(30)}
    for number, line in enumerate(lines, start=1):
        if number not in (11, 21, 22, 31):
            expected[f"{texts / 'lines.jsonl'}:{number}"] = json.loads(line)["text"].encode()
    assert [(built.name(i), built.tokens(i).tobytes()) for i in range(len(built))] == list(expected.items())
    assert built.blocks[0].dtype == np.uint8 and len(built.blocks) > 5
    assert built.largest == max(max(content) for content in expected.values())
    assert sorted(built.key_N[:30]) == sorted(whole.key_N)
    said = log.getvalue().splitlines()
    assert said[0].startswith(f"{texts / 'texts' / '17-binary.txt'} is binary, not text (byte 2500 is 0)")
    assert [line.split(" ")[0].split(":")[-1] for line in said[1:5]] == ["11", "21", "22", "31"] and "is empty" in said[4]
    assert said[5].startswith(f"built {texts / 'out'}: 66 documents, ") and "4 left out, each was named, 1 empty" in said[5]
    assert not list(check_contents(texts / "out"))


def finished_shards(directory):
    """Those that an unfinished build counts."""
    try:
        return len(json.loads((directory / "building.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


class Killed(BaseException):
    """As if the process ended here."""


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_an_interrupted_build_goes_on_to_the_same_bytes(with_tokenizer, texts, monkeypatch):
    """Ended inside one of the next writes and renames, again and again until nothing is left to do."""
    settings = SMALL
    if with_tokenizer:
        settings = Settings(shard_bytes=4000, tokenizer=make_tokenizer(texts))
        monkeypatch.setattr(reading, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(sharding, "BUFFER_BYTES", 1000)
    build(texts / "whole", inputs(texts), settings, io.StringIO())
    left = 0
    real = {sharding: sharding.write_all, os: os.replace}

    def dying(function, *args):
        nonlocal left
        left -= 1
        if left < 0:
            if function is sharding_write:
                function(args[0], args[1][: len(args[1]) // 2])
            raise Killed
        return function(*args)

    sharding_write = real[sharding]  # with half of what it was given, when it is the end
    monkeypatch.setattr(sharding, "write_all", lambda *args: dying(sharding_write, *args))
    monkeypatch.setattr(os, "replace", lambda *args: dying(real[os], *args))
    kills = 0
    while True:
        left = 15 + kills % 4 if kills else 1  # the first time before building.json is there
        try:
            build(texts / "cut", inputs(texts), settings, io.StringIO())
            break
        except Killed:
            kills += 1
            with pytest.raises(DataError, match="half built|holds no built data|there is no directory"):
                open_built(texts / "cut")
    assert kills > 4
    build(texts / "cut", inputs(texts), settings, io.StringIO())
    cut = {name: content for name, content in contents(texts / "cut").items() if not name.endswith(".partial")}
    assert cut == contents(texts / "whole")


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_bytes(texts):
    """kill -9 a moment after the process has finished another shard, up to ten times."""
    (texts / "more.jsonl").write_text((json.dumps({"text": "all work and no play\n" * 10}) + "\n") * 5000)
    names = [*inputs(texts), str(texts / "more.jsonl")]
    build(texts / "whole", names, Settings(shard_bytes=4000), io.StringIO())
    command = [sys.executable, "-m", "longtrain.cli", "data", "build", "--shard-size", "4kB", texts / "cut", *names]
    chance, shards = random.Random(1), [0]
    while len(shards) <= 10:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and finished_shards(texts / "cut") <= shards[-1]:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (texts / "cut" / "manifest.json").exists():
            break
        shards.append(finished_shards(texts / "cut"))
    assert len(shards) > 3 and all(a < b for a, b in pairwise(shards)), shards
    assert subprocess.run(command, capture_output=True).returncode == 3
    assert contents(texts / "cut") == contents(texts / "whole")


def test_a_full_disk_is_said_plainly_and_the_same_command_goes_on(texts, monkeypatch):
    build(texts / "whole", inputs(texts), SMALL, io.StringIO())
    write, written = sharding.write_all, 0

    def fills_up(file, content):
        nonlocal written
        written += len(content)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "write_all", fills_up)
        with pytest.raises(DataError, match=r"out cannot be written \(No space left on device\); make room .* finished shards are kept"):
            build(texts / "out", inputs(texts), SMALL, io.StringIO())
    log = io.StringIO()
    assert build(texts / "out", inputs(texts), SMALL, log) == 4
    assert log.getvalue().startswith("going on behind ") and contents(texts / "out") == contents(texts / "whole")


def test_a_finished_build_is_left_as_it_is(texts):
    build(texts / "out", inputs(texts), SMALL, io.StringIO())
    before, log = contents(texts / "out"), io.StringIO()
    assert build(texts / "out", inputs(texts), SMALL, log) == 4
    assert "is built already: 66 documents" in log.getvalue() and contents(texts / "out") == before


@pytest.mark.parametrize("change", ["settings", "inputs", "grown", "removed"])
def test_other_data_is_not_built_into_the_same_directory(change, texts):
    build(texts / "out", inputs(texts), SMALL, io.StringIO())
    names, settings = inputs(texts), SMALL
    if change == "settings":
        settings = Settings(shard_bytes=4000, end_token=0)
    elif change == "inputs":
        names = names[:1]
    elif change == "grown":
        (texts / "texts" / "03.txt").write_text("longer" * 1000)
    else:
        (texts / "texts" / "03.txt").unlink()
    said = {"settings": "end_token", "inputs": "inputs: ", "grown": "03.txt was added, removed or changed"}.get(change, "03.txt was added")
    with pytest.raises(DataError, match=f"holds a finished build that differs .*{said}.*; name another directory, or remove it"):
        build(texts / "out", names, settings, io.StringIO())


@pytest.mark.parametrize(
    "settings, said",
    [({"field": "body"}, "--field has no effect without JSONL"), ({"case": "upper"}, "--case has no effect without FASTA"),
     ({"special_tokens": True}, "--special-tokens has no effect"), ({"end_token": -1}, "--end-token -1 is no token id; give one from 0")],
)  # fmt: skip
def test_options_without_effect_are_refused(settings, said, texts):
    with pytest.raises(DataError, match=said):
        build(texts / "out", inputs(texts)[:1], Settings(**settings), io.StringIO())
    assert not (texts / "out").exists()


def test_a_directory_with_other_things_is_refused(texts):
    with pytest.raises(DataError, match="is not empty .*; name another directory"):
        build(texts, inputs(texts), SMALL, io.StringIO())


def test_two_builds_do_not_write_one_directory(texts):
    (texts / "out").mkdir()
    with building.locked(texts / "out"), pytest.raises(DataError, match="is being built by another process; wait"):
        build(texts / "out", inputs(texts), SMALL, io.StringIO())


def test_the_directory_itself_is_no_input(texts):
    for _ in range(2):
        assert build(texts / "texts" / "out", [str(texts / "texts")], SMALL, io.StringIO()) == 1


def test_output_that_cannot_be_written_is_said_plainly(texts):
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\); make room or give permission"):
        build(texts / "lines.jsonl" / "out", inputs(texts), SMALL, io.StringIO())


@pytest.mark.parametrize("content, said", [(b"", "is empty: it holds no token"), (b"\0\1\2", "is binary, not text")])
def test_no_data_at_all_is_said_plainly_and_leaves_nothing(content, said, tmp_path, capsys):
    (tmp_path / "x.txt").write_bytes(content)
    assert cli.main(["data", "build", str(tmp_path / "out"), str(tmp_path / "x.txt")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert said in error[0] and error[1].startswith("longtrain: nothing to build: 1 files hold no document") and len(error) == 2
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_left_out(texts):
    (texts / "texts" / "03.txt").chmod(0)
    log = io.StringIO()
    assert build(texts / "out", inputs(texts), SMALL, log) == 5 and "03.txt cannot be read (Permission denied)" in log.getvalue()


def test_the_command_says_by_its_exit_code_whether_something_was_left_out(texts, capsys):
    assert cli.main(["data", "build", str(texts / "all"), *inputs(texts)]) == 3
    assert cli.main(["data", "build", str(texts / "some"), str(texts / "texts" / "??.txt")]) == 0
    assert cli.main(["data", "build", str(texts / "none"), str(texts / "nowhere")]) == 1
    assert "nowhere names no file" in capsys.readouterr().err


@pytest.mark.parametrize("vocabulary, dtype", [(256, "u1"), (257, "u2"), (2**16, "u2"), (2**16 + 1, "u4")])
def test_tokens_take_as_few_bytes_as_they_can(vocabulary, dtype, tmp_path):
    assert token_dtype(vocabulary) == np.dtype(dtype)
    (tmp_path / "x.txt").write_text("abc")
    build(tmp_path / "out", [str(tmp_path / "x.txt")], Settings(end_token=vocabulary - 1), io.StringIO())
    built = open_built(tmp_path / "out")
    assert built.tokens(0).tolist() == [97, 98, 99, vocabulary - 1] and built.blocks[0].dtype == np.dtype(dtype)
    assert (built.vocabulary, built.largest) == (vocabulary, vocabulary - 1)


def make_tokenizer(directory):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers are not tested: pip install longtrain[tokenizers]")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["abc def abc aé yx zz xyz"] * 20, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


@pytest.mark.parametrize("special", [False, True])
def test_the_same_documents_through_a_tokenizer_and_as_bytes(special, texts, monkeypatch):
    path = make_tokenizer(texts)
    import tokenizers

    monkeypatch.setattr(reading, "BATCH_DOCUMENTS", 4)
    build(texts / "bytes", inputs(texts), SMALL, io.StringIO())
    assert build(texts / "ids", inputs(texts), Settings(shard_bytes=4000, tokenizer=path, special_tokens=special), io.StringIO()) == 4
    as_bytes, as_ids, tokenizer = open_built(texts / "bytes"), open_built(texts / "ids"), tokenizers.Tokenizer.from_file(str(path))
    names = [as_ids.name(i) for i in range(len(as_ids))]
    assert special or as_ids.key_N.tolist() == as_bytes.key_N.tolist()  # the same documents are held out
    assert names[: len(as_bytes)] == [as_bytes.name(i) for i in range(len(as_bytes))] if not special else len(names) == 67
    of_name = {as_bytes.name(i): as_bytes.tokens(i).tobytes().decode() for i in range(len(as_bytes))}
    for document, name in enumerate(names):
        tokens = as_ids.tokens(document).tolist()
        assert not special or tokens[0] == 0
        assert tokenizer.decode(tokens) == of_name.get(name, "")
    assert as_ids.blocks[0].dtype == np.uint16 and as_ids.length_N.sum() < as_bytes.length_N.sum()


def test_one_build_has_one_tokenizer(texts):
    (texts / "x.wav").write_bytes(b"")
    with pytest.raises(DataError, match="x.wav is audio and .*txt is not.*; build them into two directories"):
        build(texts / "out", [*inputs(texts), str(texts / "x.wav")], SMALL, io.StringIO())
    (texts / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer.json is no tokenizer.json .*; give one"):
        build(texts / "out", inputs(texts), Settings(tokenizer=make_broken(texts)), io.StringIO())
    with pytest.raises(DataError, match="--tokenizer .*gone.json cannot be read"):
        build(texts / "out", inputs(texts), Settings(tokenizer=texts / "gone.json"), io.StringIO())


def make_broken(texts):
    pytest.importorskip("tokenizers", reason="tokenizers are not tested: pip install longtrain[tokenizers]")
    return texts / "tokenizer.json"


@pytest.mark.parametrize("part", ["tokens", "documents", "names"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files_are_named(part, damage, texts, capsys):
    build(texts / "out", inputs(texts), SMALL, io.StringIO())
    path = texts / "out" / f"00001.{part}"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        assert cli.main(["data", "info", str(texts / "out"), "--check"]) == 1
        assert f"{path} is damaged: its checksum is " in capsys.readouterr().out
        return
    said = "is missing" if damage == "missing" else f"has {len(content) - 1} bytes and was built with {len(content)}"
    with pytest.raises(DataError, match=f"00001.{part} {said}; restore it, or remove .* and build the data again"):
        open_built(texts / "out")


def test_info_shows_lengths_inputs_and_what_packing_wastes(texts, capsys):
    build(texts / "out", inputs(texts), SMALL, io.StringIO())
    lengths = open_built(texts / "out").length_N
    assert cli.main(["data", "info", str(texts / "out"), "--seq-len", "512", "4096", "--check"]) == 0
    printed = capsys.readouterr().out
    assert f"66 documents, {lengths.sum():,} tokens by bytes" in printed and "4 left out when it was built" in printed
    assert f"30 documents  {lengths[:30].sum():>16,} tokens" in printed and "every checksum is right" in printed
    rows = [line.split() for line in printed.splitlines()]
    doublings = {row[0]: row for row in rows if len(row) > 2 and row[1] == "to"}
    assert doublings["128"][3] == str(((lengths >= 128) & (lengths < 256)).sum())
    assert sum(int(row[3].replace(",", "")) for row in doublings.values()) == 66
    one = [row for row in rows if row and row[0] == "one_document"]
    assert [int(row[1]) for row in one] == [sum(-(-n // t) - (n % t == 1) for n in lengths) for t in (512, 4096)]
    assert one[1][2] == f"{1 - lengths[lengths > 1].sum() / (66 - (lengths == 1).sum()) / 4096:.2%}"


def test_documents_end_where_their_file_did_whatever_the_names(tmp_path):
    """Names that are no UTF-8."""
    name = os.fsdecode(b"n\xe4me.txt")
    try:
        (tmp_path / name).write_text("abc")
    except OSError:
        pytest.skip("this file system takes no such names")
    build(tmp_path / "out", [str(tmp_path / "*.txt")], SMALL, io.StringIO())
    built = open_built(tmp_path / "out")
    assert built.name(0) == str(tmp_path / name)
    assert built.key_N[0] == corpus_in_memory([Document("abc", np.frombuffer(b"abc", dtype=np.uint8))]).key_N[0]


def test_built_from_moved_files_it_is_the_same_data(texts, tmp_path):
    """With the same split: a run goes on with it."""
    build(texts / "out", inputs(texts), SMALL, io.StringIO())
    moved = tmp_path / "moved" / "elsewhere"
    shutil.copytree(texts, moved, ignore=shutil.ignore_patterns("out"))
    build(moved / "out", inputs(moved), SMALL, io.StringIO())
    here, there = open_built(texts / "out"), open_built(moved / "out")
    assert here.digest == there.digest and here.name(0) != there.name(0) and here.key_N.tolist() == there.key_N.tolist()
    assert len(set(here.key_N.tolist())) > 60


def test_data_of_the_first_format_is_read_with_the_split_it_had(texts):
    """Its keys are of names."""
    build(texts / "out", inputs(texts), SMALL, io.StringIO())
    manifest = json.loads((texts / "out" / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = texts / "out" / f"{shard['name']}.documents"
        rows = np.fromfile(path, dtype=DOCUMENT)
        rows["key"] += np.uint64(1)
        rows.tofile(path)
    before = open_built(texts / "out")
    (texts / "out" / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    old = open_built(texts / "out")
    assert old.key_N.tolist() == before.key_N.tolist() and old.digest == before.digest
    with pytest.raises(DataError, match="a finished build that differs .format: 1 there, 2 here.; name another directory"):
        build(texts / "out", inputs(texts), SMALL, io.StringIO())
    (texts / "out" / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(DataError, match="has format 3, this version reads 1 to 2; build the data again"):
        open_built(texts / "out")
