"""VMAs, what backs them, and the operations a backer supplies.

``MappedFile`` is the kernel's struct file and address_space in one: what mmap() is called on, and
the index by which every VMA of it is found from a file page (the i_mmap tree of rule R1).
``VmOperations`` is the kernel's vm_operations_struct: a set of optional functions. A live mount
supplies one that asks its placement, the oracle one that does what its driver did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xipfs.mm import rules
from xipfs.mm.flags import (
    VM_DAX,
    VM_MIXEDMAP,
    VM_SHARED,
    VM_SOFTDIRTY_TRACKED,
    VM_SPECIAL,
    VM_WRITE,
)
from xipfs.mm.interval import IntervalBuckets
from xipfs.mm.pte import PTE_PRESENT, PTE_WRITE, PTE_YOUNG
from xipfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from xipfs.mm.machine import Machine
    from xipfs.mm.mm_struct import MmStruct


class Vmf:
    """struct vm_fault: what a handler is told about one fault, and where it puts its page.

    ``page`` is the pfn the handler hands over together with one reference (-1: none);
    ``cow_page`` the pfn of a private copy to fill (rule F11), -1 if there is none.
    """

    __slots__ = ("address", "cow_page", "flags", "orig_pte", "page", "pgoff", "vma")

    def __init__(self, vma: Vma, address: int, flags: int) -> None:
        self.vma = vma
        self.address = address
        self.flags = flags
        self.pgoff = vma.pgoff_of(address)
        self.orig_pte = 0
        self.page = -1
        self.cow_page = -1

    @property
    def machine(self) -> Machine:
        """The machine the faulting address space belongs to."""
        return self.vma.mm.machine


@dataclass
class VmOperations:
    """struct vm_operations_struct: what a VMA's backer does; None where it has no such function.

    ``fault(vmf)`` returns VM_FAULT bits; either it sets ``vmf.page`` (holding a reference for
    the PTE) and returns 0 or MAJOR, or it inserts the PTE itself and returns NOPAGE.
    ``nopfn(vmf)`` returns a pfn or a NOPFN sentinel (rule I17). ``map_pages(vmf, first, last)``
    names the cached pages of the file indexes first..last as (index, pfn) for fault-around.
    ``page_mkwrite`` and ``pfn_mkwrite`` return VM_FAULT bits; LOCKED or any non-zero value without
    an error bit lets the write pass. ``access`` exists for debuggers (generic_access_phys).
    """

    fault: Callable[[Vmf], int] | None = None
    nopfn: Callable[[Vmf], int] | None = None
    map_pages: Callable[[Vmf, int, int], Iterable[tuple[int, int]]] | None = None
    page_mkwrite: Callable[[Vmf], int] | None = None
    pfn_mkwrite: Callable[[Vmf], int] | None = None
    open: Callable[[Vma], None] | None = None
    close: Callable[[Vma], None] | None = None
    access: bool = False


NO_OPERATIONS: Final = VmOperations()


class MappedFile:
    """Something that can be mapped, and the index of the VMAs that map it.

    ``mmap(vma)`` is called when a VMA is made; it may set flags and insert pages, and returns 0
    or a negative errno. ``shmem`` pages count as shared memory (rule F3). ``can_writeback``: the
    page cache tracks dirty pages of it (rule F9). ``regular``: not a device.

    Hooks that a file may set: ``fsync(first, pages)`` for what fsync does to PTEs (K14),
    ``punch_hole(first, pages)`` returns 0 or a negative errno, ``reclaim(index)`` drops a page of
    its cache if nobody else uses it, ``is_cached(index)`` tells mincore.
    """

    def __init__(
        self,
        name: object,
        vm_ops: VmOperations,
        *,
        mmap: Callable[[Vma], int] | None = None,
        shmem: bool = False,
        can_writeback: bool = False,
        has_fsync: bool = False,
        regular: bool = True,
    ) -> None:
        self.name = name
        self.vm_ops = vm_ops
        self.mmap = mmap
        self.shmem = shmem
        self.can_writeback = can_writeback
        self.has_fsync = has_fsync
        self.regular = regular
        self.fsync: Callable[[int, int], None] | None = None
        self.punch_hole: Callable[[int, int], int] | None = None
        self.reclaim: Callable[[int], None] | None = None
        self.is_cached: Callable[[int], bool] | None = None
        self.i_mmap: IntervalBuckets[Vma] = IntervalBuckets()

    def __repr__(self) -> str:
        return f"MappedFile({self.name!r}, {len(self.i_mmap)} vmas)"


class Vma:
    """One virtual memory area: [start, end) in bytes, ``pgoff`` the file page at ``start``.

    A private remap_pfn_range() makes ``pgoff`` the first pfn (rule I2). ``anon_vma`` is 0 or the
    identity of the kernel's anon_vma; ``chain`` how many of them this VMA is linked to.
    """

    __slots__ = (
        "anon_vma",
        "chain",
        "end",
        "file",
        "flags",
        "mm",
        "page_prot",
        "pgoff",
        "start",
        "swap_readahead",
        "tag",
        "vm_ops",
    )

    def __init__(
        self, mm: MmStruct, start: int, end: int, flags: int, pgoff: int, file: MappedFile | None
    ) -> None:
        self.mm = mm
        self.start = start
        self.end = end
        self.flags = flags
        self.pgoff = pgoff
        self.file = file
        self.vm_ops: VmOperations | None = None if file is None else file.vm_ops
        self.anon_vma = 0
        self.chain = 0
        #: For the caller's own use; copied to the pieces of a split and to a fork's copy.
        self.tag: object = None
        #: (page of the last swap-in, window, hits), see swap.py.
        self.swap_readahead: tuple[int, int, int] | None = None
        self.page_prot = 0
        self.set_page_prot()

    def __repr__(self) -> str:
        return f"Vma({self.start:#x}-{self.end:#x} pgoff {self.pgoff} flags {self.flags:#x})"

    @property
    def pages(self) -> int:
        """Length in pages."""
        return self.end - self.start >> PAGE_SHIFT

    @property
    def is_anonymous(self) -> bool:
        """Whether no file backs it (vma_is_anonymous)."""
        return self.vm_ops is None

    def pgoff_of(self, address: int) -> int:
        """Return linear_page_index(): the file page at ``address``."""
        return self.pgoff + (address - self.start >> PAGE_SHIFT)

    def address_of(self, pgoff: int) -> int:
        """Return the address of file page ``pgoff``; it may lie outside the VMA."""
        return self.start + (pgoff - self.pgoff << PAGE_SHIFT)

    def set_page_prot(self) -> None:
        """Recompute vm_page_prot, the bits of a fresh PTE (vma_set_page_prot; rules F5, F9).

        Writable only where hardware may write without asking: shared, VM_WRITE and not
        write-notified. Young, as vm_page_prot carries the accessed bit.
        """
        prot = PTE_PRESENT | PTE_YOUNG
        if self.flags & (VM_WRITE | VM_SHARED) == VM_WRITE | VM_SHARED and not self.write_notified:
            prot |= PTE_WRITE
        self.page_prot = prot

    @property
    def write_notified(self) -> bool:
        """Whether the backer asked to see first writes (vma_wants_writenotify, rule F9)."""
        kernel = self.mm.machine.rules.kernel
        ops = self.vm_ops or NO_OPERATIONS
        if self.flags & VM_SOFTDIRTY_TRACKED:
            return True
        return rules.wants_writenotify(
            self.flags,
            ops.page_mkwrite is not None
            or (kernel.notify_by_pfn_mkwrite and ops.pfn_mkwrite is not None),
            self.file is not None and self.file.can_writeback,
            not kernel.notify_by_pfn_mkwrite,
        )

    @property
    def is_special(self) -> bool:
        """Whether the VMA is in the class that is neither locked nor merged (rules K18 to K21)."""
        special = VM_SPECIAL
        if not self.mm.machine.rules.kernel.mixed_is_special:
            special &= ~VM_MIXEDMAP
        return bool(self.flags & special)

    @property
    def is_dax(self) -> bool:
        """Whether the file is mapped directly from a device with struct pages (vma_is_dax)."""
        return bool(self.flags & VM_DAX)
