"""The tasks' examples are what they say: labels follow from the sequences, and no test example was learned from."""

import numpy as np
import pytest
import torch

from longtrain.tasks.data import DOT, EMPTY, LISTOPS_TOKENS, PATH, TASKS, make_task


def evaluated(tokens: list[str]) -> int:
    """The value of a ListOps expression, with a stack."""
    stack: list[list] = [[]]
    for token in tokens:
        if token.startswith("["):
            stack.append([token])
        elif token == "]":
            name, *values = stack.pop()
            values.sort()
            value = {"[MIN": values[0], "[MAX": values[-1], "[SM": sum(values) % 10, "[MED": values[(len(values) - 1) // 2]}[name]
            stack[-1].append(value)
        else:
            stack[-1].append(int(token))
    ((value,),) = stack
    return value


def test_listops_labels_are_the_values_of_expressions():
    task = make_task("listops", 60, 300, 100, seed=1)
    for ids, label in zip(task.train.ids, task.train.labels, strict=True):
        length = int((ids > 0).sum())
        assert 20 <= length <= 60 and (ids[:length] > 0).all()
        assert evaluated([LISTOPS_TOKENS[i - 1] for i in ids[:length]]) == label
    assert set(task.train.labels) == set(range(10))
    train, test = ({ids.tobytes() for ids in part.ids} for part in (task.train, task.test))
    assert len(train) == 300 and len(test) == 100 and not train & test


@pytest.mark.parametrize("tokens", [129, 600, 2000])
def test_listops_at_the_length_of_the_long_range_arena(tokens):
    task = make_task("listops", tokens, 12, 4, seed=1)
    deepest = 0
    for ids, label in zip(task.train.ids, task.train.labels, strict=True):
        length = int((ids > 0).sum())
        assert tokens // 3 <= length <= tokens
        written = [LISTOPS_TOKENS[i - 1] for i in ids[:length]]
        assert evaluated(written) == label
        depths = np.cumsum([token.startswith("[") - (token == "]") for token in written])
        deepest = max(deepest, depths.max())
    assert 4 < deepest <= 10


def test_pathfinder_labels_say_whether_a_path_joins_the_dots():
    task = make_task("pathfinder", 256, 60, 20, seed=1)
    assert sorted(np.unique(task.train.ids)) == [EMPTY, PATH, DOT]
    for ids, label in zip(task.train.ids, task.train.labels, strict=True):
        image = ids.reshape(16, 16)
        dots = [tuple(place) for place in np.argwhere(image == DOT)]
        assert len(dots) == 2
        drawn = {tuple(place) for place in np.argwhere(image != EMPTY)}
        reached, border = {dots[0]}, [dots[0]]
        while border:  # a gap between dashes is one pixel, another path at least two pixels away
            r, c = border.pop()
            near = {p for p in drawn - reached if max(abs(p[0] - r), abs(p[1] - c)) <= 2}
            reached |= near
            border += near
        assert (dots[1] in reached) == bool(label)
        assert len(drawn - reached) > 4
    assert abs(task.train.labels.mean() - 0.5) < 0.2


def test_how_far_apart_the_dots_are_does_not_tell_whether_a_path_joins_them():
    train = make_task("pathfinder", 121, 400, 1, seed=0).train
    dots = np.stack([np.argwhere(ids.reshape(11, 11) == DOT) for ids in train.ids])
    apart = np.round(np.hypot(*(dots[:, 0] - dots[:, 1]).T))
    guessed = {d: np.mean(train.labels[apart == d]) > 0.5 for d in np.unique(apart)}
    assert np.mean([guessed[d] == label for d, label in zip(apart, train.labels, strict=True)]) < 0.6


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    task = make_task("digits", 256, 1500, 297, seed=0)
    known = {(image.tobytes(), label) for image, label in zip(*datasets.load_digits(return_X_y=True), strict=True)}
    images = task.train.ids.reshape(-1, 8, 2, 8, 2)
    assert (images == images[:, :, :1, :, :1]).all()
    drawn = {(image.astype(float).tobytes(), int(label)) for image, label in zip(images[:, :, 0, :, 0] - 1, task.train.labels, strict=True)}
    assert drawn <= {(image, int(label)) for image, label in known}


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_a_seed_draws_the_same_examples_again(name):
    first, again, other = (make_task(name, 64, 20, 5, seed) for seed in (3, 3, 4))
    assert (first.train.ids == again.train.ids).all() and (first.test.labels == again.test.labels).all()
    assert not (first.train.ids == other.train.ids).all()
    assert first.train.ids.max() < TASKS[name][1]


def test_noise_stands_around_each_sequence():
    plain, noisy = (make_task("pathfinder", 64, 30, 10, 0, noise=noise) for noise in (0, 50))
    starts = set()
    for sequence, ids in zip(plain.train.ids, noisy.train.ids, strict=True):
        (start,) = [at for at in range(51) if (ids[at : at + 64] == sequence).all()]
        starts.add(start)
        assert len(ids) == 114 and set(ids) == {EMPTY, PATH, DOT}
    assert len(starts) > 10 and (noisy.train.labels == plain.train.labels).all()


@pytest.mark.parametrize("name", ["listops", "digits"])
def test_validation_examples_are_in_neither_set(name):
    if name == "digits":
        pytest.importorskip("sklearn")
    noise = 20 if name == "digits" else 0
    final, choosing = (make_task(name, 64, 100, 50, 0, noise=noise, validation=validation) for validation in (False, True))
    assert (final.train.ids == choosing.train.ids).all() and len(choosing.test.ids) == 50
    parts = [{ids.tobytes() for ids in part.ids} for part in (final.train, final.test, choosing.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200


def test_chance_is_the_commonest_label():
    task = make_task("listops", 30, 500, 400, seed=0)
    commonest = int(torch.from_numpy(task.test.labels).mode().values)
    assert task.chance == (task.test.labels == commonest).mean() > 0.1


@pytest.mark.parametrize("name, tokens, message", [("pathfinder", 100 + 1, "square image"), ("pathfinder", 49, "at least 8 x 8")])
def test_sequences_that_there_are_not(name, tokens, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, tokens, 2, 1, 0)
