"""The loader: what an update reads depends on its number alone; shares are kept; errors and memory stay where they belong."""

import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from longtrain import cli
from longtrain.config.data import DataConfig, TokenSource
from longtrain.config.run import LengthStage
from longtrain.data.build import Settings, build
from longtrain.data.built import open_built
from longtrain.data.corpus import corpus_in_memory, join
from longtrain.data.sources import DataError, Document
from longtrain.nn import count_targets
from longtrain.parallel.layout import spread
from longtrain.span import Layout
from longtrain.train.loader import PERIOD, Loader, Mixture, fingerprint, open_data, pack, validation_rows, whole_shares

DATA = DataConfig(source="text", files=("x",), seq_len=32)
STAGES = (LengthStage(from_step=0, seq_len=16, tokens_per_update=32), LengthStage(from_step=3, seq_len=32, tokens_per_update=96))


def corpus(*lengths, source="documents", seed=0):
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(1, 256, n, dtype=np.uint8) for n in lengths]
    return corpus_in_memory([Document(f"{source}{i}", t) for i, t in enumerate(tokens)], source)


def read(loader, steps):
    return [[(b.documents, b.input_ids_BT.tolist(), b.cu_seqlens.tolist()) for b in loader.update(step)] for step in steps]


@pytest.fixture
def loader():
    made = []

    def make(data=DATA, documents=None, steps=8, **settings):
        made.append(Loader(STAGES, data, documents or corpus(*range(5, 60)), steps, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "one_document"])
def test_an_update_depends_on_its_number_alone(packing, loader):
    data = replace(DATA, packing=packing)
    in_order = read(loader(data), range(8))
    order = [5, 2, 2, 7, 0, 6, 1, 4, 3]
    assert read(loader(data), order) == [in_order[step] for step in order]
    assert read(loader(data, ahead=5), range(4, 8)) == in_order[4:]
    assert [len(update) for update in in_order] == [2, 2, 2, 3, 3, 3, 3, 3]
    assert {len(ids[0]) for update in in_order[3:] for _, ids, _ in update} == {32}
    assert read(loader(replace(data, seed=1)), range(8)) != in_order


def test_stages_of_the_same_length_read_on():
    """A stage that changes only the rotary positions, or comes back to a length, begins with what was not read yet."""
    ends = LengthStage(from_step=5, seq_len=16, tokens_per_update=48, rope_base=1e5)
    one, several = (Loader(stages, replace(DATA, seq_len=16), corpus(*range(5, 60)), 8) for stages in (STAGES[:1], (*STAGES, ends)))
    in_order = [sequence for update in read(one, range(7)) for sequence in update]
    assert [sequence for step in (0, 1, 2, 5, 6) for sequence in read(several, [step])[0]] == in_order[:12]
    one.close(), several.close()


class Counted(np.ndarray):
    """Tokens that count how many of them are read."""

    read = 0

    def __getitem__(self, key):
        part = np.asarray(super().__getitem__(key))
        Counted.read += part.size
        return part


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("chunk_tokens", [None, 10])
@pytest.mark.parametrize("data", [DATA, replace(DATA, isolate=False, packing="concatenate"), replace(DATA, packing="one_document")])
def test_processes_that_share_a_sequence_read_their_parts_of_it(data, chunk_tokens, layout):
    """Ids where a process holds tokens, labels one place behind: targets are right at the borders, and nothing else is read."""
    documents = corpus(*range(5, 60))
    documents = replace(documents, blocks=tuple(block.view(Counted) for block in documents.blocks))
    packed = pack(documents, 32, data)
    shards = spread(32, 3, inside=layout, chunk_tokens=chunk_tokens, stripe=2)
    for row in range(len(packed)):
        whole = packed.read_row(row)
        edges = Layout.make(32, whole.cu_seqlens).edges
        expected = Layout(32, edges).next_token_targets(whole.labels_BT)
        for rank in range(3):
            Counted.read = 0
            part, layout_of_rank = packed.read_row(row, shards.spans(rank)), shards.layout(rank, edges)
            pieces = len(part.documents) * len(shards.spans(rank))
            assert Counted.read <= shards.length(rank) + pieces and torch.equal(part.cu_seqlens, whole.cu_seqlens)
            for of_part, of_whole in [
                (part.input_ids_BT, whole.input_ids_BT),
                (layout_of_rank.next_token_targets(part.labels_BT), expected),
            ]:
                assert torch.equal(layout_of_rank.take(of_part), layout_of_rank.take(of_whole))
        counts = [count_targets(packed.read_row(row, shards.spans(rank)).labels_BT, whole.cu_seqlens) for rank in range(3)]
        assert sum(counts) == count_targets(whole.labels_BT, whole.cu_seqlens)


def test_processes_that_read_other_sequences_take_turns(loader):
    whole = read(loader(), range(5))
    parts = [read(loader(mine=lambda numbers, r=r: numbers[r::2]), range(5)) for r in range(2)]
    assert [[*a, *b] for a, b in zip(*parts, strict=True)] == [[*update[::2], *update[1::2]] for update in whole]


def test_updates_are_read_ahead_and_no_further(loader):
    watched, reads = loader(ahead=2, steps=6), []
    original, third = watched.read, threading.Event()

    def read(step):
        reads.append(step)
        if len(reads) == 3:
            third.set()
        return original(step)

    watched.read = read
    watched.update(0)
    assert third.wait(60) and reads == [0, 1, 2] and len(watched._coming) == 2
    watched.update(5)
    assert 6 not in watched._coming and not watched._coming


def test_what_goes_wrong_in_the_background_reaches_the_caller(loader, monkeypatch):
    broken = loader()
    monkeypatch.setattr(broken, "read", lambda step: (_ for _ in ()).throw(DataError(f"update {step} is broken")))
    for step in (0, 1, 4):
        with pytest.raises(DataError, match=f"update {step} is broken"):
            broken.update(step)


def shares(mixture, count=PERIOD):
    sources = [mixture.batch(i).sources[0] for i in range(count)]
    return {name: sources.count(name) / count for name in set(sources)}


def test_weights_are_shares_of_the_sequences_whatever_the_sizes():
    data = DataConfig(source="tokens", tokens=(TokenSource(path="a", weight=3), TokenSource(path="b", weight=1)), seq_len=32)
    both = join([corpus(*[20] * 3, source="a"), corpus(*[30] * 70, source="b")])
    mixture = Mixture(both, 32, data)
    assert shares(mixture) == {"a": 0.75, "b": 0.25}
    early = [mixture.batch(i).sources[0] for i in range(40)]
    assert early.count("b") == 10  # evenly, from the beginning
    assert all(len(set(mixture.batch(i).sources)) == 1 for i in range(200))
    read_b = [mixture.batch(i).documents for i in range(280 + 12) if mixture.batch(i).sources[0] == "b"]
    assert len(set(read_b[:70])) == 70  # all of it before any of it again
    of_b = [documents for documents in (mixture.batch(i).documents for i in range(PERIOD - 40, PERIOD + 40)) if documents[0][0] == "b"]
    assert of_b == [mixture.packed[1].batch(i).documents for i in range(1014, 1034)]  # the next period goes on where the last one ended
    natural = DataConfig(source="tokens", tokens=(TokenSource(path="a"), TokenSource(path="b")), seq_len=64)
    assert {s for i in range(30) for s in Mixture(both, 64, natural).batch(i).sources} == {"a", "b"}


def test_long_documents_are_read_more_often_within_their_source():
    documents = corpus(*[32] * 300, *[320] * 10)  # a quarter of the tokens is in long ones
    data = replace(DATA, long_from_tokens=320, long_weight=3.0)
    mixture = Mixture(documents, 32, data)
    long = [int(mixture.batch(i).documents[0].split("[")[0].removeprefix("documents")) >= 300 for i in range(PERIOD)]
    assert np.mean(long) == pytest.approx(3 * 0.25 / (3 * 0.25 + 0.75), abs=1 / PERIOD)
    assert mixture.longest == 32 and mixture.padding == 0 and Mixture(documents, 128, replace(DATA, packing="one_document")).longest == 128
    assert Mixture(corpus(*[32] * 4), 128, replace(DATA, packing="one_document")).padding == 0.75
    with pytest.raises(DataError, match="no training document has 321 tokens \\(the longest has 320\\)"):
        Mixture(documents, 32, replace(data, long_from_tokens=321))


def test_what_somebody_still_holds_is_not_written_over(loader):
    """Memory of an update is given out again when its last tensor is gone: a tensor of a part of it counts."""
    one = loader()
    held = [batch.labels_BT[0, 3:9] for batch in one.update(3)]
    before = [part.clone() for part in held]
    places = {batch.input_ids_BT.data_ptr() for step in [4, 5, 6, 7] * 3 for batch in one.update(step)}
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert len(places) <= 3 * 4  # three sequences an update; one in use, two ahead, one that was just given back


@pytest.mark.parametrize("shares", [[1, 1], [1e-9, 1], [1, 2, 4], [0.3] * 7, [1e-6] * 100 + [1]])
def test_whole_shares_add_up_and_leave_nobody_out(shares):
    counts = whole_shares(np.array(shares, dtype=np.float64))
    assert counts.sum() == PERIOD and counts.min() >= 1
    exact = np.array(shares) / np.sum(shares) * PERIOD
    assert (np.abs(counts - exact) < 1 + (exact < 1).sum()).all()


def test_the_fingerprint_is_that_of_data_and_settings():
    documents = corpus(10, 20, 30)
    same = fingerprint(documents, DATA)
    assert fingerprint(corpus(10, 20, 30), replace(DATA, files=("elsewhere",), seq_len=64)) == same
    assert same.startswith("3 documents, 60 tokens, ")
    others = [fingerprint(corpus(10, 20, 30, seed=1), DATA), fingerprint(documents.take(np.arange(2)), DATA)]
    changes = [{"seed": 1}, {"packing": "concatenate"}, {"isolate": False}, {"min_document_tokens": 5}, {"validation_fraction": 0.1}]
    changes += [{"long_from_tokens": 20, "long_weight": 2.0}]
    others += [fingerprint(documents, replace(DATA, **change)) for change in changes]
    assert len({same, *others}) == len(others) + 1


@pytest.fixture
def texts(tmp_path):
    generator = np.random.default_rng(1)
    (tmp_path / "texts").mkdir()
    for index, length in enumerate(generator.integers(1, 300, 40).tolist()):
        (tmp_path / "texts" / f"{index:02}").write_bytes(bytes(generator.integers(97, 123, length, dtype=np.uint8)))
    return tmp_path / "texts"


def test_built_data_is_read_as_the_files_are(texts, tmp_path, loader):
    """The same split, the same sequences, through memory-mapped shards."""
    build(tmp_path / "built", [str(texts)], Settings(shard_bytes=1000), io.StringIO())
    from_files = DataConfig(source="text", files=(str(texts),), seq_len=32)
    from_disk = DataConfig(source="tokens", tokens=(TokenSource(path=str(tmp_path / "built")),), seq_len=32)
    (train, held), (train_built, held_built) = open_data(from_files), open_data(from_disk)
    assert read(loader(from_files, train), range(8)) == read(loader(from_disk, train_built), range(8))
    a, b = pack(held, 32, from_files), pack(held_built, 32, from_disk)
    assert validation_rows(a, None) == validation_rows(b, None)
    assert all(torch.equal(a.read_row(row).input_ids_BT, b.read_row(row).input_ids_BT) for row in range(len(a)))


def test_a_loader_of_mapped_data_does_not_keep_what_it_read_in_memory(tmp_path, loader):
    path = tmp_path / "big"
    path.mkdir()
    for index in range(8):
        (path / f"{index}").write_bytes(bytes([65 + index]) * 2**22)
    build(tmp_path / "built", [str(path)], Settings(), io.StringIO())
    documents = open_built(tmp_path / "built")

    def mapped():
        lines = open("/proc/self/smaps").read().split(f"{tmp_path}/built/00000.tokens")[1:]
        return sum(int(line.split("Rss:")[1].split()[0]) for line in lines)

    if not hasattr(documents.mapped[0], "madvise") or not open("/proc/self/smaps").read(1):
        pytest.skip("this system does not tell")
    big = loader(documents=documents)
    assert sum(int(documents.tokens(i).sum()) for i in range(8)) and mapped() > 30_000
    big.update(0)
    big.close()
    assert mapped() < 3_000


def test_a_document_longer_than_the_sequence_is_refused_on_request(texts):
    data = DataConfig(source="text", files=(str(texts),), seq_len=32, long_documents="refuse")
    with pytest.raises(DataError, match=r"texts/\d\d has 2\d\d tokens, .*data.seq_len \(32\); raise seq_len, or set long_documents: split"):
        open_data(data)
    open_data(replace(data, seq_len=300))
    open_data(replace(data, long_documents="split"))


def test_data_of_two_tokenizers_is_refused(texts, tmp_path):
    build(tmp_path / "a", [str(texts)], Settings(), io.StringIO())
    build(tmp_path / "b", [str(texts)], Settings(end_token=0), io.StringIO())
    sources = tuple(TokenSource(path=str(tmp_path / name)) for name in "ab")
    with pytest.raises(DataError, match=r"a was tokenized by bytes and .*b by bytes \(end_token 0\), and one model cannot read both"):
        open_data(DataConfig(source="tokens", tokens=sources, seq_len=32))


def test_a_source_without_usable_documents_is_named(texts, tmp_path):
    build(tmp_path / "a", [str(texts)], Settings(), io.StringIO())
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "short2.txt").write_text("abc")
    build(tmp_path / "b", [str(tmp_path / "short*.txt")], Settings(), io.StringIO())
    sources = tuple(TokenSource(path=str(tmp_path / name), weight=1.0) for name in "ab")
    data = DataConfig(source="tokens", tokens=sources, seq_len=32, min_document_tokens=10)
    with pytest.raises(DataError, match="b has no training document of enough tokens; lower data.min_document_tokens"):
        Mixture(open_data(data)[0], 32, data)


RUN = """\
model: {vocab_size: 256, num_layers: 1, hidden_size: 16, intermediate_size: 32, num_heads: 2, num_kv_heads: 1}
data: {source: tokens, tokens: [{path: BUILT, weight: 1}], seq_len: 64, packing: concatenate, isolate: false, validation_fraction: 0.2}
train: {steps: 3, device: cpu, tokens_per_update: 128}
output: {dir: OUT}
"""


def test_a_run_reads_built_data_and_says_what_is_wrong_with_it(texts, tmp_path, capsys):
    build(tmp_path / "built", [str(texts)], Settings(shard_bytes=2000), io.StringIO())
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("BUILT", str(tmp_path / "built")).replace("OUT", str(tmp_path / "out")))
    assert cli.main(["train", str(file)]) == 0
    assert "data    tokens: " in capsys.readouterr().out
    assert cli.main(["train", str(file), f"output.dir={tmp_path / 'b'}", "model.vocab_size=100"]) == 1
    assert "is outside the vocabulary of 100; set model.vocab_size to at least 123" in capsys.readouterr().err
    (tmp_path / "built" / "00001.tokens").unlink()
    assert cli.main(["train", str(file), f"output.dir={tmp_path / 'c'}"]) == 1
    error = capsys.readouterr().err
    assert "00001.tokens is missing; restore it" in error and error.count("\n") == 1 and not (tmp_path / "c").exists()
