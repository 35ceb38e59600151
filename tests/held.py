"""How many bytes a stretch of code holds at the most, as torch's allocator counts them."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def most_held(run) -> int:
    """Bytes that torch's allocator gave out and had not taken back, at the most, while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(events):
        held += size
        most = max(most, held)
    return most
