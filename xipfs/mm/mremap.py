"""mremap: moving and resizing mappings with what their PTEs map (rule K11).

A PTE moves as it is: raw stays raw, counts and rss do not change. What changes is who finds it,
the VMA, whose pgoff keeps the linear rule of PFNMAP true at the new address (rule N8).
"""

from __future__ import annotations

import errno
from typing import Final

from xipfs.mm import quirks
from xipfs.mm.flags import (
    VM_DONTEXPAND,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_SHARED,
)
from xipfs.mm.mm_struct import MmStruct, vma_open
from xipfs.mm.mmap import absorb, can_merge, do_munmap
from xipfs.mm.populate import mm_populate
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4


def mremap(
    mm: MmStruct,
    address: int,
    old_pages: int,
    new_pages: int,
    flags: int = 0,
    *,
    new_address: int | None = None,
    in_place: bool | None = None,
) -> int:
    """Move or resize a mapping; return its address or a negative errno (rule K11).

    ``flags`` are MREMAP_ bits. ``in_place`` says whether a growing mapping finds room where it
    is, which the layout of a real address space decides; None lets the model's layout decide.

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> from xipfs.mm import VM_READ, VM_WRITE, Machine, MmStruct, access, do_mmap
    >>> mm = MmStruct(Machine(PhysicalMemory(ram_pages=8, nvram_pages=8)))
    >>> old = do_mmap(mm, None, 2, VM_READ | VM_WRITE)
    >>> frame = access(mm, old, write=True).pte >> 12
    >>> new = mremap(mm, old, 2, 4, MREMAP_MAYMOVE, in_place=False)
    >>> mm.tables.get(new) >> 12 == frame, mm.find_vma(new).pages, mm.find_vma(old)
    (True, 4, None)
    """
    old_end = address + (old_pages << PAGE_SHIFT)
    error = _bad_arguments(mm, address, old_pages, new_pages, flags)
    if error:
        return error
    vma = mm.find_vma(address)
    if vma is None:
        return -errno.EFAULT
    if flags & (MREMAP_FIXED | MREMAP_DONTUNMAP):
        return _mremap_to(mm, address, old_pages, new_pages, flags, new_address)
    new_end = address + (new_pages << PAGE_SHIFT)
    if old_pages >= new_pages:
        if old_pages > new_pages:
            do_munmap(mm, new_end, old_end)
        return address
    error = vma_to_resize(vma, address, old_pages, new_pages, flags)
    if error:
        return error
    if old_end == vma.end and old_pages:
        fits = not mm.overlapping(vma.end, new_end)
        if fits and in_place is not False:
            return _expand(vma, address, new_end)
    if not flags & MREMAP_MAYMOVE:
        return -errno.ENOMEM
    return move_vma(vma, address, old_pages, mm.unused_area(new_pages), new_pages, keep_old=False)


def _bad_arguments(mm: MmStruct, address: int, old_pages: int, new_pages: int, flags: int) -> int:
    known = MREMAP_MAYMOVE | MREMAP_FIXED
    if mm.machine.rules.kernel.mremap_dontunmap != "no":
        known |= MREMAP_DONTUNMAP
    moves = bool(flags & MREMAP_MAYMOVE)
    if flags & ~known or (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) and not moves):
        return -errno.EINVAL
    if flags & MREMAP_DONTUNMAP and old_pages != new_pages:
        return -errno.EINVAL
    if address & PAGE_SIZE - 1 or not new_pages:
        return -errno.EINVAL
    return 0


def vma_to_resize(vma: Vma, address: int, old_pages: int, new_pages: int, flags: int) -> int:
    """Refuse what may not be moved or grown (rule K11). 0 or a negative errno.

    Growing PFNMAP would make PTEs that nobody fills; MIXED may grow. Old size 0 asks for a second
    mapping of the same pages, which makes no sense of a private one.
    """
    kernel = vma.mm.machine.rules.kernel
    private = not vma.flags & (VM_SHARED | VM_MAYSHARE)
    if not old_pages and private and kernel.mremap_private_dup == "EINVAL":
        return -errno.EINVAL
    fixed_size = bool(vma.flags & (VM_DONTEXPAND | VM_PFNMAP))
    if flags & MREMAP_DONTUNMAP and fixed_size:
        return -errno.EINVAL
    if old_pages << PAGE_SHIFT > vma.end - address:
        return -errno.EFAULT
    if new_pages != old_pages and fixed_size:
        return -errno.EFAULT
    return 0


def _mremap_to(
    mm: MmStruct,
    address: int,
    old_pages: int,
    new_pages: int,
    flags: int,
    new_address: int | None,
) -> int:
    """mremap_to(): the caller names the place (FIXED), or keeps the old mapping (DONTUNMAP)."""
    if new_address is None or not flags & MREMAP_FIXED:
        new_address = mm.unused_area(new_pages)
    old_end = address + (old_pages << PAGE_SHIFT)
    new_end = new_address + (new_pages << PAGE_SHIFT)
    if new_address & PAGE_SIZE - 1 or (old_end > new_address and new_end > address):
        return -errno.EINVAL
    if flags & MREMAP_FIXED:
        do_munmap(mm, new_address, new_end)
    if old_pages > new_pages:
        do_munmap(mm, address + (new_pages << PAGE_SHIFT), old_end)
        old_pages = new_pages
    vma = mm.find_vma(address)
    if vma is None:
        return -errno.EFAULT
    error = vma_to_resize(vma, address, old_pages, new_pages, flags)
    if error:
        return error
    keep_old = bool(flags & MREMAP_DONTUNMAP)
    return move_vma(vma, address, old_pages, new_address, new_pages, keep_old=keep_old)


def _expand(vma: Vma, address: int, new_end: int) -> int:
    """Grow ``vma`` where it is, populating the new part if it is locked."""
    mm = vma.mm
    if quirks.expand_fails(vma):
        return -errno.ENOMEM
    old_end = vma.end
    mm.adjust(vma, vma.start, new_end, vma.pgoff)
    _, after = mm.neighbours(vma)
    if after is not None and can_merge(vma, after):
        absorb(mm, vma, after)
    if vma.flags & VM_LOCKED:
        mm.locked_vm += new_end - old_end >> PAGE_SHIFT
        mm_populate(mm, old_end, new_end, ignore_errors=True)
    return address


def move_vma(
    vma: Vma, address: int, old_pages: int, new_address: int, new_pages: int, *, keep_old: bool
) -> int:
    """Copy the VMA's part at ``address`` to ``new_address``, its PTEs with it; return that.

    Unless ``keep_old``, the old part is then unmapped. It is the copy that is made first, and
    the old VMA that is split, which is what a backer's open and close calls see.
    """
    mm = vma.mm
    old_end = address + (old_pages << PAGE_SHIFT)
    locked = bool(vma.flags & VM_LOCKED)
    copy_vma(vma, address, new_address, new_pages)
    move_page_tables(mm, address, old_end, new_address)
    if keep_old:
        # The copy is as long, so what is locked stays the same.
        vma.flags &= ~VM_LOCKED
        if (vma.start, vma.end) == (address, old_end):
            vma.anon_vma = vma.chain = 0
        return new_address
    if old_pages:
        do_munmap(mm, address, old_end)
    if locked:
        mm.locked_vm += new_pages
        if new_pages > old_pages:
            populate_from = new_address + (old_pages << PAGE_SHIFT)
            new_end = new_address + (new_pages << PAGE_SHIFT)
            mm_populate(mm, populate_from, new_end, ignore_errors=True)
    return new_address


def copy_vma(vma: Vma, address: int, new_address: int, new_pages: int) -> Vma:
    """Link a VMA at ``new_address`` that maps what ``vma`` maps from ``address`` on (rule N8)."""
    mm = vma.mm
    new_end = new_address + (new_pages << PAGE_SHIFT)
    copy = mm.clone_vma(vma, new_address, new_end, vma.pgoff_of(address))
    mm.link(copy)
    vma_open(copy)
    return copy


def move_page_tables(mm: MmStruct, start: int, end: int, new_start: int) -> int:
    """Move the PTEs of [start, end), swap entries too, unchanged; return how many."""
    tables = mm.tables
    moved = list(tables.populated(start, end))
    for address, _ in moved:
        tables.set(address, 0)
    for address, pte in moved:
        tables.set(address - start + new_start, pte)
    return len(moved)


def move_mapping(
    mm: MmStruct, start: int, end: int, new_start: int, new_end: int, *, keep_old: bool
) -> None:
    """Follow a real kernel's mremap, which has succeeded: [start, end) is now the new range.

    The new range may be longer, and may start where the old one does. The old range may span
    several VMAs here where the real kernel had merged them; the last one grows. Parts of it
    that are not mapped here (not known to the caller) stay so.
    """
    assert start < end, (start, end)
    assert new_end - new_start >= end - start, (start, end, new_start, new_end)
    if new_start == start:
        do_munmap(mm, end, new_end)
        last = mm.find_vma(end - 1)
        if last is not None:
            mm.adjust(last, last.start, new_end, last.pgoff)
        return
    assert end <= new_start or new_end <= start, (start, end, new_start, new_end)
    do_munmap(mm, new_start, new_end)
    for vma in mm.isolate(start, end):
        stop = new_end if vma.end == end else vma.end - start + new_start
        target = vma.start - start + new_start
        move_vma(vma, vma.start, vma.pages, target, stop - target >> PAGE_SHIFT, keep_old=keep_old)
