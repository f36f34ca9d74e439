"""Where a file's page lies in an address space, and which pages a fault-around can have tried."""

from __future__ import annotations

from typing import Final

from xipfs.trace import events
from xipfs.trace.fault_batch import NO_WINDOW
from xipfs.trace.threads import Space, Thread
from xipfs.trace.vmas import Vma
from xipfs.units import PAGE_MASK, PAGE_SHIFT

_PTRS_PER_PTE: Final = 512


class Windows:
    """Fault-around of up to ``pages`` pages at once."""

    def __init__(self, pages: int) -> None:
        self._pages = pages

    def page_at(
        self, vma: Vma, address: int, index: int | None, first: int, last: int
    ) -> int | None:
        """Return the page that ``vma`` maps at ``address``; None when the record contradicts.

        Completes the offset of a mapping that exec made.
        """
        if vma.pgoff is None:
            page = index if index is not None else self._index(vma, address, first)
            pgoff = page - (((address & PAGE_MASK) - vma.start) >> PAGE_SHIFT)
            if pgoff < 0:
                return None
            vma.pgoff = pgoff
            return page
        page = vma.index_at(address)
        if index is not None:
            return page if page == index else None
        return page if self.holds(page, first, last) else None

    def holds(self, page: int, first: int, last: int) -> bool:
        """Tell whether a fault on ``page`` can have tried to map ``first..last``.

        The record's range ends with the file (filemap_map_pages, 6.18), so for a fault past the end
        it lies below the faulting page, or is empty.
        """
        return first <= page < max(last + 1, first + self._pages)

    def _index(self, vma: Vma, address: int, first: int) -> int:
        """Return the faulting page, given the first page of its fault-around (do_fault_around)."""
        offset = (address >> PAGE_SHIFT) % _PTRS_PER_PTE
        vma_offset = ((address & PAGE_MASK) - vma.start) >> PAGE_SHIFT
        aligned = offset - offset % self._pages
        return first + offset - max(aligned, offset - min(offset, vma_offset))


def mapped_at(space: Space, ino: int, index: int, lowest: int = 0) -> tuple[Vma, int] | None:
    """Return a mapping of page ``index`` of ``ino`` at or above address ``lowest``."""
    for vma in space.vmas:
        if vma.ino == ino and vma.end > lowest:
            address = vma.address_of(index)
            if address is not None and address >= lowest:
                return vma, address
    return None


def elsewhere(space: Space, ino: int, page: int, taken: Vma) -> bool:
    """Tell whether other mappings may hold the page as well; what they hold is not known."""
    found = False
    for vma in space.vmas:
        if vma.ino in (None, ino) and vma.address_of(page) is not None and vma is not taken:
            vma.fresh, found = False, True
    return found


def plain_window(thread: Thread) -> tuple[int, int] | None:
    """Return the pages of a plain fault's fault-around; None where the fault is not plain.

    That is as in ``plain_loop``, whose faults this one then goes with.
    """
    if thread.pf_origin != events.TRAP or thread.pf_signal or thread.pf_address >> 63:
        return None
    if not thread.pf_arounds:
        return NO_WINDOW
    first, last = thread.pf_arounds[0]
    start = (thread.pf_address & PAGE_MASK) + (first - thread.pf_index << PAGE_SHIFT)
    vma = thread.space.vmas.find(start)
    if vma is None or not vma.told or start + (last - first + 1 << PAGE_SHIFT) > vma.end:
        return None
    return (first, last) if len(thread.pf_arounds) == 1 else None
