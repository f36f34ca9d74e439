"""One path for every migration, by hand or by policy: decide per page, move, count the outcome.

The engine is synchronous and atomic: no await separates the check of a page from its commit. What
must come before (the kernel's invalidation, the drained observer) and after is
fuse/migration.py's. Counter names are those of /proc/vmstat.
"""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from xipfs.fs.filesystem import Filesystem
from xipfs.fs.moving import Moved
from xipfs.fs.types import PageKind

#: Why a page was not moved, by the errno that says so.
REASONS: Final = {
    errno.EAGAIN: "pinned",
    errno.ENOMEM: "no_ram",
}
#: How often a pinned page is tried before it counts as refused: NR_MAX_MIGRATE_PAGES_RETRY of
#: Linux 6.3 and later (mm/migrate.c; the same 10 passes stand there as a number in 6.1).
PASSES_MAX: Final = 10


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

    def needing_move(self, ino: int, pages: range, to: PageKind) -> list[int]:
        """Return those of ``pages`` that are no holes and not of kind ``to``."""
        return self._fs.wanted(ino, pages, to)

    def pages_with_bytes(self, ino: int, pages: range) -> list[range]:
        """Return the runs of ``pages`` that are no holes: only these can move."""
        return list(self._fs.runs_with_bytes(ino, pages))

    def move_pages(self, ino: int, pages: range, to: PageKind) -> Moved:
        """Move ``pages`` to kind ``to``; what is refused stays exactly as it was.

        Moved pages are counted here, refused ones by ``give_up``: a pinned page may be tried again.
        """
        result = self._fs.move(ino, pages, to)
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
