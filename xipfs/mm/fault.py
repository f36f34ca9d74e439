"""One page fault by the rules: section 4, from an empty PTE (this module) to a write (wp.py).

``handle_mm_fault`` takes exactly one fault, as the kernel does, and counts it (rule F1). Whether
the access then goes through is for the next try to find out: that is how a private write to an
untouched XIP page costs two faults (rule F11) without any code that says "two".
"""

from __future__ import annotations

from collections.abc import Iterable

from xipfs.memory.frames import PG_DIRTY
from xipfs.mm.bug import KernelBug
from xipfs.mm.flags import (
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    VM_FAULT_DONE_COW,
    VM_FAULT_ERROR,
    VM_FAULT_MAJOR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_PFNMAP,
    VM_SHARED,
    VM_WRITE,
)
from xipfs.mm.insert import do_no_pfn, maybe_mkwrite
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import (
    LEAF_SHIFT,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_SPECIAL,
    PTE_WRITE,
    PTE_YOUNG,
    mk_pte,
)
from xipfs.mm.rmap import anon_vma_prepare, page_add_new_anon_rmap, page_add_rmap, raw_add
from xipfs.mm.swapin import do_swap_page
from xipfs.mm.vma import NO_OPERATIONS, Vma, Vmf
from xipfs.mm.wp import do_page_mkwrite, do_wp_page
from xipfs.units import PAGE_MASK, PAGE_SHIFT

#: Pages of a fault-around window (fault_around_bytes, 64 KiB by default; rule F22).
FAULT_AROUND_PAGES = 16

_ENDS_FAULT = VM_FAULT_ERROR | VM_FAULT_NOPAGE


def handle_mm_fault(mm: MmStruct, address: int, flags: int) -> int:
    """Take one fault at ``address`` and return its VM_FAULT bits.

    ``flags`` is FAULT_FLAG_WRITE for a store. The VMA must exist and permit the access (the
    architecture's handler checks that; here ``access`` does). An error changes no counter but
    the fault event itself (rules F1, T11).
    """
    machine = mm.machine
    vma = mm.find_vma(address)
    assert vma is not None, hex(address)
    machine.pgfault += 1
    result = handle_pte_fault(Vmf(vma, address & PAGE_MASK, flags))
    if not result & VM_FAULT_ERROR:
        if result & VM_FAULT_MAJOR:
            machine.pgmajfault += 1
            mm.maj_flt += 1
        else:
            mm.min_flt += 1
    return result


def handle_pte_fault(vmf: Vmf) -> int:
    """Choose by the state of the PTE (handle_pte_fault; rule I15)."""
    tables = vmf.vma.mm.tables
    pte = vmf.orig_pte = tables.get(vmf.address)
    if not pte:
        return do_fault(vmf) if vmf.vma.vm_ops is not None else do_anonymous_page(vmf)
    if not pte & PTE_PRESENT:
        return do_swap_page(vmf)
    if vmf.flags & (FAULT_FLAG_WRITE | FAULT_FLAG_UNSHARE) and not pte & PTE_WRITE:
        return do_wp_page(vmf)
    # Somebody was faster, or the fault was spurious: only the accessed bits are brought up to date.
    dirty = PTE_DIRTY if vmf.flags & FAULT_FLAG_WRITE else 0
    tables.set(vmf.address, pte | PTE_YOUNG | dirty)
    return 0


def do_anonymous_page(vmf: Vmf) -> int:
    """First touch of memory without backer: the zero page for a read, else a page (rule P8)."""
    vma = vmf.vma
    mm = vma.mm
    machine = mm.machine
    if vma.flags & VM_SHARED and machine.rules.kernel.no_handler == "SIGBUS":
        return VM_FAULT_SIGBUS
    if not vmf.flags & FAULT_FLAG_WRITE and machine.rules.maps_zero_page:
        special = PTE_SPECIAL if machine.pte_special else 0
        mm.tables.set(vmf.address, mk_pte(machine.zero_pfn, vma.page_prot) | special)
        raw_add(mm)
        return 0
    pfn = machine.alloc_page()
    if pfn < 0:
        return VM_FAULT_OOM
    anon_vma_prepare(vma)
    page_add_new_anon_rmap(mm, pfn)
    pte = mk_pte(pfn, vma.page_prot)
    if vma.flags & VM_WRITE:
        pte |= PTE_WRITE | PTE_DIRTY
    mm.tables.set(vmf.address, pte)
    return 0


def do_fault(vmf: Vmf) -> int:
    """First touch of a file's page (do_fault; rules I15, I21, I22)."""
    vma = vmf.vma
    kernel = vma.mm.machine.rules.kernel
    ops = vma.vm_ops or NO_OPERATIONS
    if ops.nopfn is not None and ops.fault is None and kernel.nopfn:
        write = bool(vmf.flags & FAULT_FLAG_WRITE)
        return do_no_pfn(vma, vmf.address, ops.nopfn(vmf), write=write)
    if ops.fault is None:
        return VM_FAULT_SIGBUS if kernel.no_handler == "SIGBUS" else do_anonymous_page(vmf)
    if vma.flags & VM_PFNMAP and kernel.fault_in_pfnmap == "BUG":
        raise KernelBug("__do_fault", "vma->vm_flags & VM_PFNMAP")
    if not vmf.flags & FAULT_FLAG_WRITE:
        return do_read_fault(vmf)
    if vma.flags & VM_SHARED:
        return do_shared_fault(vmf)
    return do_cow_fault(vmf)


def call_fault(vmf: Vmf) -> int:
    """Ask the backer (__do_fault)."""
    assert vmf.vma.vm_ops is not None
    assert vmf.vma.vm_ops.fault is not None
    result = vmf.vma.vm_ops.fault(vmf)
    gave_page = vmf.page >= 0
    assert gave_page != bool(result & (_ENDS_FAULT | VM_FAULT_DONE_COW)), (result, vmf.page)
    return result


def do_read_fault(vmf: Vmf) -> int:
    """Read fault: fault-around first, then the handler (rules F5, F6, F22)."""
    ops = vmf.vma.vm_ops
    assert ops is not None
    if ops.map_pages is not None and vmf.vma.mm.machine.rules.kernel.fault_around:
        do_fault_around(vmf)
        if vmf.vma.mm.tables.get(vmf.address):
            return VM_FAULT_NOPAGE
    result = call_fault(vmf)
    if result & _ENDS_FAULT:
        return result
    return result | finish_fault(vmf)


def do_cow_fault(vmf: Vmf) -> int:
    """Write fault on an absent page of a private mapping: one copy, made now (F10, F11)."""
    vma = vmf.vma
    machine = vma.mm.machine
    copy = machine.alloc_page()
    if copy < 0:
        return VM_FAULT_OOM
    if machine.rules.kernel.handler_copies:
        # do_cow_fault() prepares first, so even a fault that fails leaves an anon_vma (rule K1).
        anon_vma_prepare(vma)
        vmf.cow_page = copy
    try:
        result = call_fault(vmf)
    except KernelBug:
        machine.put_page(copy)
        raise
    if result & _ENDS_FAULT:
        machine.put_page(copy)
        return result
    anon_vma_prepare(vma)
    if not result & VM_FAULT_DONE_COW:
        if machine.data is not None:
            machine.data.copy(vmf.page, copy)
        machine.put_page(vmf.page)
    vmf.page = copy
    return result | finish_fault(vmf)


def do_shared_fault(vmf: Vmf) -> int:
    """Write fault on an absent page of a shared mapping (rule F12)."""
    vma = vmf.vma
    machine = vma.mm.machine
    result = call_fault(vmf)
    if result & _ENDS_FAULT:
        return result
    assert vma.vm_ops is not None
    if vma.vm_ops.page_mkwrite is not None:
        vetoed = do_page_mkwrite(vmf)
        if vetoed:
            machine.put_page(vmf.page)
            return vetoed
    result |= finish_fault(vmf)
    if not result & _ENDS_FAULT:
        machine.memory.flags[vmf.page] |= PG_DIRTY
    return result


def finish_fault(vmf: Vmf) -> int:
    """Map the page the handler gave, whose reference becomes the PTE's (rules F5, F17)."""
    vma = vmf.vma
    mm = vma.mm
    if mm.tables.get(vmf.address):
        mm.machine.put_page(vmf.page)
        return VM_FAULT_NOPAGE
    pte = mk_pte(vmf.page, vma.page_prot)
    if vmf.flags & FAULT_FLAG_WRITE:
        pte = maybe_mkwrite(pte | PTE_DIRTY, vma)
    if vmf.flags & FAULT_FLAG_WRITE and not vma.flags & VM_SHARED:
        page_add_new_anon_rmap(mm, vmf.page)
    else:
        page_add_rmap(mm, vmf.page)
    mm.tables.set(vmf.address, pte)
    return 0


def do_fault_around(vmf: Vmf) -> int:
    """Map the cached neighbours of a read fault (rule F22). Returns how many PTEs it filled.

    The window is 16 pages, aligned in virtual address, its start moved up to the VMA's, its end
    cut by the VMA and by the page-table page.
    """
    vma = vmf.vma
    window = FAULT_AROUND_PAGES << PAGE_SHIFT
    start = max(vmf.address & ~(window - 1), vma.start)
    end = min(start + window, vma.end, (start >> LEAF_SHIFT) + 1 << LEAF_SHIFT)
    assert vma.vm_ops is not None
    assert vma.vm_ops.map_pages is not None
    last = vma.pgoff_of(end) - 1
    return filemap_map_pages(vma, vma.vm_ops.map_pages(vmf, vma.pgoff_of(start), last))


def filemap_map_pages(vma: Vma, cached: Iterable[tuple[int, int]]) -> int:
    """Map cached pages, given as (file index, pfn), into empty PTEs, without a fault (rule F22).

    Populated PTEs (raw ones too) are left alone. Returns how many PTEs were filled. A live mount
    feeds this with what the real kernel's fault-around mapped.
    """
    mm = vma.mm
    tables, memory = mm.tables, mm.machine.memory
    filled = 0
    for index, pfn in cached:
        address = vma.address_of(index)
        if not vma.start <= address < vma.end or tables.get(address):
            continue
        memory.get_page(pfn)
        page_add_rmap(mm, pfn)
        tables.set(address, mk_pte(pfn, vma.page_prot))
        filled += 1
    return filled
