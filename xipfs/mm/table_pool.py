"""The memory of page tables: pages of 512 entries, of all address spaces of one machine.

They lie in one array, so that compiled code can walk from any address space's tables with nothing
but an index, and so that ten million PTEs are ten million times eight bytes and not objects. The
array doubles when it is full: ``entries`` and ``array`` are then replaced, and whoever kept one
of them looks at memory that nobody changes any more. Take them afresh after any call that may
have made a table.

Page 0 is never handed out and stays zero. An empty upper entry is 0 as well, so a walk that goes
through an absent table reads an empty PTE from page 0 without asking.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.memory.frames import FreeList

PTRS_PER_TABLE: Final = 512
_FIRST_PAGES: Final = 16


class TablePool:
    """Page-table pages: ``array`` int64[pages * 512], ``entries`` a memoryview of it.

    One element of a memoryview is read several times faster than one of a numpy array.

    >>> pool = TablePool()
    >>> page = pool.take()
    >>> page, pool.entries[page]
    (512, 0)
    >>> pool.give_back(page)
    >>> pool.used_bytes()
    0
    """

    __slots__ = ("array", "entries", "free")

    def __init__(self) -> None:
        self.array: npt.NDArray[np.int64] = np.zeros(_FIRST_PAGES * PTRS_PER_TABLE, np.int64)
        self.entries: memoryview[int] = self.array.data
        #: Numbers of the free pages; page 0 is not among them.
        self.free = FreeList(1, _FIRST_PAGES - 1)

    def take(self) -> int:
        """Return the index of the first entry of an empty page."""
        page = self.free.pop()
        if page is None:
            self.grow()
            page = self.free.pop()
            assert page is not None
        return page * PTRS_PER_TABLE

    def give_back(self, first: int) -> None:
        """Take back the page whose first entry is ``first``; it must be empty."""
        assert first > 0, first
        self.free.push(first // PTRS_PER_TABLE)

    def grow(self) -> None:
        """Double the array. What was taken keeps its index."""
        pages = len(self.array) // PTRS_PER_TABLE
        larger = np.zeros(2 * len(self.array), np.int64)
        larger[: len(self.array)] = self.array
        self.array = larger
        self.entries = larger.data
        self.free.extend(pages)

    def used_bytes(self) -> int:
        """Return how many bytes of page tables are in use (the pool may hold more)."""
        return (len(self.array) // PTRS_PER_TABLE - 1 - len(self.free)) * PTRS_PER_TABLE * 8
