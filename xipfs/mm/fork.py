"""fork(): which VMAs the child gets, and which PTEs with them (rules K1 to K5)."""

from __future__ import annotations

import errno

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE
from xipfs.mm import quirks, rules
from xipfs.mm.flags import VM_DONTCOPY, VM_LOCKED, VM_SHARED, VM_WIPEONFORK
from xipfs.mm.insert import maybe_mkwrite
from xipfs.mm.mm_struct import MmStruct, vma_open
from xipfs.mm.pte import (
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_SWP_EXCLUSIVE,
    PTE_WRITE,
    PTE_YOUNG,
    mk_pte,
    pte_pfn,
)
from xipfs.mm.rmap import page_add_new_anon_rmap, page_add_rmap, raw_add
from xipfs.mm.vma import Vma
from xipfs.mm.zap import exit_mmap

#: FOLL_PIN adds this much to a small page's refcount (rule G5).
GUP_PIN_COUNTING_BIAS = 1024


def dup_mmap(parent: MmStruct, name: object = None) -> MmStruct | int:
    """Return the child's address space, or -ENOMEM with the parent's counters unchanged (K5)."""
    machine = parent.machine
    if quirks.fork_fails(parent):
        return -errno.ENOMEM
    child = MmStruct(machine, name)
    for vma in list(parent):
        if vma.flags & VM_DONTCOPY:
            continue
        copy = child.clone_vma(vma, vma.start, vma.end, vma.pgoff)
        copy.flags &= ~VM_LOCKED
        if vma.flags & VM_WIPEONFORK:
            copy.anon_vma = copy.chain = 0
        elif copy.anon_vma:
            # The clone is linked to the parent's anon_vma and to one of its own (anon_vma_fork).
            copy.anon_vma = machine.new_anon_vma()
            copy.chain = vma.chain + 1
        child.link(copy)
        vma_open(copy)
        if not vma.flags & VM_WIPEONFORK and not copy_page_range(copy, vma):
            exit_mmap(child)
            return -errno.ENOMEM
    return child


def copy_page_range(dst: Vma, src: Vma) -> bool:
    """Copy the PTEs of ``src`` if the rules ask for it; False if memory ran out (rule K1)."""
    copies_mixed = src.mm.machine.rules.kernel.fork_copies_mixed
    if not rules.fork_needs_copy(src.flags, src.anon_vma != 0, copies_mixed):
        return True
    for address, pte in src.mm.tables.populated(src.start, src.end):
        if not pte & PTE_PRESENT:
            copy_swap_pte(dst, src, address, pte)
        elif not copy_present_pte(dst, src, address, pte):
            return False
    return True


def copy_swap_pte(dst: Vma, src: Vma, address: int, pte: int) -> None:
    """Share a swap entry; from now on neither side has it alone."""
    dst.mm.machine.swap.duplicate(pte_pfn(pte))
    pte &= ~PTE_SWP_EXCLUSIVE
    src.mm.tables.set(address, pte)
    dst.mm.tables.set(address, pte)
    dst.mm.swapents += 1


def copy_present_pte(dst: Vma, src: Vma, address: int, pte: int) -> bool:
    """Copy one present PTE (rules K2, K3, K4). False if a page was needed and none was there."""
    machine = src.mm.machine
    memory = machine.memory
    page = machine.vm_normal_page(src, address, pte)
    if page >= 0:
        flags = memory.flags[page]
        if flags & PG_ANON and must_copy_pinned(src.mm, page):
            return copy_pinned_page(dst, address, page)
        if flags & PG_ANON_EXCLUSIVE:
            memory.flags[page] = flags & ~PG_ANON_EXCLUSIVE
        memory.ref[page] += 1
        page_add_rmap(dst.mm, page)
    else:
        raw_add(dst.mm)
    if rules.is_cow_mapping(src.flags) and pte & PTE_WRITE:
        pte &= ~PTE_WRITE
        src.mm.tables.set(address, pte)
    if src.flags & VM_SHARED:
        pte &= ~PTE_DIRTY
    dst.mm.tables.set(address, pte & ~PTE_YOUNG)
    return True


def must_copy_pinned(mm: MmStruct, page: int) -> bool:
    """Whether the parent may have pinned this exclusive page (rules K4, G5)."""
    memory = mm.machine.memory
    if not mm.machine.rules.kernel.pin_bias or not mm.has_pinned:
        return False
    exclusive = bool(memory.flags[page] & PG_ANON_EXCLUSIVE)
    return exclusive and memory.ref[page] >= GUP_PIN_COUNTING_BIAS


def copy_pinned_page(dst: Vma, address: int, page: int) -> bool:
    """Give the child its own copy at once, so that the pin stays the parent's (rule K4)."""
    mm = dst.mm
    machine = mm.machine
    new = machine.alloc_page()
    if new < 0:
        return False
    if machine.data is not None:
        machine.data.copy(page, new)
    page_add_new_anon_rmap(mm, new)
    mm.tables.set(address, maybe_mkwrite(mk_pte(new, dst.page_prot) | PTE_DIRTY, dst))
    return True
