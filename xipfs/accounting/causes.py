"""Which faults xipfs itself caused: by a move, an eviction or a hint it took the page away.

Every invalidation is told here with the time it took. A page that leaves the kernel's page cache in
that time left for us, and each PTE that the kernel had of it went with it: the next fault at that
address would not have come without us. A recording marks such faults, so that a replay under
another policy can leave them out and make its own.

Memory: 8 bytes for each of the newest ``PAGES_MAX`` pages taken away, one entry for each PTE.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from xipfs.accounting.kernel_ptes import KernelPtes
from xipfs.accounting.kernel_states import FILE
from xipfs.accounting.page_runs import PageRuns
from xipfs.mm.vma import MappedFile
from xipfs.trace.events import CacheDelete, Event
from xipfs.units import PAGE_SHIFT

MOVE: Final = "move"
EVICT: Final = "evict"
HINT: Final = "hint"
PAGES_MAX: Final = 1 << 16
_NOT_YET: Final = 1 << 63


@dataclass(slots=True)
class Invalidation:
    """One range that is being taken, or was taken, from the kernel; CLOCK_MONOTONIC."""

    cause: str
    began_ns: int
    ended_ns: int = _NOT_YET
    read: set[int] = field(default_factory=set)
    """Pages of it that the kernel has read again."""


class Causes:
    """The pages that were taken away and the addresses whose next fault is our doing."""

    def __init__(self) -> None:
        self._taken: PageRuns[Invalidation] = PageRuns(PAGES_MAX)
        self._marked: dict[int, dict[int, str]] = {}

    def begin(self, ino: int, first: int, count: int, cause: str, now_ns: int) -> Invalidation:
        """Hear that pages are about to be invalidated; the caller sets ``ended_ns``."""
        invalidation = Invalidation(cause, now_ns)
        self._taken.tell(ino, range(first, first + count), invalidation)
        return invalidation

    def of_event(self, event: Event) -> str:
        """Return the cause for which the kernel dropped pages, "" if not ours or another event."""
        if not isinstance(event, CacheDelete):
            return ""
        taken = self._taken.get(event.ino, event.first)
        if taken is None or not taken.began_ns <= event.time_ns <= taken.ended_ns:
            return ""
        return taken.cause

    def of_read(self, ino: int, first: int, last: int) -> str:
        """Return why the kernel reads these pages, if it had to since we took them; once."""
        causes = []
        for index in range(first, last + 1):
            taken = self._taken.get(ino, index)
            if taken is None or index in taken.read:
                causes.append("")
                continue
            causes.append(taken.cause)
            taken.read.add(index)
        return causes[0] if all(causes) else ""

    def deleted(self, event: CacheDelete, file: MappedFile, kernel: KernelPtes) -> None:
        """Mark where the kernel is about to lose a PTE of the file, if that is our doing."""
        cause = self.of_event(event)
        if not cause:
            return
        for vma in file.i_mmap.overlapping(event.first, event.first + event.pages):
            start = vma.address_of(max(event.first, vma.pgoff))
            end = vma.address_of(min(event.first + event.pages, vma.pgoff + vma.pages))
            assert isinstance(vma.mm.name, int)
            for address, state in kernel.populated(vma.mm.name, start, end):
                if state == FILE:
                    self._marked.setdefault(vma.mm.name, {})[address >> PAGE_SHIFT] = cause

    def marked_pages(self, mm: int) -> AbstractSet[int]:
        """Return the virtual pages of an address space whose next fault is our doing."""
        return self._marked.get(mm, {}).keys()

    def take(self, mm: int, address: int) -> str:
        """Return the cause of a fault there; it is known no more."""
        marked = self._marked.get(mm)
        return "" if marked is None else marked.pop(address >> PAGE_SHIFT, "")

    def forget(self, mm: int, start: int, end: int) -> None:
        """No fault of ours will come in [start, end): mapped anew, or not mapped any more."""
        marked = self._marked.get(mm)
        if not marked:
            return
        first, stop = start >> PAGE_SHIFT, end >> PAGE_SHIFT
        if stop - first < len(marked):
            for page in range(first, stop):
                marked.pop(page, None)
        else:
            for page in [page for page in marked if first <= page < stop]:
                del marked[page]

    def exit(self, mm: int) -> None:
        """The address space is gone."""
        self._marked.pop(mm, None)
