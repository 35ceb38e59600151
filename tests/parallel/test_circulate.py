"""How much of the work at home is done first, against a count of the pairs of tokens."""

import pytest

from longtrain.parallel.circulate import tokens_of_work
from longtrain.parallel.layout import ARRANGEMENTS, spread


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("layout", ARRANGEMENTS)
@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5, 2 / 3, 1.0])
def test_the_first_tokens_make_up_their_share_of_the_work(share, layout, ranks):
    """To within the work of a token."""
    shards = spread(400, ranks, inside=layout, chunk_tokens=100, stripe=7)
    tokens = lambda spans: [t for span in spans for t in range(span.start, span.stop)]
    for rank in range(ranks):
        held, chunk = shards.spans(rank), shards.parts[-1][rank]
        queries = [sum(key <= query for key in tokens(held)) for query in tokens(chunk)]
        keys = [sum(query >= key for query in tokens(held)) for key in tokens(held)]
        for work, cargo, seen_by in ((queries, chunk, False), (keys, held, True), ([1] * len(queries), chunk, None)):
            first = tokens_of_work(share, cargo, held, seen_by=seen_by)
            assert abs(sum(work[:first]) - share * sum(work)) <= 1.5 * max(work), (rank, seen_by)
