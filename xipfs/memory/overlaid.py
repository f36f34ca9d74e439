"""A medium that may not be written, with some of its bytes shown as they would be written.

An image whose journal holds a pending transaction is what that transaction makes of it. Who may not
finish it (a read-only mount, a check) reads through this instead, structures and file data alike,
and so sees what a mount that finishes it would see.
"""

from __future__ import annotations

from collections.abc import Sequence

from xipfs.memory.region import Buffer, Medium, RegionStatistics
from xipfs.memory.wear import Wear
from xipfs.units import PAGE_SHIFT, PAGE_SIZE


class Overlaid:
    """``medium`` with ``records`` laid over it: offset and bytes, each within a page.

    Memory: the pages that they lie in.
    """

    def __init__(self, medium: Medium, records: Sequence[tuple[int, bytes]]) -> None:
        self._medium = medium
        self._pages: dict[int, bytearray] = {}
        for offset, data in records:
            number, start = divmod(offset, PAGE_SIZE)
            assert start + len(data) <= PAGE_SIZE, (offset, len(data))
            self._page(number)[start : start + len(data)] = data

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            page = bytearray(self._medium.load(number << PAGE_SHIFT, PAGE_SIZE))
            self._pages[number] = page
        return page

    @property
    def size_bytes(self) -> int:
        """How many bytes the medium holds."""
        return self._medium.size_bytes

    @property
    def writable(self) -> bool:
        """Never."""
        return False

    @property
    def wear(self) -> Wear:
        """How often each block was written."""
        return self._medium.wear

    def load(self, offset: int, size: int) -> memoryview:
        """Return a read-only view of ``size`` bytes at ``offset``; a copy where records are."""
        pages = range(offset >> PAGE_SHIFT, (offset + size - 1 >> PAGE_SHIFT) + 1)
        few, many = (pages, self._pages) if len(pages) < len(self._pages) else (self._pages, pages)
        met = [number for number in few if number in many]
        if not met:
            return self._medium.load(offset, size)
        if len(pages) == 1:
            start = offset & PAGE_SIZE - 1
            return memoryview(self._pages[met[0]]).toreadonly()[start : start + size]
        base = pages.start << PAGE_SHIFT
        shown = bytearray(self._medium.load(base, len(pages) << PAGE_SHIFT))
        for number in met:
            at = (number << PAGE_SHIFT) - base
            shown[at : at + PAGE_SIZE] = self._pages[number]
        return memoryview(shown).toreadonly()[offset - base : offset - base + size]

    def reserve(self, offset: int, size: int) -> None:
        """Do nothing: there will be no store."""

    def store(self, offset: int, data: Buffer) -> None:
        """Refuse."""
        raise AssertionError(f"a store of {len(data)} bytes at {offset} of a read-only medium")

    def store_word(self, offset: int, value: int) -> None:
        """Refuse."""
        raise AssertionError(f"a store of {value:#x} at {offset} of a read-only medium")

    def flush(self, offset: int, size: int) -> None:
        """Do nothing: nothing was stored."""

    def fence(self) -> None:
        """Do nothing: nothing was stored."""

    def sync(self) -> None:
        """Do nothing: nothing was stored."""

    def close(self) -> None:
        """Give the medium up."""
        self._medium.close()

    def statistics(self) -> RegionStatistics:
        """Return the figures since the medium was opened."""
        return self._medium.statistics()
