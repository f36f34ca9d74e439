"""The kernel reading and writing a process's memory for somebody else, and what refuses it.

Each caller takes pages by its own flavour of get_user_pages (section 6) and turns a refusal into
its own errno. The bytes themselves move only where the machine follows bytes.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from xipfs.memory.frames import PG_DIRTY
from xipfs.mm.flags import (
    FOLL_FORCE,
    FOLL_GET,
    FOLL_PIN,
    FOLL_TOUCH,
    FOLL_WRITE,
    VM_IO,
    VM_PFNMAP,
    VM_SOFTDIRTY_TRACKED,
)
from xipfs.mm.fork import GUP_PIN_COUNTING_BIAS
from xipfs.mm.gup import (
    LIVELOCK,
    get_user_pages,
    get_user_pages_fast,
    get_user_pages_locked,
    put_user_pages,
)
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import PTE_PRESENT, PTE_WRITE, PTE_YOUNG, pte_pfn
from xipfs.mm.rules import is_cow_mapping
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_MASK, PAGE_SIZE


class Moved(NamedTuple):
    """How many bytes moved (or a negative errno), and the bytes read if they are followed."""

    result: int
    data: bytes = b""


def _pieces(address: int, count: int) -> list[tuple[int, int]]:
    """Cut [address, address + count) at page boundaries: (address, bytes) of each part."""
    pieces = []
    while count > 0:
        part = min(count, PAGE_SIZE - (address & PAGE_SIZE - 1))
        pieces.append((address, part))
        address += part
        count -= part
    return pieces


def _move(machine: Machine, pfn: int, address: int, count: int, data: bytes | None) -> bytes:
    """Read ``count`` bytes at the page offset of ``address``, or store ``data`` there."""
    if machine.data is None:
        return b""
    page = machine.data.of(pfn)
    offset = address & PAGE_SIZE - 1
    if data is not None:
        page[offset : offset + count] = data
    return bytes(page[offset : offset + count])


def process_vm_rw(mm: MmStruct, address: int, count: int, *, data: bytes | None = None) -> Moved:
    """process_vm_readv, or with ``data`` process_vm_writev: pages are pinned, never forced.

    Whatever refuses a pin is -EFAULT, unless pages before it were done (rules G1, G2, G6).
    """
    machine = mm.machine
    flags = FOLL_PIN | FOLL_TOUCH | (FOLL_WRITE if data is not None else 0)
    done = b""
    total = 0
    for at, part in _pieces(address, count):
        _, error, held = get_user_pages_locked(mm, at & PAGE_MASK, 1, flags)
        if error == LIVELOCK:
            return Moved(LIVELOCK, done)
        if error:
            return Moved(total or -errno.EFAULT, done)
        stored = None if data is None else data[total : total + part]
        done += _move(machine, held[0], at, part, stored)
        if data is not None and machine.memory.pfn_valid(held[0]):
            machine.memory.flags[held[0]] |= PG_DIRTY
        put_user_pages(mm, held, pin=True)
        total += part
    return Moved(total, done)


def access_remote_vm(mm: MmStruct, address: int, count: int, *, data: bytes | None = None) -> Moved:
    """ptrace and /proc/PID/mem: forced, page by page; vm_ops->access where there is no page.

    Returns how much was done; nothing at all is -EIO.
    """
    machine = mm.machine
    flags = FOLL_GET | FOLL_TOUCH | FOLL_FORCE | (FOLL_WRITE if data is not None else 0)
    done = b""
    total = 0
    for at, part in _pieces(address, count):
        _, error, held = get_user_pages_locked(mm, at & PAGE_MASK, 1, flags)
        if error == LIVELOCK:
            return Moved(LIVELOCK, done)
        stored = None if data is None else data[total : total + part]
        pfn = held[0] if not error else generic_access_phys(mm, at, write=data is not None)
        if pfn < 0:
            break
        done += _move(machine, pfn, at, part, stored)
        if data is not None and not error and machine.memory.pfn_valid(pfn):
            machine.memory.flags[pfn] |= PG_DIRTY
        put_user_pages(mm, held)
        total += part
    return Moved(total or -errno.EIO, done)


def generic_access_phys(mm: MmStruct, address: int, *, write: bool) -> int:
    """Return the pfn that vm_ops->access would map for the kernel, or -1.

    Only where the VMA has ``access`` and the PTE is raw: a page of ordinary RAM (a private copy)
    cannot be mapped a second time by ioremap.
    """
    vma = mm.find_vma(address)
    if vma is None or vma.vm_ops is None or not vma.vm_ops.access:
        return -1
    pte = mm.tables.get(address & PAGE_MASK)
    if not vma.flags & (VM_IO | VM_PFNMAP) or not pte & PTE_PRESENT:
        return -1
    if write and not pte & PTE_WRITE:
        return -1
    if mm.machine.vm_normal_page(vma, address & PAGE_MASK, pte) >= 0:
        return -1
    return pte_pfn(pte)


def direct_io(mm: MmStruct, address: int, count: int, *, write: bool) -> int:
    """O_DIRECT with the user's pages as the buffer: bytes done or a negative errno (rule G6).

    ``write`` says whether the pages are written to (a read of the file). The buffer must be
    aligned to the device's sectors.
    """
    if (address | count) & 511:
        return -errno.EINVAL
    total = 0
    for at, part in _pieces(address, count):
        done, held = get_user_pages_fast(mm, at, write=write)
        if done < 0:
            return done if done == LIVELOCK else total or done
        put_user_pages(mm, held)
        total += part
    return total


class Pipe:
    """A pipe: buffers in order, each a copy or a process's own page with a reference on it.

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> from xipfs.mm import VM_READ, VM_WRITE, Machine, MmStruct, access, do_mmap
    >>> mm = MmStruct(Machine(PhysicalMemory(ram_pages=8, nvram_pages=8)))
    >>> here = do_mmap(mm, None, 1, VM_READ | VM_WRITE)
    >>> page = access(mm, here, write=True).pte >> 12
    >>> pipe = Pipe(mm.machine)
    >>> pipe.vmsplice(mm, here, 16), mm.machine.memory.ref[page]
    (16, 2)
    >>> pipe.read(16), mm.machine.memory.ref[page]
    (16, 1)
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        #: (bytes left, page held or -1)
        self._buffers: list[tuple[int, int]] = []

    def write(self, count: int) -> int:
        """Append a buffer of ``count`` copied bytes; return ``count``."""
        self._buffers.append((count, -1))
        return count

    def vmsplice(self, mm: MmStruct, address: int, count: int) -> int:
        """Put the pages themselves into the pipe; bytes, or get_user_pages' errno (rule G6)."""
        total = 0
        for at, part in _pieces(address, count):
            done, held = get_user_pages_fast(mm, at)
            if done < 0:
                return done if done == LIVELOCK else total or done
            self._buffers.append((part, held[0]))
            total += part
        return total

    def read(self, count: int) -> int:
        """Read up to ``count`` bytes of the first buffer; -EAGAIN if there is none."""
        if not self._buffers:
            return -errno.EAGAIN
        left, page = self._buffers[0]
        taken = min(left, count)
        if taken < left:
            self._buffers[0] = (left - taken, page)
        else:
            del self._buffers[0]
            if page >= 0:
                self._machine.release(page)
        return taken


def take_page(
    mm: MmStruct, address: int, *, write: bool, force: bool, fast: bool, pin: bool
) -> tuple[int, list[int]]:
    """Take one page by one of get_user_pages, get_user_pages_fast, pin_user_pages_fast."""
    if fast:
        return get_user_pages_fast(mm, address, write=write, force=force, pin=pin)
    return get_user_pages(mm, address, write=write, force=force)


def clear_refs(mm: MmStruct, value: int) -> int:
    """Write ``value`` to /proc/PID/clear_refs. 0 or -EINVAL.

    1, 2 and 3 clear the young bits of counted PTEs (all, of anonymous VMAs, of file VMAs): a raw
    PTE has no page, so it stays young. 4 write-protects every PTE, raw ones too, so that the next
    write is seen as a soft-dirty bit, and makes shared VMAs write-notified. The PTEs of PFNMAP
    VMAs are passed over, but 4 makes these write-notified too, for PTEs to come.
    """
    if not 1 <= value <= 5:
        return -errno.EINVAL
    for vma in list(mm) if value < 5 else []:
        if value == 4 and mm.machine.soft_dirty:
            vma.flags |= VM_SOFTDIRTY_TRACKED
            vma.set_page_prot()
        if vma.flags & VM_PFNMAP:
            continue
        if (value == 2 and vma.file is not None) or (value == 3 and vma.file is None):
            continue
        if value == 4:
            _clear_soft_dirty(vma)
            continue
        for address, pte in mm.tables.populated(vma.start, vma.end):
            if pte & PTE_PRESENT and mm.machine.vm_normal_page(vma, address, pte) >= 0:
                mm.tables.set(address, pte & ~PTE_YOUNG)
    return 0


def _clear_soft_dirty(vma: Vma) -> None:
    mm = vma.mm
    if not mm.machine.soft_dirty:
        return
    memory = mm.machine.memory
    for address, pte in mm.tables.populated(vma.start, vma.end):
        if not pte & PTE_PRESENT or not pte & PTE_WRITE:
            continue
        page = mm.machine.vm_normal_page(vma, address, pte)
        pinned = page >= 0 and mm.has_pinned and memory.ref[page] >= GUP_PIN_COUNTING_BIAS
        if not (pinned and is_cow_mapping(vma.flags)):
            mm.tables.set(address, pte & ~PTE_WRITE)
