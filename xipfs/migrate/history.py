"""What migrations did: an event a chunk in a bounded ring, times of each step, what followed.

A *refault* is the first charged fault of a page after its move; a *ping-pong* is a page moved back
within ``PINGPONG_NS``. Both need the pages' last moves; the newest ``PAGES_MAX`` are remembered, so
the two counts are lower bounds once more pages than that moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from xipfs.accounting.charges import Charge
from xipfs.accounting.page_runs import PageRuns
from xipfs.fs.types import PageKind

EVENTS_MAX: Final = 4096
PAGES_MAX: Final = 1 << 18
PINGPONG_NS: Final = 10_000_000_000
#: The steps of the protocol whose duration is told (fuse/migration.py), in their order.
STEPS: Final = ("invalidate", "drain", "move", "invalidate_again")


class Histogram:
    """Durations in buckets of powers of two nanoseconds."""

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._count = self._sum_ns = self._max_ns = 0

    def add(self, duration_ns: int) -> None:
        """Count one duration."""
        bits = duration_ns.bit_length()
        self._buckets[bits] = self._buckets.get(bits, 0) + 1
        self._count += 1
        self._sum_ns += duration_ns
        self._max_ns = max(self._max_ns, duration_ns)

    def describe(self) -> dict[str, Any]:
        """Return the figures; a bucket counts what is below ``below_ns`` and in no lower one."""
        return {
            "count": self._count,
            "sum_ns": self._sum_ns,
            "max_ns": self._max_ns,
            "buckets": [
                {"below_ns": 1 << bits, "count": count}
                for bits, count in sorted(self._buckets.items())
            ],
        }


@dataclass
class ChunkEvent:
    """One chunk of a migration; ``durations_ns`` by step, each the sum over all passes."""

    time_ns: int
    ino: int
    first: int
    last: int
    to: str
    reason: str
    moved: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    moved_bytes: int = 0
    passes: int = 0
    ram_pages_used: int = 0
    durations_ns: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Move:
    """A move of pages of one file, and which of them faulted since."""

    to: PageKind
    time_ns: int
    refaulted: set[int] = field(default_factory=set)


class History:
    """The migrations of one mount since it was mounted."""

    def __init__(self) -> None:
        self._steps = {step: Histogram() for step in STEPS}
        self._events: deque[ChunkEvent] = deque(maxlen=EVENTS_MAX)
        self._moves: PageRuns[_Move] = PageRuns(PAGES_MAX)
        self._reasons: dict[str, int] = {}
        #: Told each group of pages that moved: inode, indexes, new kind, time.
        self.on_moved: Callable[[int, list[int], PageKind, int], None] | None = None
        self.recorded = 0
        self.refaults = 0
        self.pingpong = 0

    def moved(self, ino: int, pages: list[int], to: PageKind, now_ns: int) -> None:
        """Remember pages that have moved just now; all of one call share one record."""
        if not pages:
            return
        for before, count in self._moves.count(ino, pages):
            if before.to is not to and now_ns - before.time_ns <= PINGPONG_NS:
                self.pingpong += count
        self._moves.tell(ino, pages, _Move(to, now_ns))
        if self.on_moved is not None:
            self.on_moved(ino, pages, to, now_ns)

    def charged(self, charges: Iterable[Charge]) -> None:
        """Look for faults of pages that have moved before."""
        if not self._moves:
            return
        for charge in charges:
            move = self._moves.get(charge.ino, charge.page)
            if move is None or charge.time_ns <= move.time_ns or charge.page in move.refaulted:
                continue
            move.refaulted.add(charge.page)
            self.refaults += 1

    def record(self, event: ChunkEvent) -> None:
        """Add the event of a chunk that is over."""
        for step, duration_ns in event.durations_ns.items():
            self._steps[step].add(duration_ns)
        self._reasons[event.reason] = self._reasons.get(event.reason, 0) + event.moved
        self._events.append(event)
        self.recorded += 1

    def since(self, number: int) -> tuple[list[ChunkEvent], int, int]:
        """Return the events from ``number`` on, how many of them the ring lost, the next number."""
        oldest = self.recorded - len(self._events)
        lost = max(oldest - number, 0)
        return list(self._events)[max(number - oldest, 0) :], lost, self.recorded

    def describe(self) -> dict[str, Any]:
        """Return the figures as they stand in ``stats.json``."""
        return {
            "refaults": self.refaults,
            "pingpong": self.pingpong,
            "pingpong_window_ns": PINGPONG_NS,
            "moved_by_reason": dict(self._reasons),
            "chunks": self.recorded,
            "step_ns": {step: each.describe() for step, each in self._steps.items()},
        }
