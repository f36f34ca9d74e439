"""What one PTE adds to and takes from the counters (rules P7, F3, K6).

Every PTE of the model is put in place and taken away through these functions, so this is the one
place where a normal PTE counts and a raw one does not.
"""

from __future__ import annotations

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE, PG_LRU, PG_SWAPBACKED
from xipfs.mm.flags import VM_ACCESS_FLAGS, VM_SOFTDIRTY_TRACKED
from xipfs.mm.machine import MM_ANONPAGES, MM_FILEPAGES, MM_SHMEMPAGES
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.vma import Vma


def mm_counter(page_flags: int) -> int:
    """Return which rss counter a page with these flags belongs to (mm_counter, rule F3)."""
    if page_flags & PG_ANON:
        return MM_ANONPAGES
    return MM_SHMEMPAGES if page_flags & PG_SWAPBACKED else MM_FILEPAGES


def page_add_rmap(mm: MmStruct, pfn: int) -> None:
    """Count a normal PTE of ``mm`` that now maps ``pfn``: mapcount and rss (rules P7, F3).

    The reference the PTE holds is the caller's to take.
    """
    machine = mm.machine
    mapcount = machine.memory.map[pfn] + 1
    machine.memory.map[pfn] = mapcount
    kind = mm_counter(machine.memory.flags[pfn])
    mm.rss[kind] += 1
    machine.nr_normal_ptes += 1
    if kind == MM_ANONPAGES and mapcount == 1:
        machine.nr_anon_pages += 1


def page_remove_rmap(mm: MmStruct, pfn: int) -> None:
    """Undo ``page_add_rmap``; the caller drops the reference afterwards (rules K6, F18)."""
    machine = mm.machine
    mapcount = machine.memory.map[pfn] - 1
    assert mapcount >= 0, (pfn, mapcount, "rule K8: mapcount below zero")
    machine.memory.map[pfn] = mapcount
    flags = machine.memory.flags[pfn]
    kind = mm_counter(flags)
    mm.rss[kind] -= 1
    machine.nr_normal_ptes -= 1
    if kind == MM_ANONPAGES and mapcount == 0:
        machine.nr_anon_pages -= 1
        # With the last PTE gone nobody has the page to himself (__page_remove_rmap).
        machine.memory.flags[pfn] = flags & ~PG_ANON_EXCLUSIVE


def page_add_new_anon_rmap(mm: MmStruct, pfn: int) -> None:
    """Make a fresh frame an anonymous page mapped once and exclusively (rule F17)."""
    machine = mm.machine
    machine.memory.flags[pfn] = PG_ANON | PG_LRU | PG_ANON_EXCLUSIVE
    page_add_rmap(mm, pfn)


def raw_add(mm: MmStruct) -> None:
    """Count a raw PTE: in the model's own statistics and nowhere else (rule F3)."""
    mm.raw_ptes += 1
    mm.machine.nr_special_ptes += 1


def raw_remove(mm: MmStruct) -> None:
    """Undo ``raw_add``."""
    mm.raw_ptes -= 1
    mm.machine.nr_special_ptes -= 1


def anon_vma_prepare(vma: Vma) -> None:
    """Give the VMA an anon_vma, a compatible neighbour's if there is one (rules F17, K1).

    Sharing a neighbour's is what lets two VMAs merge again after a split (anon_vma_compatible).
    """
    if vma.anon_vma:
        return
    before, after = vma.mm.neighbours(vma)
    vma.chain = 1
    for left, right, other in ((vma, after, after), (before, vma, before)):
        if left is None or right is None or other is None or other.anon_vma == 0:
            continue
        if (
            left.end == right.start
            and left.file is right.file
            and other.chain == 1
            and not (left.flags ^ right.flags) & ~(VM_ACCESS_FLAGS | VM_SOFTDIRTY_TRACKED)
            and right.pgoff == left.pgoff + left.pages
        ):
            vma.anon_vma = other.anon_vma
            return
    vma.anon_vma = vma.mm.machine.new_anon_vma()
