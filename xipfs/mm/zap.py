"""Taking PTEs away: unmap, exit, MADV_DONTNEED, truncate, and the reverse map of a file."""

from __future__ import annotations

from xipfs.memory.frames import PG_ANON, PG_DIRTY, PG_REFERENCED
from xipfs.mm.flags import VM_LOCKED
from xipfs.mm.mm_struct import MmStruct, vma_close
from xipfs.mm.pte import LEAF_SHIFT, PTE_DIRTY, PTE_PRESENT, PTE_YOUNG, pte_pfn
from xipfs.mm.rmap import page_remove_rmap, raw_remove
from xipfs.mm.vma import MappedFile, Vma
from xipfs.units import PAGE_SHIFT


def zap_pte(vma: Vma, address: int, pte: int) -> None:
    """Clear one non-empty PTE and undo what it counted (rules K6, F18).

    A file page inherits the dirty and young bits; a raw PTE's are lost.
    """
    mm = vma.mm
    machine = mm.machine
    mm.tables.set(address, 0)
    if not pte & PTE_PRESENT:
        entry = pte_pfn(pte)
        machine.swap.free(entry)
        machine.swap.drop_unused(machine.memory, entry)
        mm.swapents -= 1
        return
    page = machine.vm_normal_page(vma, address, pte)
    if page < 0:
        raw_remove(mm)
        return
    flags = machine.memory.flags
    if not flags[page] & PG_ANON:
        if pte & PTE_DIRTY:
            flags[page] |= PG_DIRTY
        if pte & PTE_YOUNG:
            flags[page] |= PG_REFERENCED
    page_remove_rmap(mm, page)
    machine.swap.put_page(machine.memory, page)


def zap_page_range(vma: Vma, start: int, end: int, *, even_cows: bool = True) -> int:
    """Clear the PTEs of [start, end) within ``vma``; return how many were cleared (rules K6, K7).

    ``even_cows=False`` keeps private copies and swap entries; raw PTEs always go, since they
    have no page whose mapping could be compared.
    """
    assert vma.start <= start <= end <= vma.end, (vma, hex(start), hex(end))
    machine = vma.mm.machine
    cleared = 0
    for address, pte in vma.mm.tables.populated(start, end):
        if not even_cows:
            if not pte & PTE_PRESENT:
                continue
            page = machine.vm_normal_page(vma, address, pte)
            if page >= 0 and machine.memory.flags[page] & PG_ANON:
                continue
        zap_pte(vma, address, pte)
        cleared += 1
    return cleared


def unmap_mapping_range(file: MappedFile, index: int, pages: int, *, even_cows: bool) -> int:
    """Clear every PTE of file pages [index, index + pages) in all address spaces (rules R1, K7).

    ``pages=0`` means to the end of the file. Returns how many PTEs were cleared.
    """
    end = index + pages if pages else 1 << 52
    cleared = 0
    for vma in file.i_mmap.overlapping(index, end):
        first = max(index, vma.pgoff)
        last = min(end, vma.pgoff + vma.pages)
        cleared += zap_page_range(
            vma, vma.address_of(first), vma.address_of(last), even_cows=even_cows
        )
    return cleared


def truncate_pagecache(file: MappedFile, size_bytes: int) -> int:
    """Unmap what lies wholly beyond the new size, private copies too (rules K15, K16).

    The caller has set the size already and drops its cached pages afterwards, then calls this
    again (a private copy may have slipped in between). Returns how many PTEs were cleared.
    """
    first = size_bytes + (1 << PAGE_SHIFT) - 1 >> PAGE_SHIFT
    return unmap_mapping_range(file, first, 0, even_cows=True)


def free_pgtables(mm: MmStruct, start: int, end: int) -> None:
    """Drop the page tables that no VMA around [start, end) uses any more (free_pgtables)."""
    floor, ceiling = 0, 1 << 64
    low = start >> LEAF_SHIFT << LEAF_SHIFT
    high = (end + (1 << LEAF_SHIFT) - 1) >> LEAF_SHIFT << LEAF_SHIFT
    for vma in mm.overlapping(low, high):
        if vma.start < start:
            floor = max(floor, vma.end)
        else:
            ceiling = min(ceiling, vma.start)
    mm.tables.free(max(low, floor), min(high, ceiling))


def remove_vma(vma: Vma) -> None:
    """Zap, close and unlink one whole VMA."""
    mm = vma.mm
    zap_page_range(vma, vma.start, vma.end)
    mm.unlink(vma)
    if vma.flags & VM_LOCKED:
        mm.locked_vm -= vma.pages
    vma_close(vma)
    free_pgtables(mm, vma.start, vma.end)


def exit_mmap(mm: MmStruct) -> None:
    """End an address space: every VMA goes, and every counter must come to 0 (rule T9)."""
    for vma in list(mm):
        remove_vma(vma)
    mm.machine.mms.remove(mm)
    left = (mm.swapents, mm.tables.table_pages())
    assert left == (0, 0), (mm.name, left)
    if mm.rss != [0, 0, 0] or mm.raw_ptes:
        report_bad_rss(mm)


def report_bad_rss(mm: MmStruct) -> None:
    """Record an address space that ends with rss left over (check_mm).

    Without the special bit a kernel can count a page when its PTE is made and not find it when
    the PTE goes (rule N7; vm_insert_page() into PFNMAP before 3.7): its reference leaks. With the
    bit that cannot be, so there it is this model that is wrong.
    """
    machine = mm.machine
    assert not machine.pte_special, (mm.name, mm.rss, mm.raw_ptes)
    machine.bad_rss += 1
    machine.nr_normal_ptes -= sum(mm.rss)
    machine.nr_special_ptes -= mm.raw_ptes
