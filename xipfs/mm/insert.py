"""Putting PTEs into place on a driver's behalf: section 3 of the rules.

Two families. ``vm_insert_page``, ``vm_insert_pfn``, ``vm_insert_mixed`` and ``remap_pfn_range``
answer 0 or a negative errno, as until 4.19. ``vmf_insert_pfn`` and ``vmf_insert_mixed`` answer
VM_FAULT bits: those of the era where it has them, otherwise what a fault handler of the time made
of the errno. A handler of the model calls the second family and needs to know no era.
"""

from __future__ import annotations

import errno

from xipfs.memory.frames import PG_ANON
from xipfs.mm import rules
from xipfs.mm.bug import KernelBug
from xipfs.mm.flags import (
    VM_DONTDUMP,
    VM_DONTEXPAND,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_IO,
    VM_MAYWRITE,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    VM_WRITE,
)
from xipfs.mm.pte import PTE_DEVMAP, PTE_DIRTY, PTE_SPECIAL, PTE_WRITE, PTE_YOUNG, mk_pte
from xipfs.mm.rmap import page_add_rmap, raw_add
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

#: NOPFN sentinels of the seed era (rule I17); they are no pfns of any machine.
NOPFN_SIGBUS = (1 << 52) - 1
NOPFN_OOM = (1 << 52) - 2
NOPFN_REFAULT = (1 << 52) - 3


def maybe_mkwrite(pte: int, vma: Vma) -> int:
    """Make ``pte`` writable if the VMA is (forced writes leave it read-only, rule F17)."""
    return pte | PTE_WRITE if vma.flags & VM_WRITE else pte


def mk_raw_pte(vma: Vma, pfn: int, prot: int) -> int:
    """Return a PTE without counted page: special, and devmap for device pages of that era."""
    machine = vma.mm.machine
    pte = mk_pte(pfn, prot)
    if pfn in machine.devmap_pfns and machine.rules.kernel.dax == "devmap":
        pte |= PTE_DEVMAP
    return pte | PTE_SPECIAL if machine.pte_special else pte


def insert_page(vma: Vma, address: int, pfn: int, prot: int, *, mkwrite: bool = False) -> int:
    """The core of vm_insert_page(): a normal PTE, counted (rule I8). 0 or a negative errno.

    ``mkwrite`` makes it writable, also if the same page is there already (rule I13).
    """
    mm = vma.mm
    memory = mm.machine.memory
    if memory.ref[pfn] == 0 or memory.flags[pfn] & PG_ANON:
        return -errno.EINVAL
    old = mm.tables.get(address)
    if old:
        if mkwrite and old >> 12 == pfn:
            mm.tables.set(address, maybe_mkwrite(old | PTE_DIRTY | PTE_YOUNG, vma))
        return -errno.EBUSY
    memory.ref[pfn] += 1
    page_add_rmap(mm, pfn)
    pte = mk_pte(pfn, prot)
    mm.tables.set(address, maybe_mkwrite(pte | PTE_DIRTY | PTE_YOUNG, vma) if mkwrite else pte)
    return 0


def insert_pfn(vma: Vma, address: int, pfn: int, prot: int, *, mkwrite: bool = False) -> int:
    """The core of vm_insert_pfn(): a raw PTE, counted nowhere (rules I6, I13).

    Returns 0, or -EBUSY if the PTE was populated; ``mkwrite`` then upgrades the same pfn.
    """
    mm = vma.mm
    old = mm.tables.get(address)
    if old:
        if mkwrite and old >> 12 == pfn:
            mm.tables.set(address, maybe_mkwrite(old | PTE_DIRTY | PTE_YOUNG, vma))
        return -errno.EBUSY
    pte = mk_raw_pte(vma, pfn, prot)
    if mkwrite:
        pte = maybe_mkwrite(pte | PTE_DIRTY | PTE_YOUNG, vma)
    mm.tables.set(address, pte)
    raw_add(mm)
    return 0


def outside(vma: Vma, address: int) -> bool:
    """Return whether ``address`` is not in the VMA."""
    return not vma.start <= address < vma.end


def vm_insert_page(vma: Vma, address: int, pfn: int) -> int:
    """Insert a page with struct page as a counted PTE (rules I8, I9, I12). 0 or -errno."""
    machine = vma.mm.machine
    kernel = machine.rules.kernel
    if outside(vma, address):
        return -errno.EFAULT
    if not machine.memory.pfn_valid(pfn) or machine.memory.ref[pfn] == 0:
        return -errno.EINVAL
    if pfn == machine.zero_pfn and kernel.checks_zero_page and not zero_page_allowed(vma):
        return -errno.EINVAL
    if not vma.flags & kernel.insert_page_flag:
        if kernel.insert_page_flag == VM_MIXEDMAP:
            if not vma.mm.mmap_write_locked:
                raise KernelBug("vm_insert_page", "mmap_read_trylock(vma->vm_mm)")
            if vma.flags & VM_PFNMAP:
                raise KernelBug("vm_insert_page", "vma->vm_flags & VM_PFNMAP")
        vma.flags |= kernel.insert_page_flag
    return insert_page(vma, address, pfn, vma.page_prot)


def zero_page_allowed(vma: Vma) -> bool:
    """Whether the zero page may stand in this VMA (vm_mixed_zeropage_allowed; rule I12)."""
    if rules.is_cow_mapping(vma.flags) or not vma.flags & (VM_WRITE | VM_MAYWRITE):
        return True
    has_mkwrite = vma.vm_ops is not None and vma.vm_ops.pfn_mkwrite is not None
    return has_mkwrite and bool(vma.is_dax or vma.flags & VM_IO)


def _check_insert_pfn(vma: Vma, pfn: int) -> None:
    """The four BUG_ONs of vm_insert_pfn() (rule I5)."""
    where = "vm_insert_pfn"
    flags = vma.flags & (VM_PFNMAP | VM_MIXEDMAP)
    if not flags:
        raise KernelBug(where, "!(vma->vm_flags & (VM_PFNMAP|VM_MIXEDMAP))")
    if flags == VM_PFNMAP | VM_MIXEDMAP:
        raise KernelBug(where, "(vma->vm_flags & (VM_PFNMAP|VM_MIXEDMAP)) == both")
    if flags == VM_PFNMAP and rules.is_cow_mapping(vma.flags):
        raise KernelBug(where, "(vma->vm_flags & VM_PFNMAP) && is_cow_mapping(vma->vm_flags)")
    if flags == VM_MIXEDMAP and vma.mm.machine.memory.pfn_valid(pfn):
        raise KernelBug(where, "(vma->vm_flags & VM_MIXEDMAP) && pfn_valid(pfn)")


def vm_insert_pfn(vma: Vma, address: int, pfn: int) -> int:
    """Insert a raw PTE (rules I5, I6). 0, -EFAULT outside the VMA, -EBUSY if populated."""
    _check_insert_pfn(vma, pfn)
    if vma.mm.machine.rules.kernel.insert_pfn_checks_range and outside(vma, address):
        return -errno.EFAULT
    return insert_pfn(vma, address, pfn, vma.page_prot)


def vm_insert_mixed(vma: Vma, address: int, pfn: int, *, mkwrite: bool = False) -> int:
    """Insert ``pfn`` into a MIXED VMA: counted without the bit if it has a page (rules I10, N12).

    Returns 0 or a negative errno. A device page (devmap) is never counted here.
    """
    machine = vma.mm.machine
    kernel = machine.rules.kernel
    if not kernel.insert_mixed:
        raise KernelBug("vm_insert_mixed", "no such function in this era")
    if not vma.flags & VM_MIXEDMAP and not _mixed_ok_by_pfn(vma, pfn):
        if kernel.mixed_without_flag == "BUG":
            raise KernelBug("vm_insert_mixed", "!vm_mixed_ok(vma, pfn)")
        return -errno.EINVAL
    if outside(vma, address):
        return -errno.EFAULT
    if (
        kernel.checks_zero_page
        and pfn == machine.zero_pfn
        and (mkwrite or not zero_page_allowed(vma))
    ):
        return -errno.EINVAL
    counted = not machine.pte_special or (pfn in machine.devmap_pfns and kernel.dax == "counted")
    if counted and machine.memory.pfn_valid(pfn) and not _is_devmap(vma, pfn):
        if machine.pte_special is False and pfn == machine.zero_pfn and kernel.mixed_zero_is_raw:
            return insert_pfn(vma, address, pfn, vma.page_prot)
        return insert_page(vma, address, pfn, vma.page_prot, mkwrite=mkwrite)
    return insert_pfn(vma, address, pfn, vma.page_prot, mkwrite=mkwrite)


def _is_devmap(vma: Vma, pfn: int) -> bool:
    machine = vma.mm.machine
    return machine.rules.kernel.dax == "devmap" and pfn in machine.devmap_pfns


def _mixed_ok_by_pfn(vma: Vma, pfn: int) -> bool:
    """Pfns that vm_insert_mixed() takes in any VMA: zero page, device pages (rule I11)."""
    machine = vma.mm.machine
    kernel = machine.rules.kernel
    if not kernel.insert_returns_vm_fault:
        return False
    return pfn == machine.zero_pfn or (pfn in machine.devmap_pfns and kernel.dax != "mixed")


def handler_result(vma: Vma, error: int) -> int:
    """Turn an insertion's errno into what the era's fault handlers return (rules I7, I11, I14)."""
    kernel = vma.mm.machine.rules.kernel
    if error == -errno.EBUSY and kernel.ebusy_in_handler == "BUG":
        raise KernelBug("xip_file_fault", "err == -EBUSY")
    if error in (0, -errno.EBUSY):
        return VM_FAULT_NOPAGE
    return VM_FAULT_OOM if error == -errno.ENOMEM else VM_FAULT_SIGBUS


def vmf_insert_pfn(vma: Vma, address: int, pfn: int) -> int:
    """``vm_insert_pfn`` for a fault handler: VM_FAULT bits (rule I7)."""
    return handler_result(vma, vm_insert_pfn(vma, address, pfn))


def vmf_insert_mixed(vma: Vma, address: int, pfn: int, *, mkwrite: bool = False) -> int:
    """``vm_insert_mixed`` for a fault handler: VM_FAULT bits (rules I11, I13)."""
    kernel = vma.mm.machine.rules.kernel
    present = vma.mm.tables.get(address)
    error = vm_insert_mixed(vma, address, pfn, mkwrite=mkwrite)
    mismatch = mkwrite and error == -errno.EBUSY and present >> 12 != pfn
    if mismatch and kernel.mkwrite_mismatch == "SIGBUS" and pfn in vma.mm.machine.devmap_pfns:
        return VM_FAULT_SIGBUS
    return handler_result(vma, error)


def remap_pfn_range(vma: Vma, address: int, pfn: int, pages: int) -> int:
    """Map ``pages`` consecutive pfns raw, at once, making the VMA PFNMAP (rules I1 to I4).

    0 or a negative errno; a private VMA must be covered exactly, and gets vm_pgoff = ``pfn``.
    """
    mm = vma.mm
    kernel = mm.machine.rules.kernel
    if address & PAGE_SIZE - 1:
        return -errno.EINVAL
    whole = address == vma.start and address + (pages << PAGE_SHIFT) == vma.end
    if rules.is_cow_mapping(vma.flags):
        if not whole:
            return -errno.EINVAL
        vma.pgoff = pfn
    elif whole and kernel.remap_sets_shared_pgoff:
        vma.pgoff = pfn
    vma.flags |= VM_IO | VM_PFNMAP
    if kernel.remap_sets_dontexpand:
        vma.flags |= VM_DONTEXPAND | VM_DONTDUMP
    if pages <= 0:
        raise KernelBug("remap_pfn_range", "addr >= end")
    for page in range(pages):
        at = address + (page << PAGE_SHIFT)
        if mm.tables.get(at):
            raise KernelBug("remap_pte_range", "!pte_none(*pte)")
        mm.tables.set(at, mk_raw_pte(vma, pfn + page, vma.page_prot))
        raw_add(mm)
    return 0


def do_no_pfn(vma: Vma, address: int, pfn: int, *, write: bool) -> int:
    """Use what ->nopfn returned (rules I16 to I19). VM_FAULT bits; the seed's defects included."""
    mm = vma.mm
    flags = vma.flags & (VM_PFNMAP | VM_MIXEDMAP)
    where = "do_no_pfn"
    if not flags:
        raise KernelBug(where, "!(vma->vm_flags & (VM_PFNMAP|VM_MIXEDMAP))")
    if flags & VM_PFNMAP and rules.is_cow_mapping(vma.flags):
        raise KernelBug(where, "(vma->vm_flags & VM_PFNMAP) && is_cow_mapping(vma->vm_flags)")
    if flags & VM_MIXEDMAP and mm.machine.memory.pfn_valid(pfn):
        raise KernelBug(where, "(vma->vm_flags & VM_MIXEDMAP) && pfn_valid(pfn)")
    if pfn == NOPFN_OOM:
        return VM_FAULT_OOM
    if pfn == NOPFN_SIGBUS:
        return VM_FAULT_SIGBUS
    if pfn == NOPFN_REFAULT or mm.tables.get(address):
        return 0
    pte = mk_pte(pfn, vma.page_prot)
    if write:
        # Rule I19: no COW test here, so a private writable VMA writes to the medium.
        pte = maybe_mkwrite(pte | PTE_DIRTY, vma)
    mm.tables.set(address, pte)
    raw_add(mm)
    return 0


def is_shared_writable(vma: Vma) -> bool:
    """Whether stores go to the backer itself."""
    return vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE | VM_SHARED
