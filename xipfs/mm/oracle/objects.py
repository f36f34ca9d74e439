"""What a recording maps: the recorder's device, /dev/mem, and files of three filesystems.

Each is a MappedFile whose handlers do what the header says the real one did, by the insertion
functions that a driver would call. A kind that is not known here cannot be made; mapping it is
then a step that the model does not answer.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Final

from xipfs.mm.flags import (
    VM_FAULT_ERROR,
    VM_FAULT_LOCKED,
    VM_FAULT_SIGBUS,
    VMFLAG_LETTERS,
)
from xipfs.mm.insert import (
    NOPFN_SIGBUS,
    handler_result,
    remap_pfn_range,
    vm_insert_page,
    vmf_insert_mixed,
    vmf_insert_pfn,
)
from xipfs.mm.machine import Machine
from xipfs.mm.oracle.frames import Frames
from xipfs.mm.rules import is_cow_mapping
from xipfs.mm.vma import MappedFile, Vma, Vmf, VmOperations
from xipfs.mm.zap import truncate_pagecache, unmap_mapping_range
from xipfs.units import PAGE_SHIFT

Json = dict[str, Any]
FLAG_OF_LETTERS: Final = {letters: flag for flag, letters in VMFLAG_LETTERS.items()}


@dataclass
class VmOpsCalls:
    """How often the device's vm_ops were called, by all processes."""

    fault: int = 0
    mkwrite: int = 0
    open: int = 0
    close: int = 0


def insert_in_place(vma: Vma, address: int, pfn: int) -> int:
    """``vmf_insert_mixed``, or what a driver had before it existed (rule I10). VM_FAULT bits."""
    if not vma.mm.machine.rules.kernel.insert_mixed:
        return vmf_insert_pfn(vma, address, pfn)
    return vmf_insert_mixed(vma, address, pfn)


class RecordedObject(MappedFile):
    """What all kinds share: the header's description, and ->mmap as it tells."""

    def __init__(
        self, name: str, description: Json, machine: Machine, frames: Frames, ops: VmOperations
    ) -> None:
        super().__init__(
            name,
            ops,
            mmap=self.on_mmap,
            has_fsync=bool(description.get("fsync")),
            regular=description["kind"].endswith("-file"),
        )
        self.description = description
        self.machine = machine
        self.frames = frames
        self.pages: int = description["pages"]
        #: A device with a fault handler is the recorder's ideal file, so it has a size to change.
        self.can_truncate = bool(description.get("fault_handler"))

    def on_mmap(self, vma: Vma) -> int:
        """Set the flags, then make the calls of ``at_mmap`` in order; 0 or a negative errno."""
        for letters in self.description.get("vma_flags", []):
            vma.flags |= FLAG_OF_LETTERS[letters]
        first = vma.pgoff
        for call in self.description.get("at_mmap", []):
            error = self._call(vma, first, call)
            if error:
                return error
        return 0

    def _call(self, vma: Vma, first: int, call: Json) -> int:
        if call["call"] == "fail":
            return -int(getattr(errno, call["errno"]))
        address = vma.start + (call["page"] - first << PAGE_SHIFT)
        pfn = self.frames.pfn(call["frame"])
        pages = call.get("pages", 1)
        if call["call"] == "remap_pfn_range":
            if call.get("sets_pgoff"):
                vma.pgoff = pfn
            if not is_cow_mapping(vma.flags):
                # The function does not look at the VMA's bounds here; a driver has to (I3).
                skipped = max(vma.start - address, 0) >> PAGE_SHIFT
                address, pfn = address + (skipped << PAGE_SHIFT), pfn + skipped
                pages = min(pages - skipped, vma.end - address >> PAGE_SHIFT)
                if pages <= 0:
                    return 0
            return remap_pfn_range(vma, address, pfn, pages)
        for number in range(pages):
            at = address + (number << PAGE_SHIFT)
            if not vma.start <= at < vma.end:
                # ``page`` counts in the object; the mapping may be of another part of it.
                continue
            if call["call"] == "vm_insert_page":
                error = vm_insert_page(vma, at, pfn + number)
            elif call["call"] == "vmf_insert_mixed":
                failed = insert_in_place(vma, at, pfn + number) & VM_FAULT_ERROR
                error = -errno.EFAULT if failed else 0
            else:
                raise LookupError(f"call {call['call']!r} at mmap")
            if error:
                return error
        return 0

    def migrate(self, index: int, to: str, *, even_cows: bool) -> int:
        """The driver changes what backs a page; only devices do."""
        del index, to, even_cows
        return -errno.ENOTTY

    def truncate(self, pages: int) -> int:
        """Cut to the first ``pages`` pages; 0, or -EINVAL where nothing can be cut (rule K15).

        The size goes first, then the PTEs, then the cache, then the PTEs again: a private copy
        may have slipped in between.
        """
        if not self.can_truncate or pages > self.pages:
            return -errno.EINVAL
        self.pages = pages
        truncate_pagecache(self, pages << PAGE_SHIFT)
        self.forget_from(pages)
        truncate_pagecache(self, pages << PAGE_SHIFT)
        return 0

    def forget_from(self, index: int) -> None:
        """Drop what is cached from page ``index`` on; only the page cache has anything."""
        del index

    def read_page(self, index: int) -> int:
        """Return the pfn that read(2) of page ``index`` copies from, or a negative errno."""
        del index
        return -errno.EINVAL


class Device(RecordedObject):
    """The recorder's character device; ``/dev/mem`` is one without fault handler."""

    def __init__(
        self,
        name: str,
        description: Json,
        machine: Machine,
        frames: Frames,
        calls: VmOpsCalls,
        *,
        can_access: bool,
    ) -> None:
        ops = VmOperations(access=can_access and bool(description.get("access")))
        if description.get("fault_handler"):
            ops.fault, ops.open, ops.close = self._fault, self._open, self._close
            if description.get("page_mkwrite"):
                ops.page_mkwrite, ops.pfn_mkwrite = self._page_mkwrite, self._pfn_mkwrite
        if description.get("nopfn"):
            ops.fault, ops.nopfn = None, self._nopfn
        super().__init__(name, description, machine, frames, ops)
        self._calls = calls
        self._backing = list(description.get("backing") or [])
        self._frame = list(description.get("frame") or [])

    def _open(self, _vma: Vma) -> None:
        self._calls.open += 1

    def _close(self, _vma: Vma) -> None:
        self._calls.close += 1

    def _page_mkwrite(self, _vmf: Vmf) -> int:
        self._calls.mkwrite += 1
        return VM_FAULT_LOCKED

    def _pfn_mkwrite(self, _vmf: Vmf) -> int:
        self._calls.mkwrite += 1
        return 0

    def _fault(self, vmf: Vmf) -> int:
        """Do for one missing PTE what the page's backing says."""
        self._calls.fault += 1
        if vmf.pgoff >= self.pages or self._backing[vmf.pgoff] == "hole":
            return VM_FAULT_SIGBUS
        backing = self._backing[vmf.pgoff]
        pfn = self.frames.pfn(self._frame[vmf.pgoff])
        if backing == "page":
            self.machine.memory.get_page(pfn)
            vmf.page = pfn
            return 0
        if backing == "insert-page":
            return handler_result(vmf.vma, vm_insert_page(vmf.vma, vmf.address, pfn))
        if backing in ("xip-insert-pfn", "ram-insert-pfn"):
            return vmf_insert_pfn(vmf.vma, vmf.address, pfn)
        if backing in ("xip", "mixed-reserved", "mixed-ram", "mixed-zero"):
            return insert_in_place(vmf.vma, vmf.address, pfn)
        raise LookupError(f"backing {backing!r} of a device")

    def _nopfn(self, vmf: Vmf) -> int:
        """Name the frame that backs the page, whatever it is (rule I16)."""
        self._calls.fault += 1
        if vmf.pgoff >= self.pages or self._backing[vmf.pgoff] == "hole":
            return NOPFN_SIGBUS
        return self.frames.pfn(self._frame[vmf.pgoff])

    def migrate(self, index: int, to: str, *, even_cows: bool) -> int:
        """Back page ``index`` by another frame from now on, and unmap it everywhere (K7)."""
        if index >= min(self.pages, len(self._backing)):
            return -errno.EINVAL
        frame = f"{'own' if to == 'page' else 'xip'}:{index}"
        if not self.frames.has(frame):
            return -errno.EINVAL
        self._backing[index], self._frame[index] = to, frame
        unmap_mapping_range(self, index, 1, even_cows=even_cows)
        return 0
