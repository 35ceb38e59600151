"""Steps played again over slower links, against what one counts by hand."""

import math

import pytest

from longtrain.parallel.timeline import Asked, Posted, play


def rank(me: int, *, before: float = 0.0, during: float, nbytes: int = 100) -> list:
    """Computes `before`, sends the other rank something and asks for as much, computes `during`, and then needs what it asked for."""
    peer = {1 - me: nbytes}
    done = 5.0 + before + during
    return [Posted(0, 5.0, {}, {}), Posted(1, 5.0 + before, peer, peer), Asked(1, done, "kv"), Asked(2, done + 1.0, "end")]


@pytest.mark.parametrize("link, waited, seconds", [
    (math.inf, (0.0, 0.0), (3.0, 4.0)), (50.0, (0.0, 0.0), (3.0, 4.0)), (40.0, (0.5, 0.0), (3.5, 4.0)), (25.0, (2.0, 1.0), (5.0, 5.0)),
])
def test_what_is_computed_meanwhile_hides_a_transfer(link, waited, seconds):
    """100 bytes beside 2 and 3 seconds of computing, and a second behind them."""
    played = play([rank(0, during=2.0), rank(1, during=3.0)], link)
    assert tuple(p.waited["kv"] for p in played) == waited
    assert tuple(p.seconds for p in played) == seconds
    assert all(p.transfers == 100 / link for p in played)


def test_a_rank_waits_for_one_that_is_not_as_far():
    first, second = play([rank(0, during=1.0), rank(1, before=4.0, during=1.0)], math.inf)
    assert first.waited["kv"] == 3.0 and second.waited["kv"] == 0.0
    assert first.seconds == 5.0 and second.seconds == 6.0


def test_messages_go_over_a_link_one_after_the_other():
    """Two of 100 bytes, posted at once and needed at once."""
    sender = [Posted(1, 0.0, {1: 100}, {}), Posted(2, 0.0, {1: 100}, {})]
    receiver = [Posted(1, 0.0, {}, {0: 100}), Posted(2, 0.0, {}, {0: 100}), Asked(1, 0.0, "q"), Asked(2, 0.0, "dout")]
    _, receiver = play([sender, receiver], 100.0)
    assert receiver.waited == {"q": 1.0, "dout": 1.0} and receiver.seconds == 2.0


def test_logs_that_do_not_fit_together():
    with pytest.raises(ValueError, match="a rank needs what no other has sent"):
        play([[Posted(1, 0.0, {}, {1: 8}), Asked(1, 0.0, "kv")], []], math.inf)
