import pytest
import torch

from longtrain.offload import DeviceStore, Place, Stored
from longtrain.span import Span


@pytest.fixture
def store():
    return DeviceStore()


def tokens(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, dtype=torch.float64)[None, :, None]


def test_get_joins_extents_and_cuts_them(store):
    for span in (Span(4, 6), Span(0, 4), Span(6, 9)):
        store.put("x", span, tokens(span.start, span.stop))
    assert torch.equal(store.get("x", Span(3, 8)), tokens(3, 8))
    assert torch.equal(store.get("x", Span(1, 3)), tokens(1, 3))


def test_an_exact_extent_is_not_copied(store):
    x = tokens(0, 4)
    store.put("x", Span(0, 4), x)
    assert store.get("x", Span(0, 4)) is x


@pytest.mark.parametrize("span", [Span(2, 7), Span(5, 6), Span(0, 3)])
def test_a_missing_token_is_named(store, span):
    store.put("x", Span(1, 5), tokens(1, 5))
    with pytest.raises(KeyError, match="not stored"):
        store.get("x", span)


def test_overlaps_and_wrong_lengths_are_refused(store):
    store.put("x", Span(0, 4), tokens(0, 4))
    with pytest.raises(ValueError, match="overlaps"):
        store.put("x", Span(3, 5), tokens(3, 5))
    with pytest.raises(ValueError, match="5 tokens"):
        store.put("y", Span(0, 5), tokens(0, 4))


def test_an_edit_after_put_is_refused(store):
    x = tokens(0, 4)
    store.put("x", Span(0, 4), x)
    x[:, 1] = 9
    with pytest.raises(RuntimeError, match="modified in place"):
        store.get("x", Span(0, 4))


def test_take_and_release(store):
    x = Stored(store, "x")
    for span in (Span(0, 4), Span(4, 8)):
        x.put(span, tokens(span.start, span.stop))
    assert torch.equal(x.take(Span(0, 4)), tokens(0, 4))
    with pytest.raises(KeyError):
        x.get(Span(0, 4))
    assert torch.equal(x.get(Span(4, 8)), tokens(4, 8))
    del x
    assert store.names() == []


def test_two_owners_of_one_label_do_not_meet(store):
    a, b = Stored(store, "layer input"), Stored(store, "layer input")
    a.put(Span(0, 2), tokens(0, 2))
    b.put(Span(0, 2), tokens(5, 7))
    assert torch.equal(a.get(Span(0, 2)), tokens(0, 2))


def test_a_place_decides_per_span(store):
    places = []
    x = Stored(store, "x", lambda span: places.append(span) or Place())
    x.put(Span(0, 2), tokens(0, 2))
    assert places == [Span(0, 2)] and torch.equal(x.get(Span(0, 2)), tokens(0, 2))


@pytest.mark.parametrize("place, setting", [
    (Place(tier="host"), "memory.host_budget"), (Place(tier="disk"), "memory.disk"), (Place(compress=True), "memory"),
])
def test_tiers_that_are_not_set_up_are_refused_with_the_setting(store, place, setting):
    with pytest.raises(ValueError, match=setting):
        store.put("x", Span(0, 2), tokens(0, 2), place)
