"""A file of the mount as the model's mm sees it: vm_operations that ask the placement.

->mmap sets VM_MIXEDMAP. ->fault inserts an XIP page with vmf_insert_mixed (before it existed:
vm_insert_pfn), hands out a page-cache page with a reference taken, and treats a hole by the era's
rule F8 or R4: the zero page, or the "sparse page" of filemap_xip. ->page_mkwrite and ->pfn_mkwrite
exist and let every write pass, as on a filesystem that stamps times when a page is dirtied; they
make shared writable mappings write-notified (rule F9).
"""

from __future__ import annotations

import errno

from xipfs.accounting.charge_loop import HOLE, MARKED
from xipfs.errors import FsError, ImageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.mm.flags import (
    FAULT_FLAG_WRITE,
    VM_FAULT_LOCKED,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
    VM_SHARED,
)
from xipfs.mm.insert import vmf_insert_mixed, vmf_insert_pfn
from xipfs.mm.machine import Machine
from xipfs.mm.pte import PageTables
from xipfs.mm.table_pool import TablePool
from xipfs.mm.vma import MappedFile, Vma, Vmf, VmOperations
from xipfs.units import PAGE_SHIFT, pages_of


class LiveFile:
    """The ``mapped`` file of inode ``ino``.

    ``frames`` remembers where pages are, by page number, for compiled code: frame entries of
    ``charge_loop``. What changes a page's frame or fills a hole zaps its PTEs first, and so passes
    by ``forget``; a mark comes with a new frame only.
    """

    def __init__(
        self, fs: Filesystem, machine: Machine, ino: int, sparse_pfn: int, pool: TablePool
    ) -> None:
        self._fs = fs
        self._machine = machine
        self._ino = ino
        self._sparse_pfn = sparse_pfn
        by_zero_page = machine.rules.kernel.xip_hole == "zero"
        self._hole_pfn = machine.zero_pfn if by_zero_page else sparse_pfn
        operations = VmOperations(fault=self._fault, page_mkwrite=_let_pass, pfn_mkwrite=_allow)
        self.mapped = MappedFile(ino, operations, mmap=_mmap, can_writeback=True, has_fsync=True)

        self.frames = PageTables(pool)

    def learn(self, index: int) -> None:
        """Note the frame of page ``index``, if it has one."""
        try:
            page = self._fs.page(self._ino, index)
            beyond = index >= pages_of(self._fs.getattr(self._ino).size_bytes)
        except (FsError, ImageError):
            return
        if page.kind is PageKind.HOLE and not beyond:
            self.frames.set(index << PAGE_SHIFT, self._hole_pfn + 1 | HOLE)
        elif page.pfn is not None:
            mark = MARKED if self._fs.has_fill_mark(self._ino, index) else 0
            self.frames.set(index << PAGE_SHIFT, page.pfn + 1 | mark)

    def forget(self, first: int, count: int) -> None:
        """Forget the frames of a run of pages: they are about to change."""
        start, end = first << PAGE_SHIFT, first + count << PAGE_SHIFT
        for address, _ in self.frames.populated(start, end):
            self.frames.set(address, 0)
        self.frames.free(start, end)

    def _fault(self, vmf: Vmf) -> int:
        try:
            found = self._fs.fault_in(self._ino, vmf.pgoff)
        except FsError as error:
            return VM_FAULT_OOM if error.errno == errno.ENOMEM else VM_FAULT_SIGBUS
        except ImageError:
            return VM_FAULT_SIGBUS  # as the kernel's own READ of that page failed
        if found is None:
            return self._hole(vmf)
        pfn, filled = found
        if self._machine.memory.is_nvram(pfn):
            if self._machine.rules.kernel.insert_mixed:
                return vmf_insert_mixed(vmf.vma, vmf.address, pfn)
            return vmf_insert_pfn(vmf.vma, vmf.address, pfn)
        self._machine.memory.get_page(pfn)
        vmf.page = pfn
        return VM_FAULT_MAJOR if filled else 0

    def _hole(self, vmf: Vmf) -> int:
        """Map what stands for a hole.

        A write into a shared mapping of a hole gets the sparse page in every era: the block
        is allocated when the bytes arrive, which unmaps this page again (rule R2).
        """
        into_file = vmf.flags & FAULT_FLAG_WRITE and vmf.vma.flags & VM_SHARED
        if self._hole_pfn == self._machine.zero_pfn and not into_file:
            return vmf_insert_mixed(vmf.vma, vmf.address, self._machine.zero_pfn)
        self._machine.memory.get_page(self._sparse_pfn)
        vmf.page = self._sparse_pfn
        return 0


def _mmap(vma: Vma) -> int:
    vma.flags |= VM_MIXEDMAP
    return 0


def _let_pass(_vmf: Vmf) -> int:
    return VM_FAULT_LOCKED


def _allow(_vmf: Vmf) -> int:
    return 0
