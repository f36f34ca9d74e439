"""What migrations did: an event a chunk in a bounded ring, times of each step, what followed.

A *refault* is the first charged fault of a page after its move; a *ping-pong* is a page moved back
within ``PINGPONG_NS``. Both need the pages' last moves, which ``page_moves`` keeps of a bounded
number of pages; the two counts are lower bounds once ``pages_forgotten`` is not 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from xipfs.accounting.charges import Charge, ChargeBatch
from xipfs.fs.types import PageKind
from xipfs.migrate.books import Key, MoveCounts, Table
from xipfs.migrate.engine import BY_HAND, runs
from xipfs.migrate.page_moves import Ints, PageMoves
from xipfs.migrate.policy import Move
from xipfs.trace.fault_batch import INDEX, INO, PID, TIME
from xipfs.units import PAGE_SIZE

EVENTS_MAX: Final = 4096
#: Runs of pages and origins of all events in the ring: 18 MB at most, beside 6 MB of events.
PARTS_MAX: Final = 65_536
#: Files and processes in a snapshot by themselves: those that moved most; the rest is summed up.
#: Of pages OpenMetrics has as many.
LINES_SHOWN: Final = 50
#: The reason of what no policy asked for.
MANUAL: Final = "manual"
#: Causes that refaults are counted by.
CAUSES_MAX: Final = 1024
PINGPONG_NS: Final = 10_000_000_000
#: The steps of the protocol whose duration is told (fuse/migration.py), in their order.
STEPS: Final = ("invalidate", "drain", "move", "invalidate_again")
#: What ``move`` consists of (fs/moving.py).
PARTS_OF_MOVE: Final = ("unmap", "copy", "commit", "drop")


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


Origin = tuple[str | None, str, int]
"""Policy (None: by hand), reason, and the process whose touch earned it (0: none)."""


@dataclass
class ChunkEvent:
    """One chunk of a migration; ``durations_ns`` by step, each the sum over all passes.

    ``move`` is followed by its parts, which make it up but for the calls between them.

    ``policy`` is the one that planned the first page, None if somebody asked for it by hand, and
    ``reason`` all reasons in one text; ``by`` tells what each origin has of the chunk, and is
    counted together with the tables. ``moved_runs`` are the pages that moved, (first, count), in
    the order in which they did. Under ``dry`` nothing moved, ``would_move`` counts the pages, and
    ``by`` names their one origin.

    A chunk by hand has up to 8,192 pages, hence runs, and one origin; one of a policy has up to
    512 pages, and each may have an origin of its own. An event takes 1.5 KB, a run of pages 65
    bytes more, an origin up to 280.
    """

    time_ns: int
    ino: int
    first: int
    last: int
    to: str
    reason: str
    policy: str | None = None
    dry: bool = False
    would_move: int = 0
    moved: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    ram_pages_used: int = 0
    durations_ns: dict[str, int] = field(default_factory=dict)
    moved_runs: list[tuple[int, int]] = field(default_factory=list)
    by: dict[Origin, MoveCounts] = field(default_factory=dict)

    def add(self, pages: Sequence[int]) -> None:
        """Add pages, which ascend, that have moved."""
        self.moved += len(pages)
        if len(pages) == pages[-1] + 1 - pages[0]:
            self.moved_runs.append((pages[0], len(pages)))
        else:
            found = runs([(self.ino, page) for page in pages])
            self.moved_runs += [(first, count) for _, first, count in found]

    def line(self, origin: Origin) -> MoveCounts:
        """Return what ``origin`` has of the chunk, to be changed."""
        counts = self.by.get(origin)
        if counts is None:
            counts = self.by[origin] = MoveCounts()
        return counts

    def nr_parts(self) -> int:
        """Return how many parts of unlimited number it has."""
        return len(self.moved_runs) + len(self.by)

    def describe(self) -> dict[str, Any]:
        """Return it as ``xipfs events --json`` tells it."""
        pingpong = sum(counts.pingpong for counts in self.by.values())
        by = [
            {
                **dict(zip(("policy", "reason", "pid"), origin, strict=True)),
                "moved": counts.moved(),
                "failed": counts.failed,
                "pingpong": counts.pingpong,
            }
            for origin, counts in self.by.items()
        ]
        return {
            **vars(self),
            "moved_bytes": self.moved * PAGE_SIZE,
            "pingpong": pingpong,
            "by": by,
        }


_Cause = tuple[str | None, str, str]
"""Policy (None: by hand), reason and new kind."""


def _counted(values: Ints) -> tuple[list[int], list[int]]:
    """Return the different ``values`` and how often each is there; the one met last comes last."""
    different, last, counts = np.unique(values[::-1], return_index=True, return_counts=True)
    order = np.argsort(-last)
    return different[order].tolist(), counts[order].tolist()


class History:
    """The migrations of one mount since it was mounted."""

    def __init__(self) -> None:
        self._steps = {step: Histogram() for step in STEPS + PARTS_OF_MOVE}
        self._events: deque[ChunkEvent] = deque()
        self._parts = 0
        self.pages = PageMoves(PINGPONG_NS)
        self.causes: Table[_Cause] = Table()
        self._cause_numbers: dict[_Cause, int] = {}
        self._causes: list[_Cause] = [(None, "(others)", "")]
        self.files: Table[int] = Table()
        self.processes: Table[int] = Table()
        #: Told each group of pages that moved: inode, indexes, new kind, time.
        self.on_moved: Callable[[int, Sequence[int], PageKind, int], None] | None = None
        self._chunks = 0
        self.recorded = 0
        self.refaults = 0
        self.pingpong = 0

    @staticmethod
    def _by_origin(
        pages: Sequence[int], moves: Mapping[int, Move]
    ) -> Iterable[tuple[Origin, Sequence[int]]]:
        if not moves:
            return [((None, MANUAL, 0), pages)]
        groups: dict[Origin, list[int]] = {}
        for index in pages:
            move = moves[index]
            groups.setdefault((move.policy, move.reason, move.pid), []).append(index)
        return groups.items()

    def _lines(
        self, ino: int, cause: _Cause, origin: Origin, event: ChunkEvent | None
    ) -> list[MoveCounts]:
        """Return all lines in which moves of ``origin`` count."""
        lines = [self.files.line(ino), self.causes.line(cause), self.processes.line(origin[2])]
        if event is not None:
            lines.append(event.line(origin))
        return lines

    def moved(
        self,
        ino: int,
        pages: Sequence[int],
        to: PageKind,
        now_ns: int,
        moves: Mapping[int, Move] = BY_HAND,
        event: ChunkEvent | None = None,
    ) -> None:
        """Remember pages that have moved just now; ``moves``: as a policy planned each of them.

        ``event`` is the one of their chunk, to be told of them.
        """
        if not pages:
            return
        for origin, group in self._by_origin(pages, moves):
            cause = (origin[0], origin[1], to.value)
            pingpong = self.pages.moved(ino, group, to, now_ns, self._number_of(cause))
            self.pingpong += pingpong
            for line in self._lines(ino, cause, origin, event):
                line.add(to, len(group))
                line.pingpong += pingpong
        if event is not None:
            event.add(pages)
        if self.on_moved is not None:
            self.on_moved(ino, pages, to, now_ns)

    def _number_of(self, cause: _Cause) -> int:
        """Return the cause's number; 0 stands for all causes that come too late."""
        if cause not in self._cause_numbers:
            if len(self._causes) == CAUSES_MAX:
                return 0
            self._cause_numbers[cause] = len(self._causes)
            self._causes.append(cause)
        return self._cause_numbers[cause]

    def refused(
        self,
        ino: int,
        pages: Sequence[int],
        to: PageKind,
        moves: Mapping[int, Move] = BY_HAND,
        event: ChunkEvent | None = None,
    ) -> None:
        """Remember pages that were given up; ``moves`` and ``event`` as for ``moved``."""
        self.pages.failed(ino, pages)
        for origin, group in self._by_origin(pages, moves):
            for line in self._lines(ino, (origin[0], origin[1], to.value), origin, event):
                line.failed += len(group)

    def charged(self, charges: ChargeBatch | Iterable[Charge]) -> None:
        """Look for faults of pages that have moved before; hint faults are no program's own."""
        if isinstance(charges, ChargeBatch):
            self._charged_many(charges)
            return
        for charge in charges:
            if charge.hint:
                continue
            number = self.pages.faulted(charge.ino, charge.page, charge.time_ns)
            if number is not None:
                self._refaulted(self.files, charge.ino, 1)
                self._refaulted(self.processes, charge.pid, 1)
                self._refaulted(self.causes, self._causes[number], 1)
                self.refaults += 1

    def _charged_many(self, charges: ChargeBatch) -> None:
        if not self.pages.nr_fresh:
            return
        own = np.ones(len(charges), bool)
        for place, charge in charges.by_hand.items():
            own[place] = not charge.hint
        cells = charges.cells[own]
        which, causes = self.pages.faulted_many(cells[:, INO], cells[:, INDEX], cells[:, TIME])
        self.refaults += which.size
        for ino, count in zip(*_counted(cells[which, INO]), strict=True):
            self._refaulted(self.files, ino, count)
        for pid, count in zip(*_counted(cells[which, PID]), strict=True):
            self._refaulted(self.processes, pid, count)
        for number, count in zip(*_counted(causes), strict=True):
            self._refaulted(self.causes, self._causes[number], count)

    @staticmethod
    def _refaulted(table: Table[Key], key: Key, count: int) -> None:
        table.line(key).refaults += count

    def record(self, event: ChunkEvent) -> None:
        """Add the event of a chunk that is over."""
        for step, duration_ns in event.durations_ns.items():
            self._steps[step].add(duration_ns)
        self._add(event)
        self._chunks += 1

    def _add(self, event: ChunkEvent) -> None:
        self._events.append(event)
        self._parts += event.nr_parts()
        self.recorded += 1
        while len(self._events) > EVENTS_MAX or self._parts > PARTS_MAX:
            self._parts -= self._events.popleft().nr_parts()

    def would(self, time_ns: int, moves: list[Move]) -> None:
        """Add events of what a dry policy would have moved at one signal; nothing is counted."""
        for move in sorted(moves, key=lambda move: (move.to.value, move.ino, move.index)):
            last = self._events[-1] if self._events else None
            origin = (move.policy, move.reason, move.pid)
            key = (time_ns, move.ino, move.to.value)
            if (
                last is not None
                and last.dry
                and key == (last.time_ns, last.ino, last.to)
                and origin in last.by
                and move.index == last.last + 1
            ):
                last.last += 1
                last.would_move += 1
                continue
            ino, index, to = move.ino, move.index, move.to.value
            event = ChunkEvent(time_ns, ino, index, index, to, move.reason, move.policy, dry=True)
            event.would_move = 1
            event.line(origin)
            self._add(event)

    def since(self, number: int) -> tuple[list[ChunkEvent], int, int]:
        """Return the events from ``number`` on, how many of them the ring lost, the next number."""
        oldest = self.recorded - len(self._events)
        lost = max(oldest - number, 0)
        return list(self._events)[max(number - oldest, 0) :], lost, self.recorded

    def describe(self) -> dict[str, Any]:
        """Return the figures as they stand in ``stats.json``."""
        return {
            "moved_bytes": self.files.total().describe()["moved_bytes"],
            "refaults": self.refaults,
            "pingpong": self.pingpong,
            "pingpong_window_ns": PINGPONG_NS,
            "by_cause": self.causes.describe(("policy", "reason", "to")),
            "by_file": self.files.describe(("ino",), LINES_SHOWN),
            "by_file_left_off": self.files.left_off(LINES_SHOWN),
            "by_process": self.processes.describe(("pid",), LINES_SHOWN),
            "by_process_left_off": self.processes.left_off(LINES_SHOWN),
            "pages_forgotten": self.pages.forgotten,
            "chunks": self._chunks,
            "step_ns": {step: each.describe() for step, each in self._steps.items()},
        }
