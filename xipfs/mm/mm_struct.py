"""An address space: its VMAs in address order, its page tables, its counters."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from xipfs.mm.machine import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES, Machine
from xipfs.mm.pte import LEAF_SHIFT, PageTables
from xipfs.mm.vma import Vma

#: Where addresses are chosen when the caller names none.
MMAP_BASE = 1 << 32


class MmStruct:
    """struct mm_struct. ``rss`` counts normal PTEs by kind (rule F3); raw PTEs count nowhere.

    ``min_flt`` and ``maj_flt`` are the task's fault counters (rule F1; threads share them here),
    ``locked_vm`` the pages of VM_LOCKED VMAs, ``raw_ptes`` the PTEs without a counted page.
    """

    def __init__(self, machine: Machine, name: object = None) -> None:
        self.machine = machine
        self.name = name
        self.tables = PageTables(machine.table_pool)
        self.rss = [0, 0, 0]
        self.swapents = 0
        self.raw_ptes = 0
        self.min_flt = 0
        self.maj_flt = 0
        self.locked_vm = 0
        self.def_flags = 0
        self.has_pinned = False
        #: True while a call that changes the VMAs runs, so while ->mmap runs (rule I9).
        self.mmap_write_locked = False
        self._starts: list[int] = []
        self._vmas: list[Vma] = []
        machine.mms.append(self)

    def __repr__(self) -> str:
        return f"MmStruct({self.name!r}, {len(self._vmas)} vmas, rss {self.rss})"

    @property
    def file_rss(self) -> int:
        """Normal PTEs of page-cache pages."""
        return self.rss[MM_FILEPAGES]

    @property
    def anon_rss(self) -> int:
        """Normal PTEs of anonymous pages."""
        return self.rss[MM_ANONPAGES]

    @property
    def shmem_rss(self) -> int:
        """Normal PTEs of shared-memory pages."""
        return self.rss[MM_SHMEMPAGES]

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)

    def find_vma(self, address: int) -> Vma | None:
        """Return the VMA that contains ``address``, or None."""
        slot = bisect_right(self._starts, address) - 1
        if slot < 0:
            return None
        vma = self._vmas[slot]
        return vma if address < vma.end else None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """Return the VMAs that meet [start, end), in address order."""
        slot = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        while slot < len(self._vmas) and self._starts[slot] < end:
            if self._vmas[slot].end > start:
                found.append(self._vmas[slot])
            slot += 1
        return found

    def neighbours(self, vma: Vma) -> tuple[Vma | None, Vma | None]:
        """Return the VMAs just before and after ``vma`` in address order."""
        slot = bisect_left(self._starts, vma.start)
        assert self._vmas[slot] is vma
        before = self._vmas[slot - 1] if slot else None
        after = self._vmas[slot + 1] if slot + 1 < len(self._vmas) else None
        return before, after

    def link(self, vma: Vma) -> None:
        """Enter ``vma`` into the address space and its file's index (vma_link)."""
        slot = bisect_left(self._starts, vma.start)
        assert slot == len(self._starts) or vma.end <= self._starts[slot], vma
        assert slot == 0 or self._vmas[slot - 1].end <= vma.start, vma
        self._starts.insert(slot, vma.start)
        self._vmas.insert(slot, vma)
        if vma.file is not None:
            vma.file.i_mmap.add(vma.pgoff, vma.pgoff + vma.pages, vma)

    def unlink(self, vma: Vma) -> None:
        """Take ``vma`` out of the address space and its file's index."""
        slot = bisect_left(self._starts, vma.start)
        assert self._vmas[slot] is vma
        del self._starts[slot]
        del self._vmas[slot]
        if vma.file is not None:
            vma.file.i_mmap.remove(vma)

    def adjust(self, vma: Vma, start: int, end: int, pgoff: int) -> None:
        """Give a linked ``vma`` new bounds (vma_adjust)."""
        self.unlink(vma)
        vma.start, vma.end, vma.pgoff = start, end, pgoff
        self.link(vma)

    def split(self, vma: Vma, address: int) -> Vma:
        """Cut ``vma`` at ``address``; return the upper piece (split_vma, rule N8).

        The upper piece's pgoff advances with its address, which keeps the linear rule of a
        PFNMAP VMA true in both pieces.
        """
        assert vma.start < address < vma.end, (vma, address)
        upper = self.clone_vma(vma, address, vma.end, vma.pgoff_of(address))
        self.adjust(vma, vma.start, address, vma.pgoff)
        self.link(upper)
        vma_open(upper)
        return upper

    def clone_vma(self, vma: Vma, start: int, end: int, pgoff: int) -> Vma:
        """Return an unlinked VMA like ``vma`` at [start, end) of this address space."""
        copy = Vma(self, start, end, vma.flags, pgoff, vma.file)
        copy.vm_ops = vma.vm_ops
        copy.anon_vma, copy.chain = vma.anon_vma, vma.chain
        copy.tag = vma.tag
        copy.page_prot = vma.page_prot
        return copy

    def isolate(self, start: int, end: int) -> list[Vma]:
        """Return the VMAs of [start, end), split so that none reaches outside it."""
        first = self.find_vma(start)
        if first is not None and first.start < start:
            self.split(first, start)
        last = self.find_vma(end - 1)
        if last is not None and last.end > end:
            self.split(last, end)
        return self.overlapping(start, end)

    def unused_area(self, pages: int) -> int:
        """Return a free, page-table-aligned address for ``pages`` pages, with a gap around it."""
        top = self._vmas[-1].end if self._vmas else MMAP_BASE
        top = max(top, MMAP_BASE)
        step = 1 << LEAF_SHIFT
        assert pages > 0, pages
        return (top + step - 1 >> LEAF_SHIFT << LEAF_SHIFT) + step


def vma_open(vma: Vma) -> None:
    """Tell the backer that one more VMA maps it (vm_ops->open: split, fork, mremap)."""
    if vma.vm_ops is not None and vma.vm_ops.open is not None:
        vma.vm_ops.open(vma)


def vma_close(vma: Vma) -> None:
    """Tell the backer that a VMA goes away (vm_ops->close)."""
    if vma.vm_ops is not None and vma.vm_ops.close is not None:
        vma.vm_ops.close(vma)
