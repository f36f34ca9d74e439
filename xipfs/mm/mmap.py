"""System calls that change VMAs: mmap, munmap, mprotect, and how VMAs split and merge.

Addresses are bytes, page aligned; a call returns 0 (mmap: the address) or a negative errno. A live
mount passes the addresses the real kernel chose; without one the model picks a free place that is
aligned to a page table.
"""

from __future__ import annotations

import errno

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE
from xipfs.mm.flags import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_LOCKED,
    VM_MAYEXEC,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_SHARED,
    VM_SOFTDIRTY_TRACKED,
    VM_WRITE,
)
from xipfs.mm.mm_struct import MmStruct, vma_close
from xipfs.mm.populate import mm_populate, populate_vma_page_range
from xipfs.mm.pte import PTE_CHG_MASK, PTE_DIRTY, PTE_PRESENT, PTE_WRITE
from xipfs.mm.vma import MappedFile, Vma
from xipfs.mm.zap import free_pgtables, remove_vma, zap_page_range
from xipfs.units import PAGE_SHIFT

_MAY = VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC


def calc_vm_flags(prot: int, *, shared: bool, file_writable: bool) -> int:
    """Return the VM_* flags of a new mapping (do_mmap; rule N1).

    ``prot`` is VM_READ, VM_WRITE, VM_EXEC or-ed. A shared mapping of a file that was opened for
    reading loses SHARED and MAYWRITE but keeps MAYSHARE, so it is not a COW mapping.
    """
    flags = prot & VM_ACCESS_FLAGS | _MAY
    if shared:
        flags |= VM_SHARED | VM_MAYSHARE
        if not file_writable:
            flags &= ~(VM_MAYWRITE | VM_SHARED)
    return flags


def do_mmap(
    mm: MmStruct,
    file: MappedFile | None,
    pages: int,
    prot: int,
    *,
    pgoff: int = 0,
    shared: bool = False,
    file_writable: bool = True,
    address: int | None = None,
    populate: bool = False,
    locked: bool = False,
    extra_flags: int = 0,
    tag: object = None,
) -> int:
    """Map ``pages`` pages of ``file`` (None: anonymous) from file page ``pgoff``.

    Returns the address or a negative errno. ``address`` replaces what was there (MAP_FIXED).
    ``extra_flags`` are VM_* flags the filesystem's ->mmap would set (VM_MIXEDMAP). ``populate``
    and ``locked`` are MAP_POPULATE and MAP_LOCKED; MCL_FUTURE acts through ``mm.def_flags``.

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> from xipfs.mm import VM_READ, VM_WRITE, Machine, MmStruct
    >>> mm = MmStruct(Machine(PhysicalMemory(ram_pages=8, nvram_pages=8)))
    >>> address = do_mmap(mm, None, 4, VM_READ | VM_WRITE)
    >>> mm.find_vma(address).pages
    4
    """
    if pages <= 0:
        return -errno.EINVAL
    if file is not None and shared and prot & VM_WRITE and not file_writable:
        return -errno.EACCES
    if address is None:
        address = mm.unused_area(pages)
    end = address + (pages << PAGE_SHIFT)
    flags = calc_vm_flags(prot, shared=shared, file_writable=file_writable or file is None)
    if flags & (VM_WRITE | VM_SHARED) == VM_WRITE:
        flags |= VM_ACCOUNT
    wants_lock = locked or bool(mm.def_flags & VM_LOCKED)
    for old in mm.isolate(address, end):
        remove_vma(old)
    vma = Vma(mm, address, end, flags | extra_flags, pgoff if file is not None else 0, file)
    vma.tag = tag
    if file is None:
        # Anonymous offsets count from address 0 in the kernel, which lets neighbours merge.
        vma.pgoff = 0
    error = call_mmap(vma)
    if error:
        return error
    mm.link(vma)
    vma.set_page_prot()
    if wants_lock and may_lock(vma):
        vma.flags |= VM_LOCKED
        mm.locked_vm += pages
    if wants_lock or populate:
        mm_populate(mm, address, end, ignore_errors=True)
    return address


def call_mmap(vma: Vma) -> int:
    """Run the file's ->mmap on a VMA that is not linked yet; undo its PTEs if it fails.

    vm_page_prot is then the plain protection: write-notify is decided after ->mmap (rule F9),
    so what ->mmap inserts into a shared writable VMA is writable at once.
    """
    mm = vma.mm
    if vma.file is None or vma.file.mmap is None:
        return 0
    if vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE | VM_SHARED:
        vma.page_prot |= PTE_WRITE
    mm.mmap_write_locked = True
    try:
        error = vma.file.mmap(vma)
    finally:
        mm.mmap_write_locked = False
    if error:
        zap_page_range(vma, vma.start, vma.end)
        free_pgtables(mm, vma.start, vma.end)
    return error


def may_lock(vma: Vma) -> bool:
    """Whether VM_LOCKED may be set on the VMA (rules K18 to K20)."""
    return not vma.is_special and not vma.is_dax


def do_munmap(mm: MmStruct, start: int, end: int) -> int:
    """Unmap [start, end); ranges that are not mapped are passed over."""
    if start >= end:
        return -errno.EINVAL
    for vma in mm.isolate(start, end):
        remove_vma(vma)
    return 0


def can_merge(area: Vma, neighbour: Vma) -> bool:
    """Whether ``area`` can be merged into the VMA next to it (can_vma_merge_*; rule K21)."""
    left, right = sorted((area, neighbour), key=lambda vma: vma.start)
    ops = left.vm_ops
    return (
        left.end == right.start
        and left.flags == right.flags
        and left.file is right.file
        and left.tag == right.tag
        and not left.is_special
        and (ops is None or ops.close is None)
        and (left.file is None or right.pgoff == left.pgoff + left.pages)
        and _anon_vma_fits(area, neighbour)
    )


def _anon_vma_fits(area: Vma, neighbour: Vma) -> bool:
    """is_mergeable_anon_vma(): the neighbour that grows must have an anon_vma, and only one.

    Its test for "only one" fails for none as well, so an area with private copies does not merge
    into a VMA that never had any, while the reverse works.
    """
    if area.anon_vma == neighbour.anon_vma:
        return True
    if area.anon_vma and neighbour.anon_vma:
        return False
    return neighbour.chain == 1 or not area.mm.machine.rules.kernel.merge_needs_anon_vma


def vma_merge(mm: MmStruct, area: Vma) -> Vma:
    """Merge ``area`` with the VMA before it and the one after it, where they are alike.

    Returns the VMA that ``area`` is now part of.
    """
    before, after = mm.neighbours(area)
    with_before = before is not None and can_merge(area, before)
    with_after = after is not None and can_merge(area, after)
    if with_before and with_after:
        assert before is not None
        assert after is not None
        ends = (before.anon_vma, after.anon_vma)
        with_after = ends[0] == ends[1] or not all(ends)
    if with_after:
        assert after is not None
        absorb(mm, area, after)
    if not with_before:
        return area
    assert before is not None
    absorb(mm, before, area)
    return before


def absorb(mm: MmStruct, left: Vma, right: Vma) -> None:
    """Make ``left`` cover ``right``, its neighbour, too."""
    mm.unlink(right)
    left.anon_vma = left.anon_vma or right.anon_vma
    left.chain = max(left.chain, right.chain)
    mm.adjust(left, left.start, right.end, left.pgoff)
    vma_close(right)


def change_flags(mm: MmStruct, vma: Vma, start: int, end: int, flags: int) -> Vma:
    """Give [start, end) of ``vma`` new VM flags, splitting it; return the piece (no merging)."""
    if vma.start < start:
        vma = mm.split(vma, start)
    if vma.end > end:
        mm.split(vma, end)
    vma.flags = flags
    vma.set_page_prot()
    return vma


def mprotect(mm: MmStruct, start: int, end: int, prot: int) -> int:
    """Change the permissions of [start, end) (rules K9, K10, P10). 0, -ENOMEM or -EACCES.

    A hole ends the call with -ENOMEM after the part before it was changed, as on Linux.
    """
    at = start
    for vma in mm.overlapping(start, end):
        if vma.start > at:
            return -errno.ENOMEM
        if prot & VM_WRITE and not vma.flags & VM_MAYWRITE:
            return -errno.EACCES
        stop = min(vma.end, end)
        old = vma.flags
        new = old & ~VM_ACCESS_FLAGS | prot
        if new != old:
            if prot & VM_WRITE and not old & VM_SHARED:
                # Accounted once and for all: taking the permission back leaves the flag.
                new |= VM_ACCOUNT
            first = max(vma.start, start)
            piece = vma_merge(mm, change_flags(mm, vma, first, stop, new))
            change_protection(piece, first, stop)
            if old & (VM_WRITE | VM_SHARED | VM_LOCKED) == VM_LOCKED and new & VM_WRITE:
                # Memory that is locked takes its write faults now (mprotect_fixup).
                populate_vma_page_range(piece, first, stop)
        at = stop
    return 0 if at >= end else -errno.ENOMEM


def change_protection(vma: Vma, start: int, end: int) -> None:
    """Rewrite the permission bits of present PTEs; pfn and kind stay (rules K9, P10)."""
    mm = vma.mm
    for address, pte in mm.tables.populated(start, end):
        if not pte & PTE_PRESENT:
            continue
        new = pte & PTE_CHG_MASK | PTE_PRESENT | vma.page_prot & PTE_WRITE
        if not new & PTE_WRITE and can_change_pte_writable(vma, address, new):
            new |= PTE_WRITE
        if new != pte:
            mm.tables.set(address, new)


def can_change_pte_writable(vma: Vma, address: int, pte: int) -> bool:
    """Whether mprotect may spare the next write its fault (rule K9)."""
    machine = vma.mm.machine
    if not vma.flags & VM_WRITE or vma.flags & VM_SOFTDIRTY_TRACKED:
        return False
    if vma.flags & VM_SHARED:
        return bool(vma.write_notified and pte & PTE_DIRTY)
    if not machine.rules.kernel.mprotect_upgrades_anon:
        return False
    if not pte & PTE_DIRTY and not machine.rules.kernel.mprotect_upgrades_clean:
        return False
    page = machine.vm_normal_page(vma, address, pte)
    exclusive = PG_ANON | PG_ANON_EXCLUSIVE
    return page >= 0 and machine.memory.flags[page] & exclusive == exclusive
