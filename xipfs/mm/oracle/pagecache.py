"""Files in the page cache: of cramfs, whose in-place pages ->mmap may map itself, and of tmpfs.

Both use the generic fault (filemap_fault, filemap_map_pages): a page that is not cached is read
alone, which makes the fault major (rule F4); read faults map cached neighbours (rule F22).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from xipfs.memory.frames import PG_DIRTY, PG_LRU, PG_SWAPBACKED
from xipfs.mm.flags import (
    VM_FAULT_ERROR,
    VM_FAULT_MAJOR,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
    VM_WRITE,
)
from xipfs.mm.insert import remap_pfn_range
from xipfs.mm.machine import Machine
from xipfs.mm.oracle.frames import Frames, split_name
from xipfs.mm.oracle.objects import RecordedObject, insert_in_place
from xipfs.mm.quirks import CRAMFS_LAST_BLOCK
from xipfs.mm.vma import Vma, Vmf, VmOperations
from xipfs.mm.zap import unmap_mapping_range
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

Json = dict[str, Any]


class CachedFile(RecordedObject):
    """A file whose pages live in the page cache: file page to pfn in ``cache``."""

    def __init__(
        self,
        name: str,
        description: Json,
        machine: Machine,
        frames: Frames,
        *,
        shmem: bool,
        cached: list[bool],
    ) -> None:
        ops = VmOperations(fault=self._fault, map_pages=self._map_pages)
        super().__init__(name, description, machine, frames, ops)
        self.shmem = shmem
        self.cache: dict[int, int] = {}
        #: What a page holds that is not cached; a page missing here is zeros.
        self.stored: dict[int, bytes] = {}
        #: Pages whose first touch has nothing to read: holes that shared memory fills with zeros.
        self.unread: set[int] = set()
        self.is_cached = self.cache.__contains__
        self.reclaim = self._reclaim
        for index, text in enumerate(description.get("data") or []):
            self.stored[index] = (text or "").encode("latin-1")
        for index, present in enumerate(cached):
            if present:
                self.read_page(index)

    def read_page(self, index: int) -> int:
        """Return the pfn of page ``index``, reading it into the cache if it is not there."""
        if index >= self.pages:
            return self.frames.zero
        pfn = self.cache.get(index)
        if pfn is None:
            pfn = int(self.machine.memory.alloc_ram())
            self.machine.memory.flags[pfn] = PG_LRU | (PG_SWAPBACKED if self.shmem else 0)
            self.cache[index] = pfn
            self.frames.call(pfn, f"cache:{index}")
            if self.machine.data is not None:
                content = self.stored.get(index, b"")
                self.machine.data.of(pfn)[:] = content.ljust(PAGE_SIZE, b"\0")
        return pfn

    def _fault(self, vmf: Vmf) -> int:
        """filemap_fault()."""
        if vmf.pgoff >= self.pages:
            return VM_FAULT_SIGBUS
        absent = vmf.pgoff not in self.cache and vmf.pgoff not in self.unread
        self.unread.discard(vmf.pgoff)
        vmf.page = self.read_page(vmf.pgoff)
        self.machine.memory.get_page(vmf.page)
        return VM_FAULT_MAJOR if absent else 0

    def _map_pages(self, _vmf: Vmf, first: int, last: int) -> Iterable[tuple[int, int]]:
        cache = self.cache
        return [(index, cache[index]) for index in range(first, last + 1) if index in cache]

    def drop(self, index: int) -> None:
        """Take page ``index`` out of the cache; nobody maps it any more."""
        memory = self.machine.memory
        memory.put_page(self.cache.pop(index))

    def _reclaim(self, index: int) -> None:
        """MADV_PAGEOUT: keep the content elsewhere, drop the page unless others use it."""
        memory = self.machine.memory
        pfn = self.cache.get(index)
        if pfn is None or memory.map[pfn] != 1 or memory.ref[pfn] != 2:
            return
        unmap_mapping_range(self, index, 1, even_cows=False)
        if self.shmem and not self.machine.swap.on:
            # shrink_folio_list() unmaps first, then finds that there is nowhere to write it.
            return
        if self.machine.data is not None:
            self.stored[index] = bytes(self.machine.data.of(pfn))
        memory.flags[pfn] &= ~PG_DIRTY
        self.drop(index)


class TmpfsFile(CachedFile):
    """A file of shared memory; its pages exist nowhere else (rule F3: rss of its own kind)."""

    def __init__(self, name: str, description: Json, machine: Machine, frames: Frames) -> None:
        cached = description.get("cached") or [True] * description["pages"]
        super().__init__(name, description, machine, frames, shmem=True, cached=cached)
        self.unread = {index for index, present in enumerate(cached) if not present}
        self.punch_hole = self._punch_hole
        self.can_truncate = True

    def forget_from(self, index: int) -> None:
        """Drop the cached pages from ``index`` on, and what was swapped out of them."""
        for cached in [page for page in self.cache if page >= index]:
            self.drop(cached)
        for stored in [page for page in self.stored if page >= index]:
            del self.stored[stored]

    def read_page(self, index: int) -> int:
        """A hole is read as zeros and stays one; only a fault fills it (shmem_file_read_iter)."""
        return self.frames.zero if index in self.unread else super().read_page(index)

    def is_swapped(self, index: int) -> bool:
        """Whether page ``index`` was written to swap and is not back yet."""
        return index < self.pages and index not in self.cache and index not in self.unread

    def _punch_hole(self, first: int, pages: int) -> int:
        """MADV_REMOVE: unmap, and forget the content; private copies stay (rule K7)."""
        unmap_mapping_range(self, first, pages, even_cows=False)
        for index in range(first, min(first + pages, self.pages)):
            self.stored.pop(index, None)
            self.unread.add(index)
            if index in self.cache:
                self.drop(index)
        return 0


def consecutive_run(description: Json, first: int, pages: int) -> int:
    """Return how many pages from file page ``first`` on cramfs maps in place (rule A8).

    The run ends where the mapping or the file does, or at the first page that is not stored in
    place next to the one before; a last page that shares its block with other data is dropped.
    """
    backing, frame = description["backing"], description["frame"]
    run = 0
    while run < pages and first + run < description["pages"]:
        index = first + run
        if backing[index] != "in-place":
            break
        region, number = split_name(frame[first])
        if frame[index] != f"{region}:{number + run}":
            break
        run += 1
    reaches_end = run > 0 and first + run == description["pages"]
    partial = description["size_bytes"] % PAGE_SIZE != 0
    if reaches_end and partial and description.get("other_data_after_end"):
        run -= 1
    return run


class CramfsFile(CachedFile):
    """A file of a cramfs image that may be mapped in place, its leading run only (rule A8)."""

    def __init__(self, name: str, description: Json, machine: Machine, frames: Frames) -> None:
        cached = description.get("cached") or [False] * description["pages"]
        # The cache is filled by the constructor, from the content as the page cache sees it.
        last = description["pages"] - 1
        full = description["size_bytes"] % PAGE_SIZE == 0
        zeroed = CRAMFS_LAST_BLOCK in machine.quirks and full
        seen = dict(description)
        if zeroed and last >= 0 and description["backing"][last] == "in-place":
            seen["data"] = [*description["data"][:-1], ""]
        super().__init__(name, seen, machine, frames, shmem=False, cached=cached)
        for index, frame in enumerate(description["frame"]):
            if frame is not None and machine.data is not None:
                text = description["data"][index].encode("latin-1")
                machine.data.of(frames.pfn(frame))[: len(text)] = text

    def on_mmap(self, vma: Vma) -> int:
        """cramfs_physmem_mmap(): remap a run that covers the mapping, insert a shorter one."""
        if self.description.get("at_mmap") != "cramfs" or vma.flags & VM_WRITE:
            return 0
        run = consecutive_run(self.description, vma.pgoff, vma.pages)
        if not run:
            return 0
        pfn = self.frames.pfn(self.description["frame"][vma.pgoff])
        if run == vma.pages:
            return remap_pfn_range(vma, vma.start, pfn, run)
        vma.flags |= VM_MIXEDMAP
        for number in range(run):
            at = vma.start + (number << PAGE_SHIFT)
            if insert_in_place(vma, at, pfn + number) & VM_FAULT_ERROR:
                return -errno.EFAULT
        return 0
