"""A touch of a swapped-out page (do_swap_page), and sending pages out (MADV_PAGEOUT)."""

from __future__ import annotations

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE, PG_LRU, PG_SWAPCACHE
from xipfs.mm.flags import (
    FAULT_FLAG_WRITE,
    VM_FAULT_ERROR,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
    VM_LOCKED,
)
from xipfs.mm.insert import maybe_mkwrite
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import (
    LEAF_SHIFT,
    PTE_DIRTY,
    PTE_SWAP,
    PTE_SWP_EXCLUSIVE,
    PTE_WRITE,
    mk_pte,
    pte_pfn,
)
from xipfs.mm.rmap import page_add_rmap, page_remove_rmap
from xipfs.mm.vma import Vma, Vmf
from xipfs.mm.wp import do_wp_page
from xipfs.units import PAGE_SHIFT

#: Pages of the largest swap read-ahead window (1 << page_cluster).
READAHEAD_PAGES = 8


def do_swap_page(vmf: Vmf) -> int:
    """Bring a page back: from the swap cache (minor) or the device (major, rule F4)."""
    vma = vmf.vma
    mm = vma.mm
    machine = mm.machine
    memory, swap = machine.memory, machine.swap
    entry = pte_pfn(vmf.orig_pte)
    write = bool(vmf.flags & FAULT_FLAG_WRITE)
    result = 0
    pfn = swap.cache.get(entry, -1)
    if pfn < 0:
        result = VM_FAULT_MAJOR
        if swap.counts[entry] == 1:
            pfn = read_page(vma, entry)
            if pfn < 0:
                return VM_FAULT_OOM
        else:
            pfn = swapin_readahead(vma, vmf.address, entry)
            if pfn < 0:
                return VM_FAULT_OOM
            memory.get_page(pfn)
    else:
        memory.get_page(pfn)
    cached = memory.flags[pfn] & PG_SWAPCACHE
    swap.free(entry)
    mm.swapents -= 1
    if cached and (vma.flags & VM_LOCKED or (write and memory.ref[pfn] == 2)):
        # Locked memory has no use for a copy in swap (should_try_to_free_swap).
        swap.try_to_free(memory, pfn)
    pte = mk_pte(pfn, vma.page_prot)
    exclusive = bool(vmf.orig_pte & PTE_SWP_EXCLUSIVE) or memory.ref[pfn] == 1
    if exclusive:
        memory.flags[pfn] |= PG_ANON_EXCLUSIVE
        if write:
            pte = maybe_mkwrite(pte | PTE_DIRTY, vma)
    page_add_rmap(mm, pfn)
    mm.tables.set(vmf.address, pte)
    if write and not pte & PTE_WRITE:
        vmf.orig_pte = pte
        result |= do_wp_page(vmf)
        if result & VM_FAULT_ERROR:
            result &= VM_FAULT_ERROR
    return result


def read_page(vma: Vma, entry: int) -> int:
    """Read ``entry`` into a fresh anonymous page (not yet mapped) and return it, or -1."""
    machine = vma.mm.machine
    pfn = machine.alloc_page()
    if pfn < 0:
        return -1
    machine.memory.flags[pfn] = PG_ANON | PG_LRU
    if machine.data is not None:
        machine.data.of(pfn)[:] = machine.swap.data[entry]
    return pfn


def swapin_readahead(vma: Vma, address: int, entry: int) -> int:
    """Read ``entry`` and its neighbours' entries into the swap cache (swap_vma_readahead).

    The window lies around the fault, or ahead of it when the previous swap-in of this VMA was
    the page next door; it is clamped to the VMA and to the page-table page.
    """
    mm = vma.mm
    swap = mm.machine.swap
    page = address >> PAGE_SHIFT
    first, end = _readahead_window(vma, page)
    low = max(first << PAGE_SHIFT, vma.start, address >> LEAF_SHIFT << LEAF_SHIFT)
    high = min(end << PAGE_SHIFT, vma.end, (address >> LEAF_SHIFT) + 1 << LEAF_SHIFT)
    entries = [pte_pfn(pte) for _, pte in mm.tables.populated(low, high) if pte & PTE_SWAP]
    for neighbour in entries or [entry]:
        read_swap_cache(vma, neighbour)
    return swap.cache.get(entry, -1)


def read_swap_cache(vma: Vma, entry: int) -> None:
    """Bring ``entry`` into the swap cache if it is not there (read_swap_cache_async)."""
    machine = vma.mm.machine
    if entry in machine.swap.cache:
        return
    pfn = read_page(vma, entry)
    if pfn >= 0:
        machine.swap.add_to_cache(machine.memory, entry, pfn)


def _readahead_window(vma: Vma, page: int) -> tuple[int, int]:
    previous, window, hits = vma.swap_readahead or (0, 0, 4)
    pages = hits + 2
    if hits == 0:
        pages = 2 if abs(page - previous) == 1 else 1
    else:
        pages = max(4, 1 << (pages - 1).bit_length())
    pages = max(min(pages, READAHEAD_PAGES), window // 2)
    vma.swap_readahead = (page, pages, 0)
    if pages == 1:
        return page, page + 1
    if page == previous + 1:
        return page, page + pages
    if page == previous - 1:
        return page - pages + 1, page + 1
    left = (pages - 1) // 2
    return page - left, page + pages - left


def pageout_page(mm: MmStruct, vma: Vma, address: int, pte: int) -> bool:
    """Swap out the anonymous page behind ``pte`` if this is its only PTE. Whether it went.

    MADV_PAGEOUT leaves pages alone that others map too (page_mapcount != 1), that are pinned,
    and everything off the LRU or without page (rule K22).
    """
    machine = mm.machine
    memory, swap = machine.memory, machine.swap
    page = machine.vm_normal_page(vma, address, pte)
    if page < 0 or not swap.on:
        return False
    flags = memory.flags[page]
    cached = bool(flags & PG_SWAPCACHE)
    if not flags & PG_ANON or not flags & PG_LRU or memory.map[page] != 1:
        return False
    if memory.ref[page] != 1 + cached:
        return False
    # A page of the swap cache goes back to the entry it has, which others may hold as well.
    entry = swap.reuse_entry(memory, page) if cached else swap.allocate(1)
    if machine.data is not None:
        swap.data[entry] = bytes(machine.data.of(page))
    exclusive = PTE_SWP_EXCLUSIVE if flags & PG_ANON_EXCLUSIVE else 0
    mm.tables.set(address, entry << 12 | PTE_SWAP | exclusive)
    mm.swapents += 1
    page_remove_rmap(mm, page)
    memory.put_page(page)
    return True
