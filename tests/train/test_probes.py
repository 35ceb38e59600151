"""What the probes ask, and that they score what they say."""

import numpy as np
import pytest
import torch

from longtrain.data.recall import recall_document
from longtrain.nn import ModelOutput
from longtrain.train.probes import MARKER, VALUE, check_distance, needle, recall, run_probe

ALPHABET = np.array([3, 5, 8, 9, 11, 12, 20, 21, 22, 40])
TEXT = np.arange(500) % 7 + 50


class Lookup:
    """Answers from the sequence alone: what followed where these `context` tokens first stood, in the same document."""

    def __init__(self, context: int, vocabulary: int = 64, right: bool = True) -> None:
        self.context, self.vocabulary, self.right = context, vocabulary, right
        self.rows = []

    def eval(self):
        pass

    def __call__(self, ids_BT, *, cu_seqlens, logits_at):
        self.rows.append(ids_BT.shape[1])
        logits = torch.zeros(ids_BT.shape[1], self.vocabulary)
        ids, edges = ids_BT[0].tolist(), cu_seqlens.tolist()
        for first, stop in zip(edges, edges[1:], strict=False):
            seen = {}
            for at in range(first + self.context - 1, stop):
                key = tuple(ids[at - self.context + 1 : at + 1])
                before = seen.setdefault(key, at)
                if before < at:
                    logits[at, ids[before + 1] if self.right else 40] = 1.0
        return ModelOutput(logits=logits[logits_at])


@pytest.mark.parametrize("distance, longest", [(2, 3), (2, 64), (8, 64), (40, 41), (40, 64), (62, 64)])
def test_the_key_stood_once_before_at_the_distance_and_its_value_is_the_answer(distance, longest):
    for seed in range(20):
        probe = recall(distance, longest, ALPHABET, TEXT, np.random.default_rng(seed))
        last = len(probe.ids) - 1
        assert len(probe.ids) <= longest and probe.asked.tolist() == [last]
        assert np.flatnonzero(probe.ids == probe.ids[-1]).tolist() == [last - distance, last]
        assert probe.answers.tolist() == [probe.ids[last - distance + 1]]
        assert set(probe.ids[0::2]) <= set(ALPHABET[:5]) and set(probe.ids[1::2]) <= set(ALPHABET[5:])


@pytest.mark.parametrize("distance, longest", [(MARKER + VALUE, 23), (12, 64), (13, 64), (53, 64)])
def test_the_needle_lies_in_text_at_the_distance(distance, longest):
    for seed in range(20):
        probe = needle(distance, longest, ALPHABET, TEXT, np.random.default_rng(seed))
        end = len(probe.ids) - VALUE + 1
        marker, start = probe.ids[end - MARKER : end], end - MARKER - distance
        assert len(probe.ids) <= longest
        assert probe.ids[start : start + MARKER + VALUE].tolist() == [*marker, *probe.answers]
        assert probe.ids[end:].tolist() == probe.answers[:-1].tolist() and probe.asked.tolist() == list(range(end - 1, end + VALUE - 1))
        assert set(np.delete(probe.ids, np.r_[start : start + MARKER + VALUE, end - MARKER : len(probe.ids)])) <= set(TEXT)


@pytest.mark.parametrize("name, context", [("recall", 1), ("needle", MARKER)])
@pytest.mark.parametrize("distance, longest", [(12, 64), (40, 300)])
def test_who_looks_it_up_is_always_right_and_who_does_not_is_at_chance(name, context, distance, longest):
    asked = {"examples": 300, "longest": longest, "alphabet": ALPHABET, "text": TEXT, "seed": 0, "device": torch.device("cpu")}
    found = run_probe(model := Lookup(context), name, distance, **asked)
    assert found.accuracy == 1.0 and max(model.rows) <= longest and len(model.rows) < 300
    assert found.chance == pytest.approx(1 / (5 if name == "recall" else 10))
    blind = run_probe(Lookup(context, right=False), name, distance, **asked)
    assert abs(blind.accuracy - blind.chance) < 4 * (blind.chance / blind.answers) ** 0.5


def test_the_same_seed_asks_the_same_questions():
    first, again, other = (recall(8, 64, ALPHABET, TEXT, np.random.default_rng(seed)).ids.tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "name, distance, words",
    [("recall", 7, "odd"), ("recall", 0, "from 2 to 63"), ("recall", 64, "from 2 to 63"), ("needle", 11, "from 12 to 53"),
     ("needle", 54, "from 12 to 53")],
)  # fmt: skip
def test_a_distance_that_cannot_be_asked_is_refused(name, distance, words):
    with pytest.raises(ValueError, match=words):
        check_distance(name, distance, 64)


def test_in_a_document_to_learn_from_a_key_has_one_value_and_comes_again():
    ids = recall_document(256, np.arange(64), np.random.default_rng(0))
    pairs = [tuple(pair) for pair in ids.reshape(-1, 2).tolist()]
    assert len(ids) == 256 and len(set(pairs)) == len({key for key, _ in pairs}) < len(pairs)
