"""Which pages of the mount's files the kernel's page cache holds, and since when.

Kept as page tables are, by page number in place of the address, so that compiled code reads them:
8 bytes a page, in leaves of 512. An entry is 0 (not cached), 1 (surely uptodate) or the time in ns
at which the page was added.
"""

from __future__ import annotations

from typing import Final

from xipfs.mm.pte import PageTables
from xipfs.mm.table_pool import TablePool
from xipfs.units import PAGE_SHIFT

SETTLED: Final = 1
_END: Final = 1 << 62


class CachedPages:
    """The cached pages of all files; their tables lie in ``pool``."""

    def __init__(self, pool: TablePool) -> None:
        self._pool = pool
        self.tables: dict[int, PageTables] = {}
        self._counts: dict[int, int] = {}

    def get(self, ino: int, index: int) -> int | None:
        """Return when the page was added, 0 if it is surely uptodate, None if it is not cached."""
        tables = self.tables.get(ino)
        entry = 0 if tables is None else tables.get(index << PAGE_SHIFT)
        return None if not entry else 0 if entry == SETTLED else entry

    def add(self, ino: int, index: int, time_ns: int) -> None:
        """The page was added at ``time_ns``."""
        tables = self.tables.get(ino)
        if tables is None:
            tables = self.tables[ino] = PageTables(self._pool)
            self._counts[ino] = 0
        self._counts[ino] += not tables.get(index << PAGE_SHIFT)
        tables.set(index << PAGE_SHIFT, max(time_ns, SETTLED + 1))

    def settle(self, ino: int, index: int) -> None:
        """The page, which is cached, is surely uptodate from now on."""
        assert self.get(ino, index) is not None, (ino, index)
        self.tables[ino].set(index << PAGE_SHIFT, SETTLED)

    def remove(self, ino: int, index: int) -> None:
        """The page is not cached any more, if it was."""
        if self.get(ino, index) is None:
            return
        tables = self.tables[ino]
        tables.set(index << PAGE_SHIFT, 0)
        self._counts[ino] -= 1
        if not self._counts[ino]:
            tables.free(0, _END)
            del self.tables[ino], self._counts[ino]
