"""One path for every migration, by hand or by policy: decide per page, move, count the outcome.

The engine is synchronous and atomic: no await separates the check of a page from its commit. What
must come before (the kernel's invalidation, the drained observer) and after is
fuse/migration.py's. Counter names are those of /proc/vmstat.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from xipfs.errors import XipfsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

#: Why a page was not moved, by the errno that says so.
REASONS: Final = {
    errno.EAGAIN: "pinned",
    errno.ENOMEM: "no_ram",
    errno.ENOSPC: "no_space",
    errno.EROFS: "read_only",
}


@dataclass(frozen=True)
class Move:
    """One page that a policy wants moved, and why."""

    ino: int
    index: int
    to: PageKind
    reason: str


@dataclass(frozen=True)
class Tally:
    """The outcome of a migration, in pages."""

    moved: int = 0
    already: int = 0
    failed: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        failed = Counter(self.failed) + Counter(other.failed)
        return Tally(self.moved + other.moved, self.already + other.already, dict(failed))


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

    def needing_move(self, ino: int, pages: Iterable[int], to: PageKind) -> list[int]:
        """Return those of ``pages`` that are no holes and not of kind ``to``."""
        kinds = ((index, self._fs.page(ino, index).kind) for index in pages)
        return [index for index, kind in kinds if kind not in (PageKind.HOLE, to)]

    def pages_with_bytes(self, ino: int, pages: range) -> list[range]:
        """Return the runs of ``pages`` that are no holes: only these can move."""
        runs = []
        for run in self._fs.runs(ino):
            first, stop = max(run.first, pages.start), min(run.first + run.count, pages.stop)
            if run.kind is not PageKind.HOLE and first < stop:
                runs.append(range(first, stop))
        return runs

    def move_pages(self, ino: int, pages: Iterable[int], to: PageKind) -> Tally:
        """Move each of ``pages`` to kind ``to``; a page that is refused stays exactly as it was."""
        moved = already = 0
        failed: Counter[str] = Counter()
        for index in pages:
            kind = self._fs.page(ino, index).kind
            if kind is PageKind.HOLE:
                continue
            if kind is to:
                already += 1
                continue
            try:
                self._move(ino, index, to)
            except XipfsError as error:
                if error.errno not in REASONS:
                    raise
                failed[REASONS[error.errno]] += 1
            else:
                moved += 1
        self._failed += failed
        return Tally(moved, already, dict(failed))

    def _move(self, ino: int, index: int, to: PageKind) -> None:
        if to is PageKind.PAGECACHE:
            self._fs.promote(ino, index)
            self._promoted += 1
        else:
            self._fs.demote(ino, index)
            self._demoted += 1
