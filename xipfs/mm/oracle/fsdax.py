"""A file of a DAX filesystem: device pages mapped directly, never counted (rules F11, G7, K14)."""

from __future__ import annotations

import errno
from typing import Any

from xipfs.mm.flags import (
    FAULT_FLAG_WRITE,
    VM_DAX,
    VM_FAULT_DONE_COW,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
    VM_SHARED,
)
from xipfs.mm.insert import vmf_insert_mixed
from xipfs.mm.machine import Machine
from xipfs.mm.oracle.frames import Frames
from xipfs.mm.oracle.objects import RecordedObject
from xipfs.mm.pte import PTE_DIRTY, PTE_WRITE
from xipfs.mm.vma import Vma, Vmf, VmOperations
from xipfs.mm.zap import unmap_mapping_range

Json = dict[str, Any]


class FsdaxFile(RecordedObject):
    """A file of a DAX filesystem with device page structs (rules F11, G7, K14)."""

    def __init__(self, name: str, description: Json, machine: Machine, frames: Frames) -> None:
        ops = VmOperations(fault=self._fault, page_mkwrite=self._mkwrite, pfn_mkwrite=self._mkwrite)
        super().__init__(name, description, machine, frames, ops)
        #: A hole is the zero page to a reader (dax_load_hole; rule R4).
        self._pfns = [frames.pfn(frame or "zero") for frame in description["frame"]]
        #: Pages written to since their last fsync: the dirty tags of the mapping's entries.
        self._dirty: set[int] = set()
        self.fsync = self._fsync
        self.punch_hole = self._punch_hole
        self.can_truncate = True

    def on_mmap(self, vma: Vma) -> int:
        """As described, and the inode's S_DAX shows in the VMA (vma_is_dax)."""
        if not self.machine.pte_special and self.machine.rules.kernel.dax == "devmap":
            # Device page structs of that time need the devmap bit, which no machine without the
            # special bit has; such a kernel mounts without DAX.
            return -errno.EOPNOTSUPP
        vma.flags |= VM_DAX
        if self.machine.rules.kernel.dax == "mixed":
            vma.flags |= VM_MIXEDMAP
        return super().on_mmap(vma)

    def _fault(self, vmf: Vmf) -> int:
        if vmf.pgoff >= self.pages:
            return VM_FAULT_SIGBUS
        pfn = self._pfns[vmf.pgoff]
        write = bool(vmf.flags & FAULT_FLAG_WRITE)
        if vmf.cow_page >= 0:
            if self.machine.data is not None:
                self.machine.data.copy(pfn, vmf.cow_page)
            return VM_FAULT_DONE_COW
        shared_write = write and bool(vmf.vma.flags & VM_SHARED)
        if shared_write:
            self._dirty.add(vmf.pgoff)
        return vmf_insert_mixed(vmf.vma, vmf.address, pfn, mkwrite=shared_write)

    def _mkwrite(self, vmf: Vmf) -> int:
        if vmf.pgoff >= self.pages:
            return VM_FAULT_SIGBUS
        self._dirty.add(vmf.pgoff)
        return vmf_insert_mixed(vmf.vma, vmf.address, self._pfns[vmf.pgoff], mkwrite=True)

    def _fsync(self, first: int, pages: int) -> None:
        """Clean and write-protect every shared PTE of the dirty pages (dax_writeback_one)."""
        for index in sorted(self._dirty & set(range(first, first + pages))):
            self._dirty.discard(index)
            for vma in self.i_mmap.overlapping(index, index + 1):
                tables, address = vma.mm.tables, vma.address_of(index)
                pte = tables.get(address)
                if vma.flags & VM_SHARED and pte & (PTE_WRITE | PTE_DIRTY):
                    tables.set(address, pte & ~(PTE_WRITE | PTE_DIRTY))

    def _punch_hole(self, first: int, pages: int) -> int:
        """MADV_REMOVE: unmap, and give the blocks back; private copies stay (rule K7)."""
        unmap_mapping_range(self, first, pages, even_cows=False)
        for index in range(first, min(first + pages, self.pages)):
            self._pfns[index] = self.frames.zero
            self._dirty.discard(index)
        return 0

    def read_page(self, index: int) -> int:
        """Pages of the medium themselves; beyond the end there is nothing to read."""
        return self._pfns[index] if index < self.pages else self.frames.zero
