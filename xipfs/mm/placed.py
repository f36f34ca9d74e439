"""Files whose placement is an array: page of the file -> the frame that backs it.

The live mount's files ask the filesystem at every fault (``accounting.live_file``); simulations
and benchmarks have millions of pages whose placement they know. These files answer the same
faults from one array of all of them, which the bulk path (``bulk.py``) reads as well.

An entry is the pfn of an XIP page (in the region), the pfn of a resident page-cache page (in
RAM), or ``ABSENT``: a page-cache page without a frame, which the first fault fills (rule F4).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import OutOfFramesError
from xipfs.memory.frames import PG_SWAPBACKED
from xipfs.mm.flags import (
    VM_FAULT_LOCKED,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
)
from xipfs.mm.insert import vmf_insert_mixed, vmf_insert_pfn
from xipfs.mm.machine import Machine
from xipfs.mm.vma import MappedFile, Vma, Vmf, VmOperations
from xipfs.mm.zap import unmap_mapping_range

ABSENT: Final = -1


class Placement:
    """The files of one machine whose frames lie in one array, ``frames`` int64[pages of all].

    ``frames`` is replaced when a file is added; the files' entries move with it.

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> machine = Machine(PhysicalMemory(ram_pages=8, nvram_pages=8))
    >>> placement = Placement(machine)
    >>> xip = machine.memory.nvram_pfn(3)
    >>> file = placement.add("a", np.array([xip, ABSENT]))
    >>> file.first, file.pages, placement.frames.tolist() == [xip, ABSENT]
    (0, 2, True)
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.frames: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def add(
        self, name: object, frames: npt.NDArray[np.int64], *, shmem: bool = False
    ) -> PlacedFile:
        """Add a file of ``len(frames)`` pages: XIP pfns, or ABSENT for page-cache pages."""
        memory = self.machine.memory
        xip = frames[frames != ABSENT]
        low, high = memory.nvram_base_pfn, memory.nvram_base_pfn + memory.nvram_pages
        assert ((xip >= low) & (xip < high)).all(), "expected pfns of the region, or ABSENT"
        file = PlacedFile(name, self, len(self.frames), len(frames), shmem=shmem)
        self.frames = np.concatenate([self.frames, frames.astype(np.int64)])
        return file


class PlacedFile(MappedFile):
    """A file of a ``Placement``: entries [first, first + pages) of its ``frames``.

    Like a mount's file it maps VM_MIXEDMAP, and sees the first write of shared mappings without
    refusing any (rule F9). Nothing is mapped around a fault: there are no ``map_pages``.
    """

    def __init__(
        self, name: object, placement: Placement, first: int, pages: int, *, shmem: bool
    ) -> None:
        operations = VmOperations(fault=self._fault, page_mkwrite=_let_pass, pfn_mkwrite=_allow)
        super().__init__(
            name, operations, mmap=_mmap, shmem=shmem, can_writeback=True, has_fsync=True
        )
        self.placement = placement
        self.first = first
        self.pages = pages

    def _fault(self, vmf: Vmf) -> int:
        machine = self.placement.machine
        if not 0 <= vmf.pgoff < self.pages:
            return VM_FAULT_SIGBUS
        frames = self.placement.frames
        pfn = int(frames[self.first + vmf.pgoff])
        major = 0
        if pfn == ABSENT:
            try:
                pfn = machine.memory.alloc_ram()
            except OutOfFramesError:
                return VM_FAULT_OOM
            frames[self.first + vmf.pgoff] = pfn
            if self.shmem:
                machine.memory.flags[pfn] |= PG_SWAPBACKED
            major = VM_FAULT_MAJOR
        elif machine.memory.is_nvram(pfn):
            if machine.rules.kernel.insert_mixed:
                return vmf_insert_mixed(vmf.vma, vmf.address, pfn)
            return vmf_insert_pfn(vmf.vma, vmf.address, pfn)
        machine.memory.get_page(pfn)
        vmf.page = pfn
        return major

    def evict(self, index: int) -> bool:
        """Unmap page ``index`` everywhere and free its frame; private copies stay (rule K7).

        Returns False, with the page unmapped and its frame kept, if somebody else still holds a
        reference (rule R8). The page must be a resident page-cache page.
        """
        memory = self.placement.machine.memory
        pfn = int(self.placement.frames[self.first + index])
        assert pfn != ABSENT, index
        assert memory.pfn_valid(pfn), (index, pfn)
        unmap_mapping_range(self, index, 1, even_cows=False)
        if memory.ref[pfn] != 1:
            return False
        self.placement.frames[self.first + index] = ABSENT
        memory.put_page(pfn)
        return True


def _mmap(vma: Vma) -> int:
    vma.flags |= VM_MIXEDMAP
    return 0


def _let_pass(_vmf: Vmf) -> int:
    return VM_FAULT_LOCKED


def _allow(_vmf: Vmf) -> int:
    return 0
