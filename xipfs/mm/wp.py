"""A store to a PTE that is present but read-only: reuse it or copy the page (do_wp_page)."""

from __future__ import annotations

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE, PG_DIRTY, PG_SWAPCACHE
from xipfs.mm import rules
from xipfs.mm.flags import (
    FAULT_FLAG_MKWRITE,
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_UNSHARE,
    VM_FAULT_ERROR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
)
from xipfs.mm.insert import is_shared_writable, maybe_mkwrite
from xipfs.mm.pte import PTE_DIRTY, PTE_PRESENT, PTE_YOUNG, mk_pte, pte_pfn
from xipfs.mm.rmap import (
    anon_vma_prepare,
    page_add_new_anon_rmap,
    page_remove_rmap,
    raw_remove,
)
from xipfs.mm.vma import Vmf


def do_wp_page(vmf: Vmf) -> int:
    """Decide between reuse and copy (rules F12 to F20). VM_FAULT bits.

    With FAULT_FLAG_UNSHARE it only makes a shared anonymous page exclusive for a pin.
    """
    vma = vmf.vma
    machine = vma.mm.machine
    kernel = machine.rules.kernel
    unshare = bool(vmf.flags & FAULT_FLAG_UNSHARE)
    page = machine.vm_normal_page(vma, vmf.address, vmf.orig_pte)
    if page < 0:
        if unshare:
            return 0
        if is_shared_writable(vma) and kernel.raw_shared_write != "cow":
            return wp_pfn_shared(vmf)
        return wp_page_copy(vmf, -1)
    if machine.memory.flags[page] & PG_ANON:
        if may_reuse_anon(vmf, page):
            if not unshare:
                wp_page_reuse(vmf)
            return 0
    elif unshare:
        return 0
    elif is_shared_writable(vma):
        return wp_page_shared(vmf, page)
    return wp_page_copy(vmf, page)


def may_reuse_anon(vmf: Vmf, page: int) -> bool:
    """Whether the writer is the anonymous page's only user (rule F20)."""
    machine = vmf.vma.mm.machine
    memory = machine.memory
    flags = memory.flags[page]
    if machine.rules.kernel.anon_reuse == "mapcount":
        users = memory.map[page]
        if flags & PG_SWAPCACHE:
            users += machine.swap.count_of_cached(page)
        if users != 1:
            return False
        if flags & PG_SWAPCACHE:
            machine.swap.try_to_free(memory, page)
        return True
    if flags & PG_ANON_EXCLUSIVE:
        return True
    cached = bool(flags & PG_SWAPCACHE)
    if not rules.anon_may_be_reused_by_count(memory.ref[page], cached):
        return False
    if cached and not machine.swap.try_to_free(memory, page):
        return False
    memory.flags[page] |= PG_ANON_EXCLUSIVE
    return True


def wp_page_reuse(vmf: Vmf) -> None:
    """Make the PTE writable in place, whatever it maps."""
    pte = maybe_mkwrite(vmf.orig_pte | PTE_YOUNG | PTE_DIRTY, vmf.vma)
    vmf.vma.mm.tables.set(vmf.address, pte)


def wp_pfn_shared(vmf: Vmf) -> int:
    """Shared write to a raw PTE: ask ->pfn_mkwrite, then reuse; no page is dirtied (rule F13)."""
    vma = vmf.vma
    ops = vma.vm_ops
    asks = vma.mm.machine.rules.kernel.raw_shared_write == "pfn_mkwrite"
    if asks and ops is not None and ops.pfn_mkwrite is not None:
        vmf.flags |= FAULT_FLAG_MKWRITE
        result = ops.pfn_mkwrite(vmf)
        if result & (VM_FAULT_ERROR | VM_FAULT_NOPAGE):
            return result
        if vma.mm.tables.get(vmf.address) != vmf.orig_pte:
            return VM_FAULT_NOPAGE
    wp_page_reuse(vmf)
    return 0


def wp_page_shared(vmf: Vmf, page: int) -> int:
    """Shared write to a counted page: ask ->page_mkwrite, then reuse and dirty (rule F12)."""
    vma = vmf.vma
    if vma.vm_ops is not None and vma.vm_ops.page_mkwrite is not None:
        vmf.page = page
        vetoed = do_page_mkwrite(vmf)
        if vetoed:
            return vetoed
        if vma.mm.tables.get(vmf.address) != vmf.orig_pte:
            return VM_FAULT_NOPAGE
    wp_page_reuse(vmf)
    vma.mm.machine.memory.flags[page] |= PG_DIRTY
    return 0


def do_page_mkwrite(vmf: Vmf) -> int:
    """Call ->page_mkwrite; return the bits that end the fault, 0 if the write may pass.

    A handler whose page was truncated meanwhile answers NOPAGE, and the access is tried again.
    """
    assert vmf.vma.vm_ops is not None
    assert vmf.vma.vm_ops.page_mkwrite is not None
    vmf.flags |= FAULT_FLAG_MKWRITE
    return vmf.vma.vm_ops.page_mkwrite(vmf) & (VM_FAULT_ERROR | VM_FAULT_NOPAGE)


def wp_page_copy(vmf: Vmf, old: int) -> int:
    """Replace what the PTE maps by a private copy (rules F15 to F19).

    ``old`` is the counted page, -1 for a raw PTE, which leaves nothing to drop (rule F15).
    """
    vma = vmf.vma
    mm = vma.mm
    machine = mm.machine
    new = machine.alloc_page()
    if new < 0:
        return VM_FAULT_OOM
    anon_vma_prepare(vma)
    if old < 0 and copying_touches(vmf):
        machine.put_page(new)
        mm.tables.set(vmf.address, vmf.orig_pte | PTE_YOUNG)
        return 0
    if machine.data is not None:
        source = copy_source(vmf, old)
        if source >= 0:
            machine.data.copy(source, new)
    pte = mk_pte(new, vma.page_prot)
    if not vmf.flags & FAULT_FLAG_UNSHARE:
        pte = maybe_mkwrite(pte | PTE_DIRTY, vma)
    if old >= 0:
        page_remove_rmap(mm, old)
    else:
        raw_remove(mm)
    page_add_new_anon_rmap(mm, new)
    mm.tables.set(vmf.address, pte)
    if old >= 0:
        machine.swap.put_page(machine.memory, old)
    return 0


def copying_touches(vmf: Vmf) -> bool:
    """Whether copying a raw page changes its PTE, so that the copy is thrown away (F16, F19).

    The copy reads through the user address, which makes an old PTE young; the fault then finds
    another PTE than it set out with and leaves the write to the next one. So the first write to a
    raw page after fork takes two faults (recorded on both kernels). The zero page is not read.
    """
    old = not vmf.orig_pte & PTE_YOUNG
    return old and pte_pfn(vmf.orig_pte) != vmf.vma.mm.machine.zero_pfn


def copy_source(vmf: Vmf, old: int) -> int:
    """Return the pfn whose bytes a copy takes, or -1 for zeros (rules F16, F16a).

    A raw page is copied through the user address. With the machine's quirk "cow-through-current"
    that address is looked up in the current task, who for a forced write is somebody else.
    """
    machine = vmf.vma.mm.machine
    if old >= 0:
        return old
    pfn = pte_pfn(vmf.orig_pte)
    if pfn == machine.zero_pfn:
        return -1
    if vmf.flags & FAULT_FLAG_REMOTE and "cow-through-current" in machine.quirks:
        current = machine.current
        pte = current.tables.get(vmf.address) if current is not None else 0
        return pte_pfn(pte) if pte & PTE_PRESENT else -1
    return pfn
