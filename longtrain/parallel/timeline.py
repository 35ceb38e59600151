"""What a step of several ranks would wait for over slower links: what each of them computed and exchanged, played again on a clock of its
own.

A rank's log has what it sent off and asked for (`Posted`) and what it needed (`Asked`), each with the seconds that it had computed by then.
Played, a rank's clock goes on by what it computes; a message begins when both sides have posted it and those before it between the two
have arrived, and takes its bytes over the link's bytes a second; a rank that needs it sooner waits. So a busy machine, on which processes
wait for the processor, tells what a quiet one would do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Posted:
    """Sent off and asked for, in bytes by peer."""

    number: int
    computed: float
    """Seconds that this rank had computed, since whenever."""
    sent: Mapping[int, int]
    received: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """What came with the post of that number is needed."""

    number: int
    computed: float
    what: str


Log = list[Posted | Asked]


@dataclass(slots=True)
class Played:
    """One rank's step."""

    seconds: float = 0.0
    transfers: float = 0.0
    """Seconds that its links were busy with what it received."""
    waited: Counter[str] = field(default_factory=Counter)
    """Seconds, by what it waited for: for the link, and for a peer that was not as far."""


@dataclass(slots=True)
class _Channel:
    """From one rank to another, messages in their order: when they were sent (and their bytes), asked for, and there."""

    sent: list[tuple[float, int]] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)

    def go_on(self, link: float) -> None:
        for i in range(len(self.there), min(len(self.sent), len(self.asked))):
            before = self.there[-1] if self.there else 0.0
            self.there.append(max(before, self.sent[i][0], self.asked[i]) + self.sent[i][1] / link)


def play(logs: Sequence[Log], link: float) -> list[Played]:
    """The steps of all ranks, over links of so many bytes a second between any two. Raises ValueError for logs that do not fit together."""
    played, channels = [Played() for _ in logs], defaultdict(_Channel)
    at, computed = [0] * len(logs), [log[0].computed if log else 0.0 for log in logs]
    expected: dict[tuple[int, int], list[tuple[_Channel, int]]] = {}
    moved = True
    while moved:
        moved = False
        for rank, log in enumerate(logs):
            while at[rank] < len(log):
                event, mine = log[at[rank]], played[rank]
                now = mine.seconds + event.computed - computed[rank]
                if isinstance(event, Posted):
                    for peer, nbytes in event.sent.items():
                        channels[rank, peer].sent.append((now, nbytes))
                    for peer, nbytes in event.received.items():
                        channels[peer, rank].asked.append(now)
                        expected.setdefault((rank, event.number), []).append((channels[peer, rank], len(channels[peer, rank].asked) - 1))
                        mine.transfers += nbytes / link
                    for peer in range(len(logs)):
                        channels[rank, peer].go_on(link)
                        channels[peer, rank].go_on(link)
                else:
                    coming = expected.get((rank, event.number), [])
                    if any(index >= len(channel.there) for channel, index in coming):
                        break
                    ready = max((channel.there[index] for channel, index in coming), default=now)
                    mine.waited[event.what] += max(0.0, ready - now)
                    now = max(now, ready)
                mine.seconds, computed[rank], moved = now, event.computed, True
                at[rank] += 1
    if any(at[rank] < len(log) for rank, log in enumerate(logs)):
        raise ValueError("the logs do not fit together: a rank needs what no other has sent")
    return played
