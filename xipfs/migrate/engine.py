"""One path for every migration, by hand or by policy: decide per page, move, count the outcome.

The engine is synchronous and atomic: no await separates the check of a page from its commit. What
must come before (the kernel's invalidation, the drained observer) and after is
fuse/migration.py's. Counter names are those of /proc/vmstat.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from xipfs.fs.filesystem import Filesystem
from xipfs.fs.moving import Moved
from xipfs.fs.types import PageKind
from xipfs.migrate.policy import Move
from xipfs.migrate.refusals import errnos_of

#: Pages of one step of a migration, which bounds the time for which other requests wait: while
#: there are any, and while there are none.
CHUNK_PAGES: Final = 512
IDLE_PAGES: Final = 16 * CHUNK_PAGES


@dataclass(frozen=True)
class Tally:
    """The outcome of a migration, in pages."""

    moved: int = 0
    already: int = 0
    failed: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        failed = self.failed or other.failed
        if self.failed and other.failed:
            failed = dict(Counter(self.failed) + Counter(other.failed))
        return Tally(self.moved + other.moved, self.already + other.already, failed)

    def describe(self) -> dict[str, Any]:
        """Return the outcome as a request is answered; ``failed_errno`` by the same reasons."""
        return {**vars(self), "failed_errno": errnos_of(self.failed)}


@dataclass(frozen=True)
class EngineStatistics:
    """Pages moved and refused since the mount, in total and by reason."""

    pgmigrate_success: int
    pgmigrate_fail: int
    pgpromote_success: int
    pgdemote_success: int
    fail_reasons: dict[str, int]

    def totals(self) -> dict[str, int]:
        """Return the counters that go into ``vmstat``."""
        return {name: count for name, count in vars(self).items() if name != "fail_reasons"}


class Engine:
    """Moves pages of one filesystem and counts."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._promoted = 0
        self._demoted = 0
        self._failed: Counter[str] = Counter()

    def statistics(self) -> EngineStatistics:
        """Return the totals."""
        return EngineStatistics(
            pgmigrate_success=self._promoted + self._demoted,
            pgmigrate_fail=self._failed.total(),
            pgpromote_success=self._promoted,
            pgdemote_success=self._demoted,
            fail_reasons=dict(self._failed),
        )

    def needing_move(self, ino: int, pages: range, to: PageKind) -> list[int]:
        """Return those of ``pages`` that are no holes and not of kind ``to``."""
        return self._fs.wanted(ino, pages, to)

    def pages_with_bytes(self, ino: int, pages: range) -> list[range]:
        """Return the runs of ``pages`` that are no holes: only these can move."""
        return list(self._fs.runs_with_bytes(ino, pages))

    def move_pages(
        self, ino: int, pages: range, to: PageKind, in_use: frozenset[int] | set[int] = frozenset()
    ) -> Moved:
        """Move ``pages`` to kind ``to``; what is refused stays exactly as it was.

        Pages that are ``in_use`` are refused (EBUSY).

        Moved pages are counted here, refused ones by ``give_up``: a pinned page may be tried again.
        """
        result, at = Moved(), pages.start
        for stop in [*sorted(page for page in in_use if page in pages), pages.stop]:
            if at < stop:
                result.add(self._fs.move(ino, range(at, stop), to))
            if stop < pages.stop:
                result.refuse(errno.EBUSY, self.needing_move(ino, range(stop, stop + 1), to))
            at = stop + 1
        if to is PageKind.PAGECACHE:
            self._promoted += len(result.moved)
        else:
            self._demoted += len(result.moved)
        return result

    def ram_pages_used(self) -> int:
        """Return how many page-cache frames are in use."""
        return self._fs.nr_resident_pages

    def give_up(self, reason: str, count: int) -> None:
        """Count pages that were refused for good."""
        self._failed[reason] += count


#: What no policy planned: somebody asked for it by hand.
BY_HAND: Final[Mapping[int, Move]] = MappingProxyType({})


class Job(NamedTuple):
    """Pages of one file to be moved; ``moves`` are those of the policy that planned it, by page."""

    ino: int
    pages: range
    to: PageKind
    why: str
    moves: Mapping[int, Move] = BY_HAND


def jobs_of(moves: Iterable[Move]) -> list[Job]:
    """Return a plan as jobs of at most a chunk; neighbours move together.

    What is demoted makes room for what is promoted, so it comes first.
    """
    plan, jobs = list(moves), []
    for to in (PageKind.XIP, PageKind.PAGECACHE):
        planned = {(move.ino, move.index): move for move in plan if move.to is to}
        for ino, first, count in runs(sorted(planned)):
            for chunk in cut(range(first, first + count), CHUNK_PAGES):
                of_chunk = {index: planned[ino, index] for index in chunk}
                why = ", ".join(sorted({move.reason for move in of_chunk.values()}))
                jobs.append(Job(ino, chunk, to, why, of_chunk))
    return jobs


def cut(pages: range, size: int) -> list[range]:
    """Cut ``pages`` into pieces of ``size``, the last maybe smaller.

    >>> cut(range(3, 8), 4)
    [range(3, 7), range(7, 8)]
    """
    return [range(at, min(at + size, pages.stop)) for at in range(pages.start, pages.stop, size)]


def runs(pages: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Merge sorted (ino, index) pairs into (ino, first, count) runs.

    >>> runs([(2, 5), (2, 6), (2, 9), (3, 10)])
    [(2, 5, 2), (2, 9, 1), (3, 10, 1)]
    """
    merged: list[tuple[int, int, int]] = []
    for ino, index in pages:
        if merged and merged[-1][0] == ino and merged[-1][1] + merged[-1][2] == index:
            merged[-1] = (ino, merged[-1][1], merged[-1][2] + 1)
        else:
            merged.append((ino, index, 1))
    return merged
