"""transformers' attention masks as data: causality, window, documents and padding, read off its own mask functions.

transformers describes a mask by a function of (batch row, head, query position, key position). Its values next to the diagonal say
where documents end, a bisection says how wide the window is, and the description is then compared with the function: on every pair of a
small mask, on sampled pairs of a large one. A mask that is none of these things is refused, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers.masking_utils import causal_mask_function

from longtrain.span import Layout, Span

EVERY_PAIR, SAMPLED_PAIRS = 1 << 14, 1 << 14


@dataclass(frozen=True, slots=True)
class Row:
    """One batch row: its documents, over all positions up to the last key, and the keys that are not padding."""

    documents: Layout
    keys: Span

    @property
    def is_plain(self) -> bool:
        return len(self.documents.edges) == 2 and self.keys == Span(0, self.documents.tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mask:
    """Who sees whom. It stands where transformers passes a mask tensor, and so reaches every attention call of every family."""

    causal: bool
    window: tuple[int, int]
    """(left, right) as in `longtrain.ops.attention`; -1 is unbounded."""
    queries: Span
    keys: Span
    """Positions of the queries and of the keys that the attention call is given."""
    rows: tuple[Row, ...]
    """One for each batch row, or a single one that all share."""
    mix: Callable[..., Tensor] | None = None
    """What computes the attention in place of the whole: ``mix(module, q, k, v, options)``; set while a layer runs on one chunk."""
    refusal: str | None = None
    """Why the model's mask is none of these things. Raised where attention uses it: models make masks that no layer uses."""

    @classmethod
    def plain(cls, queries: int, keys: int, *, causal: bool, window: tuple[int, int] = (-1, -1)) -> Mask:
        """One document without padding; the queries are its last ones."""
        row = Row(Layout.make(keys), Span(0, keys))
        return cls(causal=causal, window=window, queries=Span(keys - queries, keys), keys=Span(0, keys), rows=(row,))

    @property
    def is_plain(self) -> bool:
        return len(self.rows) == 1 and self.rows[0].is_plain

    def row(self, index: int) -> Row:
        return self.rows[index if len(self.rows) > 1 else 0]

    def check(self) -> None:
        """Raise ValueError if this mask cannot be honoured."""
        if self.refusal is not None:
            raise ValueError(self.refusal)

    def with_documents(self, cu_seqlens: Tensor) -> Mask:
        """The same with document boundaries added, as given to flash-attention kernels. Raises ValueError unless there is one row."""
        if len(self.rows) > 1:
            raise ValueError(f"cu_seq_lens packs documents into one row, found a batch of {len(self.rows)} different rows")
        (row,) = self.rows
        given = Layout.make(row.documents.tokens, cu_seqlens)
        edges = tuple(sorted({*row.documents.edges, *given.edges}))
        return replace(self, rows=(replace(row, documents=Layout(given.tokens, edges)),))

    def visible(self, row_N: Tensor, query_N: Tensor, key_N: Tensor, *, padding: bool = True) -> Tensor:
        """Boolean [N]: whether the query sees the key in that batch row, for int64 positions on the CPU."""
        seen = key_N <= query_N if self.causal else torch.ones_like(key_N, dtype=torch.bool)
        left, right = self.window
        if left >= 0:
            seen &= query_N - key_N <= left
        if right >= 0:
            seen &= key_N - query_N <= right
        for index, row in enumerate(self.rows):
            here = row_N == index if len(self.rows) > 1 else torch.ones_like(seen)
            edges = torch.tensor(row.documents.edges[1:-1])
            of_query, of_key = (torch.bucketize(t.contiguous(), edges, right=True) for t in (query_N, key_N))
            seen &= ~here | (of_query == of_key)
            if padding:
                seen &= ~here | ((key_N >= row.keys.start) & (key_N < row.keys.stop))
        return seen

    def dense(self, batch: int) -> Tensor:
        """Boolean ``[batch, 1, queries, keys]``, for small examples."""
        axes = (torch.arange(batch), torch.arange(*_ends(self.queries)), torch.arange(*_ends(self.keys)))
        grid = torch.cartesian_prod(*axes).unbind(1)
        return self.visible(*grid).view(batch, 1, len(self.queries), len(self.keys))


class OfWhole(Tensor):
    """An attention mask of ones over all positions of sequences of which the model is given a part: the mask made is that of all of
    them."""


def longtrain_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **unused,
) -> Mask:
    """What transformers' `AttentionMaskInterface` calls under the name "longtrain"; arguments as `transformers.masking_utils.sdpa_mask`.

    Raises ValueError for padding inside a row. A mask that is not causal or two-sided, windowed and cut into documents is refused when
    it is used.
    """
    if isinstance(attention_mask, OfWhole):
        q_length, attention_mask = kv_length, None
    queries, keys = (Span(int(start), int(start) + n) for start, n in ((q_offset, q_length), (kv_offset, kv_length)))
    paddings = [Span(0, max(keys.stop, queries.stop))] if attention_mask is None else _paddings(attention_mask, keys, queries)
    if mask_function is causal_mask_function:
        layout = Layout.make(paddings[0].stop if attention_mask is None else max(keys.stop, queries.stop))
        rows = [Row(layout, padding) for padding in paddings]
        return Mask(causal=True, window=(-1, -1), queries=queries, keys=keys, rows=_shared(rows))
    ask = partial(_ask, mask_function, use_vmap, torch.device(device))
    mask = _describe(ask, batch_size, queries, keys)
    refusal = _difference(ask, mask, batch_size)
    rows = [Row(mask.row(b).documents, paddings[b if len(paddings) > 1 else 0]) for b in range(batch_size)]
    return replace(mask, rows=_shared(rows), refusal=refusal)


def read_mask(tensor_B1TS: Tensor) -> Mask:
    """A mask as transformers gives it to sdpa (True is visible) or eager attention (added to the scores), read for what it is.

    The queries are the last of the keys. Raises ValueError for what is not causal or two-sided attention with a window, documents and
    padding, the same for all heads.
    """
    seen_BTS = (tensor_B1TS if tensor_B1TS.dtype == torch.bool else tensor_B1TS > torch.finfo(tensor_B1TS.dtype).min)[:, 0].cpu()
    _, T, S = seen_BTS.shape
    keys, queries = Span(0, S), Span(S - T, S)
    valid_BS = seen_BTS.any(1)
    paddings = _paddings(valid_BS, keys, queries)
    ahead_TS = torch.arange(S) - torch.arange(*_ends(queries))[:, None]
    left, right = int((-ahead_TS * seen_BTS).amax()), int((ahead_TS * seen_BTS).amax())
    rows = []
    for b, seen_TS in enumerate(seen_BTS):
        own, before = seen_TS.diagonal(S - T), seen_TS.diagonal(S - T - 1) if S > T else F.pad(seen_TS.diagonal(-1), (1, 0))
        starts = own & ~before & F.pad(valid_BS[b], (1, 0))[queries.slice()]
        edges = (0, *(queries.start + starts.nonzero()[:, 0]).tolist(), S)
        rows.append(Row(Layout.make(S, sorted({*edges})), paddings[b if len(paddings) > 1 else 0]))
    window = (-1 if left >= S - 1 else left, -1 if right in (0, S - 1) else right)
    mask = Mask(causal=right == 0, window=window, queries=queries, keys=keys, rows=_shared(rows))
    added = tensor_B1TS.dtype != torch.bool and bool((tensor_B1TS[:, 0].cpu()[seen_BTS] != 0).any())
    if added or tensor_B1TS.shape[1] > 1 or not torch.equal(mask.dense(len(seen_BTS))[:, 0], seen_BTS):
        raise ValueError(
            f"a mask tensor of shape {list(tensor_B1TS.shape)} cannot be honoured: it is not causal or two-sided attention with a "
            "window, documents and padding, the same for all heads"
        )
    return mask


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop


def _shared(rows: list[Row]) -> tuple[Row, ...]:
    return (rows[0],) if all(row == rows[0] for row in rows) else tuple(rows)


def _paddings(attention_mask: Tensor, keys: Span, queries: Span) -> list[Span]:
    """The keys of each row that are not padding. Raises ValueError where they are not one range."""
    given = attention_mask.bool().cpu()
    if given.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], found shape {list(given.shape)}; leave out masks made by hand")
    if (missing := max(keys.stop, queries.stop) - given.shape[1]) > 0:
        given = F.pad(given, (0, missing))
    spans = []
    for row, valid in enumerate(given.tolist() if given.shape[1] <= 4096 else given):
        places = [i for i, v in enumerate(valid) if v] if isinstance(valid, list) else valid.nonzero()[:, 0]
        count = len(places)
        start, stop = (int(places[0]), int(places[-1]) + 1) if count else (0, 0)
        if stop - start != count:
            raise ValueError(
                f"attention_mask of row {row} has padding inside the sequence ({count} tokens between {start} and {stop}), which cannot be "
                "honoured: pad at the ends, or pack documents with position_ids that restart and no attention_mask"
            )
        spans.append(Span(start, stop))
    return [spans[0]] if all(span == spans[0] for span in spans) else spans


def _ask(mask_function: Callable, use_vmap: bool, device: torch.device, row_N: Tensor, query_N: Tensor, key_N: Tensor) -> Tensor:
    """transformers' own answer for pairs, boolean [N] on the CPU."""
    indices = [t.to(device) for t in (row_N, torch.zeros_like(row_N), query_N, key_N)]
    if use_vmap:
        with TransformGetItemToIndex():
            answer = torch.vmap(mask_function)(*indices)
    else:
        answer = mask_function(*indices)
    return answer.expand(row_N.shape).cpu()


def _describe(ask: Callable, batch: int, queries: Span, keys: Span) -> Mask:
    """Read documents, causality and window off the mask function."""
    end = max(keys.stop, queries.stop)
    at = torch.arange(max(keys.start, 0) + 1, keys.stop)
    row_N, at_N = (t.reshape(-1) for t in torch.meshgrid(torch.arange(batch), at, indexing="ij"))
    joined = ask(row_N, at_N, at_N - 1).view(batch, -1)
    ahead = ask(row_N, at_N - 1, at_N)
    rows = []
    for b in range(batch):
        edges = (0, *(p for p in at[~joined[b]].tolist()), end)
        rows.append(Row(Layout(end, edges), Span(0, end)))
    # The query that could see furthest back: the last one of the longest document.
    b, start, stop = max(
        (
            (b, a, min(e, queries.stop))
            for b, row in enumerate(rows)
            for a, e in zip(row.documents.edges, row.documents.edges[1:])
            if e > queries.start
        ),
        key=lambda document: document[2] - document[1],
    )
    left = _reach(ask, b, stop - 1, max(start, keys.start))
    right = -1
    if causal := not bool(ahead.any()):
        return Mask(causal=causal, window=(left, right), queries=queries, keys=keys, rows=tuple(rows))
    right = _reach(ask, b, start, min(stop, keys.stop) - 1)
    return Mask(causal=causal, window=(left, right), queries=queries, keys=keys, rows=tuple(rows))


def _reach(ask: Callable, row: int, query: int, furthest: int) -> int:
    """How many positions towards `furthest` the query sees; -1 where it sees all of them."""
    sees = lambda distance: bool(ask(*(torch.tensor([i]) for i in (row, query, query + (distance if furthest > query else -distance)))))
    low, high = 0, abs(query - furthest)
    if high == 0 or sees(high):
        return -1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sees(middle) else (low, middle)
    return low


def _difference(ask: Callable, mask: Mask, batch: int) -> str | None:
    """A pair on which the description and the function differ, as a refusal; None where there is none."""
    tokens, keys = len(mask.queries), len(mask.keys)
    if batch * tokens * keys <= EVERY_PAIR:
        pairs = torch.cartesian_prod(torch.arange(batch), torch.arange(*_ends(mask.queries)), torch.arange(*_ends(mask.keys))).unbind(1)
    else:
        # Half of the keys anywhere, half near their query, at distances of all magnitudes.
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, size=(SAMPLED_PAIRS,), generator=generator)
        row_N, query_N, key_N = draw(high=batch), draw(mask.queries.start, mask.queries.stop), draw(mask.keys.start, mask.keys.stop)
        distance_N = (torch.rand(SAMPLED_PAIRS, generator=generator) * torch.log2(torch.tensor(keys + 1.0))).exp2().long() - 1
        near_N = torch.where(draw(high=4) == 0, query_N + distance_N, query_N - distance_N).clamp(mask.keys.start, mask.keys.stop - 1)
        pairs = row_N, query_N, torch.where(draw(high=2) == 0, key_N, near_N)
    differs = ask(*pairs) != mask.visible(*pairs, padding=False)
    if not differs.any():
        return None
    row, query, key = (int(t[differs][0]) for t in pairs)
    return (
        "the model's attention mask cannot be honoured: it is not causal or two-sided attention with a window, documents and padding "
        f"(found in row {row}, token {query}, key {key}); longtrain has no prefix, image-block or custom masks"
    )
