"""Which pages of the mount's files the kernel's page cache holds, and since when.

Kept as page tables are, by page number in place of the address, so that compiled code reads them:
8 bytes a page, in leaves of 512. An entry is 0 (not cached), 1 (surely uptodate), the time in ns
at which the page was added, or -1 (ABSENT).

When records were lost, pages may have come and gone unseen: 0 says nothing any more from then on
(``whole`` is false), and ABSENT says that a page was seen to go since.

Fault-around maps a cached page only if it is uptodate. It surely is once a fault on it was over,
or a READ of it or a WRITE of the whole page was answered, and if nobody has asked us for it
``SETTLED_NS`` after it was added. A WRITE of a part may leave it cached but not uptodate.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from xipfs.accounting.kernel_states import (
    FILE,
    IN_FLIGHT,
    IN_PART,
    LOST,
    NONE,
    READAHEAD,
    SETTLED_NS,
)
from xipfs.mm.pte import PageTables
from xipfs.mm.table_pool import TablePool
from xipfs.units import PAGE_SHIFT

SETTLED: Final = 1
ABSENT: Final = -1
_END: Final = 1 << 62
#: A thread whose READ was answered has a processor after this time, on a busy machine too.
_WOKEN_NS: Final = 20_000_000


class CachedPages:
    """The cached pages of all files; their tables lie in ``pool``.

    ``readahead``: the kernel may mark pages for read-ahead, which fault-around passes over.
    """

    def __init__(self, pool: TablePool, *, readahead: bool) -> None:
        self.readahead = readahead
        self._pool = pool
        self.tables: dict[int, PageTables] = {}
        #: Of the entries above 0.
        self._counts: dict[int, int] = {}
        self.whole = True
        #: When a request for a page was answered last; below 0: a WRITE of a part of it.
        self._answered: dict[tuple[int, int], int] = {}
        self._answers: deque[tuple[int, int, int]] = deque()

    def _entry(self, ino: int, index: int) -> int:
        tables = self.tables.get(ino)
        return 0 if tables is None else tables.get(index << PAGE_SHIFT)

    def get(self, ino: int, index: int) -> int | None:
        """Return when the page was added, 0 if it is surely uptodate, None if it is not cached."""
        entry = self._entry(ino, index)
        return None if entry <= 0 else 0 if entry == SETTLED else entry

    def unsure(self, ino: int, index: int) -> bool:
        """Return whether nothing tells if the page, for which ``get`` returns None, is cached."""
        return not self.whole and self._entry(ino, index) == 0

    def is_fresh(self, ino: int, index: int, now_ns: int) -> bool:
        """Return whether the page was added so lately that it may be locked for its READ still.

        The thread that reads it unlocks it, once it has been woken by our answer.
        """
        added_ns = self.get(ino, index)
        return added_ns is not None and added_ns > 0 and now_ns - added_ns < _WOKEN_NS

    def in_window(self, ino: int, index: int, now_ns: int) -> int:
        """Return what a fault-around at ``now_ns`` made of a page that was not mapped.

        NONE where it is not cached, FILE where it surely is uptodate too, else why that is unknown.
        """
        added_ns = self.get(ino, index)
        if added_ns is None:
            return LOST if self.unsure(ino, index) else NONE
        if not added_ns:
            return FILE
        if self.readahead:
            return READAHEAD
        answered_ns = self._answered.get((ino, index), 0)
        if answered_ns < 0:
            return IN_PART
        sure = added_ns < answered_ns < now_ns or now_ns - added_ns >= SETTLED_NS
        return FILE if sure else IN_FLIGHT

    def answered(self, ino: int, pages: range, time_ns: int, *, whole: bool = True) -> None:
        """Our answer to a READ or WRITE of ``pages`` was out before ``time_ns``.

        Answers come before the events around them. They are remembered for ``SETTLED_NS``, after
        which the age of a page says as much; a WRITE of a part (not ``whole``), until its page goes
        or is known otherwise.
        """
        for index in pages:
            if whole:
                self._answered[ino, index] = time_ns
                self._answers.append((time_ns, ino, index))
            elif self.get(ino, index) != 0:
                self._answered.setdefault((ino, index), -time_ns)
        while self._answers and time_ns - self._answers[0][0] > SETTLED_NS:
            answered_ns, old_ino, old_index = self._answers.popleft()
            if self._answered.get((old_ino, old_index)) == answered_ns:
                del self._answered[old_ino, old_index]
                added_ns = self.get(old_ino, old_index)
                if added_ns is not None and added_ns < answered_ns:
                    self.settle(old_ino, old_index)

    def add(self, ino: int, index: int, time_ns: int) -> None:
        """The page was added at ``time_ns``."""
        self._store(ino, index, max(time_ns, SETTLED + 1))

    def settle(self, ino: int, index: int) -> None:
        """The page is cached, and surely uptodate from now on."""
        self._store(ino, index, SETTLED)
        self._answered.pop((ino, index), None)

    def _store(self, ino: int, index: int, entry: int) -> None:
        tables = self.tables.get(ino)
        if tables is None:
            tables = self.tables[ino] = PageTables(self._pool)
            self._counts[ino] = 0
        self._counts[ino] += tables.get(index << PAGE_SHIFT) <= 0
        tables.set(index << PAGE_SHIFT, entry)

    def remove(self, ino: int, index: int) -> None:
        """The page is not cached any more, if it was."""
        if self._answered.get((ino, index), 0) < 0:
            del self._answered[ino, index]
        if self._entry(ino, index) <= 0:
            return
        self.tables[ino].set(index << PAGE_SHIFT, 0 if self.whole else ABSENT)
        self._counts[ino] -= 1
        if not self._counts[ino]:
            # What is ABSENT is not known any more then; a file that is gone leaves nothing behind.
            self._drop(ino)

    def lost(self) -> None:
        """Pages may have come and gone unseen."""
        self.whole = False
        for ino in list(self.tables):
            self._drop(ino)

    def _drop(self, ino: int) -> None:
        tables = self.tables.pop(ino)
        if not self.whole:
            tables.replace(0, _END, 0)
        tables.free(0, _END)
        del self._counts[ino]
