"""Hint faults: PTEs that xipfs itself took from the kernel to see whether they are used again.

A mapped page that is touched again makes no fault, so nothing tells hot pages from pages touched
once. NUMA balancing has the same problem and solves it by taking PTEs away, a few at a time, in
address order (task_numa_work, kernel/sched/fair.c, 6.12). Here the kernel's PTEs go by
invalidating the page; the model's stay, since the modelled machine lost nothing. The next real
fault at such an address then finds a PTE that lets it pass: a *hint fault*. It counts in
``pgfault_hint`` and in no other total.

A fault that the model's PTE does not let pass (a first write to a page mapped for reading) would
have come anyway and is charged as ever. A mark is gone with the first fault at its address, with
a fault-around that surely mapped it (no fault will come), and with its address space.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

from xipfs.memory.frames import PG_ANON
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import PTE_PRESENT
from xipfs.mm.vma import MappedFile, Vma
from xipfs.units import PAGE_SHIFT

Page = tuple[int, int]
"""Inode number and page index."""


class Hints:
    """Which PTEs are marked, by address space, and where the scan goes on.

    Memory: one address for each marked PTE.
    """

    def __init__(self) -> None:
        self._marked: dict[object, set[int]] = {}
        self._next: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return sum(map(len, self._marked.values()))

    def sample(self, mms: Mapping[int, MmStruct], count: int) -> list[Page]:
        """Return up to ``count`` mapped file pages, going on where the last scan ended.

        Address spaces take turns by number, pages within one by address. A page comes at most
        once a scan, however many map it; a scan ends where it began.
        """
        found: dict[Page, None] = {}
        for number, address, page in self._from_cursor(mms):
            if len(found) == count:
                self._next = (number, address)
                return list(found)
            found[page] = None
        self._next = (0, 0)
        return list(found)

    def _from_cursor(self, mms: Mapping[int, MmStruct]) -> Iterator[tuple[int, int, Page]]:
        numbers = sorted(mms)
        start_number, start_address = self._next
        at = bisect_left(numbers, start_number)
        for number in numbers[at:]:
            from_address = start_address if number == start_number else 0
            for vma in mms[number]:
                if vma.end > from_address:
                    for address in mapped_pages(vma, max(vma.start, from_address), vma.end):
                        yield number, address, _page_of(vma, address)

    def mark(self, file: MappedFile, index: int) -> None:
        """Expect a hint fault at every address that maps page ``index`` of ``file`` now."""
        for vma in file.i_mmap.overlapping(index, index + 1):
            address = vma.address_of(index)
            for _ in mapped_pages(vma, address, address + (1 << PAGE_SHIFT)):
                self._marked.setdefault(vma.mm.name, set()).add(address >> PAGE_SHIFT)

    def expect(self, mm: int, address: int) -> None:
        """Take the next fault at ``address`` for the answer to a hint."""
        self._marked.setdefault(mm, set()).add(address >> PAGE_SHIFT)

    def marked_pages(self, mm: int) -> AbstractSet[int]:
        """Return the virtual pages of an address space that are marked."""
        return self._marked.get(mm, set())

    def take(self, mm: int, address: int) -> bool:
        """Return whether the page at ``address`` was marked; it is no more."""
        marked = self._marked.get(mm)
        if marked is None or address >> PAGE_SHIFT not in marked:
            return False
        self.forget(mm, [address])
        return True

    def forget(self, mm: int, addresses: Iterable[int]) -> None:
        """Drop the marks of these pages: no fault will come for them."""
        marked = self._marked.get(mm)
        if marked is not None:
            marked.difference_update(address >> PAGE_SHIFT for address in addresses)
            if not marked:
                del self._marked[mm]

    def exit(self, mm: int) -> None:
        """Drop the marks of an address space."""
        self._marked.pop(mm, None)


def mapped_pages(vma: Vma, start: int, end: int) -> Iterator[int]:
    """Yield the addresses in [start, end) whose PTE maps a page of the file, private copies not."""
    machine = vma.mm.machine
    for address, pte in vma.mm.tables.populated(start, end):
        if pte & PTE_PRESENT:
            pfn = machine.vm_normal_page(vma, address, pte)
            if pfn < 0 or not machine.memory.flags[pfn] & PG_ANON:
                yield address


def _page_of(vma: Vma, address: int) -> Page:
    assert vma.file is not None, "only files of the mount are mapped here"
    assert isinstance(vma.file.name, int), vma.file.name
    return vma.file.name, vma.pgoff_of(address)
