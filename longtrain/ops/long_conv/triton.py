"""The Triton kernels in `kernels/long_conv_*.py`: Monarch convolutions on tensor cores, on NVIDIA GPUs from sm_80 on.

    forward    rows = gate_in u;  rows = F^-1 (F rows)(F k);  y = gate_out (rows + skip v)
    backward   the same with conj(F k) for the inputs' gradients; F^-1 of the sum of conj(F v)(F g) for the filter's

Some channels at a time, so that the workspace is bounded. A group's filters are transformed once, and their spectra, which stay in the
order in which the matrices leave them, serve all its documents and rows of the batch. A call becomes `Launch`es, which are data: they can
be run, and compiled without a GPU.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longtrain.ops.launch import Launch, refuse_kernels
from longtrain.ops.long_conv.call import Call, Gradients, Wanted
from longtrain.ops.long_conv.monarch import FUSED, INNER, OUTER, Matrices, Piece, Work, matrices, narrow, works

WORKSPACE = 256 << 20
"""Bytes that a group of channels may take, unless even LEAST channels take more."""
LEAST = 16
"""Channels of 16 bits side by side are what memory gives at once."""
PROGRAMS = 2
"""Of a multiprocessor."""
TOKENS, CHANNELS, SPAN = 64, 64, 4096
"""Of a tile around the transforms; tokens of one partial sum of dskip."""
WARPS = 8
"""Of every kernel but `unpack_rows`: with fewer they spill registers, and that one with more."""


def refuse(call: Call) -> str | None:
    """Why the call cannot be served, or None."""
    if (reason := refuse_kernels(call.u_BTE.device, call.u_BTE.dtype, call.wide)) is not None:
        return reason
    if works(call) is None:
        return f"a document of more than {OUTER * INNER:,} tokens, and a filter too long to take it in pieces of {FUSED:,}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Some channels of a call as rows of one size."""

    call: Call
    """Cut to these channels and to the filters that serve them."""
    filters: slice
    channels: slice
    share: int
    """Channels that a filter serves."""
    shift: int
    """Those of the first filter that stand before the group."""
    work: Work
    constants: Matrices

    @property
    def rows(self) -> tuple[int, int, int]:
        """Pieces times rows of the batch, channels, numbers."""
        return len(self.work.pieces) * self.call.u_BTE.shape[0], self.call.u_BTE.shape[2], self.work.size.total

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or narrow(self.call), device=self.call.u_BTE.device)


def channel_bytes(work: Work, batch: int, itemsize: int) -> int:
    """Workspace of a channel in the backward, the larger pass: rows of v and g, with an outer matrix also complex, and a filter's
    spectrum."""
    rows = len(work.pieces) * batch * (2 + 4 * (work.size.outer > 1))
    return (rows + 4 + 2 * (work.size.outer > 1)) * work.size.total * itemsize


def _groups(call: Call) -> Iterator[_Group]:
    B, _, E = call.u_BTE.shape
    for work in works(call):
        constants = matrices(work.size, narrow(call), call.u_BTE.device)
        fit = WORKSPACE // channel_bytes(work, B, narrow(call).itemsize)
        step = max(LEAST, fit // CHANNELS * CHANNELS or fit)
        for start in range(0, E, step):
            channels = slice(start, min(start + step, E))
            filters = slice(start // call.share, -(-channels.stop // call.share))

            def cut(x: Tensor | None) -> Tensor | None:
                return None if x is None else x[:, :, channels]

            part = replace(
                call,
                u_BTE=cut(call.u_BTE),
                k_HW=call.k_HW[filters],
                gate_in_BTE=cut(call.gate_in_BTE),
                gate_out_BTE=cut(call.gate_out_BTE),
                skip_E=None if call.skip_E is None else call.skip_E[channels].float().contiguous(),
            )
            yield _Group(
                call=part, filters=filters, channels=channels, share=call.share, shift=start % call.share, work=work, constants=constants
            )


# --- around the transforms -------------------------------------------------------------------------------------------------------


def _table(pieces: tuple[Piece, ...], device: torch.device) -> Tensor:
    table = torch.tensor(pieces, dtype=torch.int32)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def _tiles(group: _Group) -> dict[str, Any]:
    groups, width, N = group.rows
    tiles = -(-N // TOKENS)
    return {
        "grid": (groups * tiles, -(-width // CHANNELS)),
        "arguments": {"tiles": tiles, "batches": group.call.u_BTE.shape[0], "width": width, "N": N, "TOKENS": TOKENS, "CHANNELS": CHANNELS},
    }


def _packed(group: _Group, x: Tensor, gate: Tensor | None, table: Tensor, which: int, rows: Tensor) -> Launch:
    from longtrain.kernels.long_conv_rows import pack_rows

    common = _tiles(group)
    arguments = {"x": x, "gate": gate, "x_strides": x.stride(), "gate_strides": _strides(gate)}
    arguments |= {"rows": rows, "pieces": table, "WHICH": which}
    return Launch(kernel=pack_rows, grid=common["grid"], arguments=arguments | common["arguments"], warps=WARPS)


def _unpacked(group: _Group, rows: Tensor, table: Tensor, x: Tensor, x_gate: Tensor | None, a: tuple, b: tuple = (None, None)) -> Launch:
    """`a`, `b`: (where to, by what)."""
    from longtrain.kernels.long_conv_rows import unpack_rows

    common = _tiles(group)
    tensors = {"x": x, "x_gate": x_gate, "out_a": a[0], "gate_a": a[1], "out_b": b[0], "gate_b": b[1]}
    arguments = tensors | {name + "_strides": _strides(x) for name, x in tensors.items()}
    arguments |= {"rows": rows, "pieces": table, "skip": group.call.skip_E}
    return Launch(kernel=unpack_rows, grid=common["grid"], arguments=arguments | common["arguments"])


def _skip_sums(call: Call, dy_BTE: Tensor, sums: Tensor) -> Launch:
    from longtrain.kernels.long_conv_rows import skip_sums

    T, E = call.u_BTE.shape[1:]
    tensors = {"u": call.u_BTE, "gate_in": call.gate_in_BTE, "dy": dy_BTE, "gate_out": call.gate_out_BTE}
    arguments = tensors | {name + "_strides": _strides(x) for name, x in tensors.items()}
    arguments |= {"sums": sums, "tokens": T, "width": E, "SPAN": SPAN, "TOKENS": TOKENS, "CHANNELS": CHANNELS}
    return Launch(kernel=skip_sums, grid=(sums.shape[0], -(-E // CHANNELS)), arguments=arguments, warps=WARPS)


# --- transforms ------------------------------------------------------------------------------------------------------------------


def _programs(rows: int, device: torch.device) -> int:
    count = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS if device.type == "cuda" else 3
    return min(rows, count)


def _inner(group: _Group, kernel, programs: int, scratch_rows: int, **arguments: Any) -> Launch:
    size, constants = group.work.size, group.constants
    common = {
        "scratch": group.empty(programs, scratch_rows * 2, size.inner), "first": constants.first, "twiddle": constants.twiddle,
        "columns": constants.columns, "N1": size.rows, "N2": size.columns, "STAGES": 2,
        "PRECISION": "tf32x3" if narrow(group.call) == torch.float32 else "ieee",
    }
    block, depth = (32, 16) if narrow(group.call) == torch.float32 else (64, 32)  # larger ones spill registers
    common |= {"BLOCK": min(block, size.rows), "DEPTH": min(depth, size.columns), "COLS": min(32, size.columns)}
    named = common | arguments
    return Launch(kernel=kernel, grid=(programs,), arguments={name: named[name] for name in kernel.arg_names}, warps=WARPS)


def _outer(group: _Group, x: Tensor, plane: int | None, y: Tensor, y_plane: int | None, inverse: bool) -> Launch:
    """x, y: rows of N, and how far behind them their imaginary parts lie, None where there are none."""
    from longtrain.kernels.long_conv_monarch import monarch_outer

    size, constants = group.work.size, group.constants
    block = min(size.outer_block, 32) if narrow(group.call) == torch.float32 else size.outer_block  # larger ones spill registers
    arguments = {
        "x": x, "plane": plane, "y": y, "y_plane": y_plane, "f": constants.outer_last if inverse else constants.outer_first,
        "high": constants.outer_high, "low": constants.outer_low, "outer": size.outer, "padded": size.padded_outer, "N1": size.rows,
        "N2": size.columns, "INVERSE": inverse, "BLOCK": block, "STAGES": 2,
        "PRECISION": "tf32x3" if narrow(group.call) == torch.float32 else "ieee",
    }
    rows = x.numel() // size.total // (1 if plane is None else 2)
    return Launch(kernel=monarch_outer, grid=(rows, size.rows, size.padded_outer // block), arguments=arguments, warps=WARPS)


def _entered(group: _Group, x: Tensor, plane: int | None) -> Generator[Launch, None, tuple[Tensor, int | None]]:
    """Rows as the inner kernels take them: behind the outer matrix, where there is one, and how far behind are their imaginary parts."""
    if group.work.size.outer == 1:
        return x, plane
    count = x.numel() // (1 if plane is None else 2)
    y = group.empty(2, count)
    yield _outer(group, x, plane, y, count, inverse=False)
    return y, count


def _spectrum(group: _Group) -> Generator[Launch, None, Tensor]:
    """Returns the filters' spectrum [filters, outer, 2, N1 N2], which the launches make."""
    from longtrain.kernels.long_conv_monarch import monarch_spectrum

    work, size, k_HW = group.work, group.work.size, group.call.k_HW
    H, W = k_HW.shape
    x = group.empty(1 + (work.future > 0), H, size.total).zero_()
    x[0, :, : work.past] = k_HW[:, : work.past]
    if work.future:  # lag -l: x^-l = -x^(2N - l) = -i z^(N - l)
        x[1, :, size.total - work.future :].copy_(k_HW[:, W - work.future :]).neg_()
    x, plane = yield from _entered(group, x, H * size.total if work.future else None)
    spectrum, count = group.empty(H, size.outer, 2, size.inner), H * size.outer
    yield _inner(
        group, monarch_spectrum, _programs(count, k_HW.device), 1, x=x, plane=plane, spectrum=spectrum, count=count, scale=size.total**0.5
    )
    return spectrum


def _convolved(group: _Group, rows: Tensor, spectrum: Tensor, conjugate: bool) -> Iterator[Launch]:
    """Of rows [groups, channels, N], in place."""
    from longtrain.kernels.long_conv_monarch import monarch_convolve

    size, (groups, width, _) = group.work.size, group.rows
    x, plane = yield from _entered(group, rows, None)
    count = groups * width * size.outer
    yield _inner(
        group, monarch_convolve, _programs(count, rows.device), 1, x=x, plane=plane, spectrum=spectrum, last=group.constants.last,
        count=count, outer=size.outer, width=width, share=group.share, shift=group.shift, CONJUGATE=conjugate,
    )
    if size.outer > 1:
        yield _outer(group, x, plane, rows, None, inverse=True)


def _correlated(group: _Group, v: Tensor, g: Tensor) -> Generator[Launch, None, Tensor]:
    """Returns the filters' gradient as they are laid out, [2, filters, N], over the root of N; the second plane where filters have one."""
    from longtrain.kernels.long_conv_monarch import monarch_correlate

    size, H, (groups, width, _) = group.work.size, group.call.k_HW.shape[0], group.rows
    v, plane = yield from _entered(group, v, None)
    g, _ = yield from _entered(group, g, None)
    out, count, programs = group.empty(2, H, size.total, dtype=torch.float32), H * size.total, _programs(H * size.outer, v.device)
    two_sided = count if group.work.future else None
    yield _inner(
        group, monarch_correlate, programs, 2, v=v, g=g, plane=plane, out=out, out_plane=two_sided if plane is None else count,
        sums=group.empty(programs, 2, size.inner, dtype=torch.float32), last=group.constants.last, filters=H, groups=groups,
        outer=size.outer, width=width, share=group.share, shift=group.shift,
    )
    if size.outer == 1:
        return out
    found = torch.empty_like(out)
    yield _outer(group, out, count, found, two_sided, inverse=True)
    return found


# --- a call ----------------------------------------------------------------------------------------------------------------------


def forward_launches(call: Call, y_BTE: Tensor) -> Iterator[Launch]:
    for group in _groups(call):
        part = group.call
        spectrum = yield from _spectrum(group)
        table, rows = _table(group.work.pieces, y_BTE.device), group.empty(*group.rows)
        yield _packed(group, part.u_BTE, part.gate_in_BTE, table, 0, rows)
        yield from _convolved(group, rows, spectrum, conjugate=False)
        yield _unpacked(group, rows, table, part.u_BTE, part.gate_in_BTE, (y_BTE[:, :, group.channels], part.gate_out_BTE))


def backward_launches(call: Call, dy_BTE: Tensor, found: Gradients) -> Iterator[Launch]:
    """Into the tensors of `found`; those of k and of skip must be 0 before."""
    for group in _groups(call):
        part, dy = group.call, dy_BTE[:, :, group.channels]
        u, gate_in, gate_out = part.u_BTE, part.gate_in_BTE, part.gate_out_BTE
        du, din, dout = (None if x is None else x[:, :, group.channels] for x in (found.du_BTE, found.dgate_in_BTE, found.dgate_out_BTE))
        table = _table(group.work.pieces, dy.device)
        v, g = group.empty(*group.rows), group.empty(*group.rows)
        if found.dk_HW is not None or dout is not None:
            yield _packed(group, u, gate_in, table, 0, v)
        if found.dk_HW is not None:
            yield _packed(group, dy, gate_out, table, 2, g)
            laid_2HN = yield from _correlated(group, v, g)
            root, dk_HW, past, future = group.work.size.total**0.5, found.dk_HW[group.filters], group.work.past, group.work.future
            dk_HW[:, :past].add_(laid_2HN[0, :, :past], alpha=root)
            if future:
                dk_HW[:, dk_HW.shape[1] - future :].sub_(laid_2HN[1, :, laid_2HN.shape[2] - future :], alpha=root)
        if dout is not None or du is not None or din is not None:
            spectrum = yield from _spectrum(group)
        if dout is not None:
            yield from _convolved(group, v, spectrum, conjugate=False)
            yield _unpacked(group, v, table, u, gate_in, (dout, dy))
        if du is not None or din is not None:
            if found.dk_HW is None or not group.work.whole:
                table = _table(group.work.mirrored, dy.device)
                yield _packed(group, dy, gate_out, table, 0, g)
            yield from _convolved(group, g, spectrum, conjugate=True)
            yield _unpacked(group, g, table, dy, gate_out, (du, gate_in), (din, u))


def forward(call: Call) -> Tensor:
    y_BTE = torch.empty(call.u_BTE.shape, dtype=call.u_BTE.dtype, device=call.u_BTE.device)
    with torch.cuda.device_of(y_BTE):
        for launch in forward_launches(call, y_BTE):
            launch.run()
    return y_BTE


def backward(call: Call, dy_BTE: Tensor, wanted: Wanted) -> Gradients:
    u_BTE, sums = call.u_BTE, None
    found = Gradients(
        du_BTE=torch.empty(u_BTE.shape, dtype=u_BTE.dtype, device=u_BTE.device) if wanted.u else None,
        dk_HW=torch.zeros(call.k_HW.shape, dtype=call.wide, device=u_BTE.device) if wanted.k else None,
        dgate_in_BTE=torch.empty(u_BTE.shape, dtype=call.gate_in_BTE.dtype, device=u_BTE.device) if wanted.gate_in else None,
        dgate_out_BTE=torch.empty(u_BTE.shape, dtype=call.gate_out_BTE.dtype, device=u_BTE.device) if wanted.gate_out else None,
    )
    with torch.cuda.device_of(u_BTE):
        for launch in backward_launches(call, dy_BTE, found):
            launch.run()
        if wanted.skip:
            B, T, E = u_BTE.shape
            sums = torch.empty(B * -(-T // SPAN), E, dtype=call.wide, device=u_BTE.device)
            _skip_sums(call, dy_BTE, sums).run()
    return replace(found, dskip_E=None if sums is None else sums.sum(0))
