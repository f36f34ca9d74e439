"""madvise and msync: what each advice does to VMAs and PTEs, and what PFNMAP and MIXED refuse.

An advice that a kernel was not built with, or does not know yet, is EINVAL. What the memory
management is only hinted at (read-ahead, huge pages) leaves its flag and nothing else here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from xipfs.memory.frames import PG_ANON, PG_DIRTY, PG_LRU, PG_SWAPCACHE
from xipfs.mm.flags import (
    FOLL_TOUCH,
    FOLL_WRITE,
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_DONTEXPAND,
    VM_HUGEPAGE,
    VM_IO,
    VM_LOCKED,
    VM_MAYSHARE,
    VM_MERGEABLE,
    VM_MIXEDMAP,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_WIPEONFORK,
    VM_WRITE,
)
from xipfs.mm.gup import check_vma_flags, get_user_pages_locked
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import change_flags, vma_merge
from xipfs.mm.pte import PTE_DIRTY, PTE_PRESENT, PTE_SWAP, PTE_YOUNG, pte_pfn
from xipfs.mm.swapin import pageout_page, read_swap_cache
from xipfs.mm.vma import Vma
from xipfs.mm.zap import zap_page_range, zap_pte
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

#: Advice that sets flags: the flags taken away, the flags given.
_FLAGS: Final[dict[str, tuple[int, int]]] = {
    "MADV_NORMAL": (VM_RAND_READ | VM_SEQ_READ, 0),
    "MADV_RANDOM": (VM_SEQ_READ, VM_RAND_READ),
    "MADV_SEQUENTIAL": (VM_RAND_READ, VM_SEQ_READ),
    "MADV_DONTFORK": (0, VM_DONTCOPY),
    "MADV_DOFORK": (VM_DONTCOPY, 0),
    "MADV_DONTDUMP": (0, VM_DONTDUMP),
    "MADV_DODUMP": (VM_DONTDUMP, 0),
    "MADV_WIPEONFORK": (0, VM_WIPEONFORK),
    "MADV_KEEPONFORK": (VM_WIPEONFORK, 0),
    "MADV_HUGEPAGE": (VM_NOHUGEPAGE, VM_HUGEPAGE),
    "MADV_NOHUGEPAGE": (VM_HUGEPAGE, VM_NOHUGEPAGE),
    "MADV_MERGEABLE": (0, VM_MERGEABLE),
    "MADV_UNMERGEABLE": (VM_MERGEABLE, 0),
}
#: KSM passes these by without an error (rule K21).
_KSM_IGNORES: Final = (
    VM_SHARED | VM_MAYSHARE | VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_MIXEDMAP | VM_MERGEABLE
)


def madvise(mm: MmStruct, start: int, end: int, advice: str) -> int:
    """Apply ``advice`` (its MADV_ name) to [start, end). 0 or a negative errno.

    A hole is -ENOMEM after everything mapped was advised; any other error ends the call.

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> from xipfs.mm import VM_READ, Machine, MmStruct, do_mmap
    >>> mm = MmStruct(Machine(PhysicalMemory(ram_pages=8, nvram_pages=8)))
    >>> here = do_mmap(mm, None, 4, VM_READ)
    >>> madvise(mm, here, here + 2 * 4096, "MADV_DONTFORK"), len(mm)
    (0, 2)
    """
    if not _known(mm.machine, advice) or start & PAGE_SIZE - 1 or end < start:
        return -errno.EINVAL
    if start == end:
        return 0
    if advice.startswith("MADV_POPULATE"):
        return _populate(mm, start, end, write=advice.endswith("WRITE"))
    at, result = start, 0
    for vma in mm.overlapping(start, end):
        if vma.start > at:
            result = -errno.ENOMEM
        at = min(vma.end, end)
        if advice in _FLAGS:
            error = _change(vma, max(vma.start, start), at, advice)
        else:
            error = _ACTIONS[advice](vma, max(vma.start, start), at)
        if error:
            return error
    return result if at >= end else -errno.ENOMEM


def _known(machine: Machine, advice: str) -> bool:
    kernel = machine.rules.kernel
    if advice.endswith("HUGEPAGE"):
        return machine.thp
    if advice.endswith("MERGEABLE"):
        return machine.ksm
    if advice.startswith("MADV_POPULATE"):
        return kernel.madv_populate
    if advice in ("MADV_COLD", "MADV_PAGEOUT"):
        return kernel.madv_cold
    if advice in ("MADV_FREE", "MADV_WIPEONFORK", "MADV_KEEPONFORK"):
        return kernel.madv_free
    return advice in _FLAGS or advice in _ACTIONS


def _change(vma: Vma, start: int, end: int, advice: str) -> int:
    """Advice that only changes VMA flags, splitting and merging as needed."""
    if advice == "MADV_DOFORK" and vma.flags & VM_IO:
        return -errno.EINVAL
    if advice == "MADV_DODUMP" and vma.is_special:
        return -errno.EINVAL
    if advice == "MADV_WIPEONFORK" and (vma.file is not None or vma.flags & VM_SHARED):
        return -errno.EINVAL
    if advice == "MADV_MERGEABLE" and (vma.flags & _KSM_IGNORES or vma.is_dax):
        return 0
    cleared, given = _FLAGS[advice]
    flags = vma.flags & ~cleared | given
    if flags != vma.flags:
        piece = change_flags(vma.mm, vma, start, end, flags)
        vma_merge(vma.mm, piece)
    return 0


def _populate(mm: MmStruct, start: int, end: int, *, write: bool) -> int:
    """MADV_POPULATE_READ and _WRITE: fault in as an access would, reporting failure.

    A mapping that cannot be accessed so (PFNMAP too, rule G1) is -EINVAL; raw PTEs of a MIXED one
    are as good as any.
    """
    at = start
    while at < end:
        vma = mm.find_vma(at)
        if vma is None:
            return -errno.ENOMEM
        flags = FOLL_TOUCH | (FOLL_WRITE if write else 0)
        if check_vma_flags(vma, flags):
            return -errno.EINVAL
        stop = min(vma.end, end)
        done, error, _ = get_user_pages_locked(mm, at, stop - at >> PAGE_SHIFT, flags)
        if not done:
            return error if error in (-errno.EFAULT, -errno.ENOMEM) else -errno.ENOMEM
        at += done << PAGE_SHIFT
    return 0


def _dontneed(vma: Vma, start: int, end: int) -> int:
    """Zap, private copies too (rule K12)."""
    if vma.flags & (VM_LOCKED | VM_PFNMAP):
        return -errno.EINVAL
    zap_page_range(vma, start, end)
    return 0


def _dontneed_locked(vma: Vma, start: int, end: int) -> int:
    if vma.flags & VM_PFNMAP:
        return -errno.EINVAL
    zap_page_range(vma, start, end)
    return 0


def _free(vma: Vma, start: int, end: int) -> int:
    """Anonymous pages may be dropped instead of swapped: swap entries go, PTEs become clean."""
    if vma.flags & (VM_LOCKED | VM_PFNMAP) or not vma.is_anonymous:
        return -errno.EINVAL
    mm = vma.mm
    for address, pte in mm.tables.populated(start, end):
        if not pte & PTE_PRESENT:
            zap_pte(vma, address, pte)
            continue
        page = mm.machine.vm_normal_page(vma, address, pte)
        if page < 0 or not can_become_clean(mm.machine, page):
            continue
        mm.tables.set(address, pte & ~(PTE_YOUNG | PTE_DIRTY))
    return 0


def can_become_clean(machine: Machine, page: int) -> bool:
    """Whether MADV_FREE may take an anonymous page's content for worthless.

    A page that is dirty itself or in the swap cache must be mapped once; of any other page this
    PTE is made clean even if other processes have theirs (madvise_free_pte_range).
    """
    flags = machine.memory.flags[page]
    if not flags & (PG_DIRTY | PG_SWAPCACHE):
        return True
    if machine.memory.map[page] != 1:
        return False
    if flags & PG_SWAPCACHE and not machine.swap.try_to_free(machine.memory, page):
        return False
    machine.memory.flags[page] &= ~PG_DIRTY
    return True


def _remove(vma: Vma, start: int, end: int) -> int:
    """Punch a hole into the file, which only files that can do it allow."""
    if vma.flags & VM_LOCKED or vma.file is None:
        return -errno.EINVAL
    if vma.flags & (VM_SHARED | VM_WRITE) != VM_SHARED | VM_WRITE:
        return -errno.EACCES
    if not vma.file.regular:
        return -errno.ENODEV
    if vma.file.punch_hole is None:
        return -errno.EOPNOTSUPP
    first = vma.pgoff_of(start)
    return vma.file.punch_hole(first, end - start >> PAGE_SHIFT)


def _willneed(vma: Vma, start: int, end: int) -> int:
    """MADV_WILLNEED: no PTE changes, but anonymous pages come back into the swap cache.

    Of files only those would be read ahead whose device asks for it; no recorded one does.
    """
    if vma.file is None:
        for _, pte in vma.mm.tables.populated(start, end):
            if pte & PTE_SWAP:
                read_swap_cache(vma, pte_pfn(pte))
    return 0


def _cold(vma: Vma, start: int, end: int) -> int:
    if vma.flags & (VM_LOCKED | VM_PFNMAP):
        return -errno.EINVAL
    _deactivate(vma, start, end)
    return 0


def _pageout(vma: Vma, start: int, end: int) -> int:
    if vma.flags & (VM_LOCKED | VM_PFNMAP):
        return -errno.EINVAL
    _deactivate(vma, start, end)
    mm = vma.mm
    flags = mm.machine.memory.flags
    for address, pte in mm.tables.populated(start, end):
        if not pte & PTE_PRESENT:
            continue
        page = mm.machine.vm_normal_page(vma, address, pte)
        if page < 0:
            continue
        if flags[page] & PG_ANON:
            pageout_page(mm, vma, address, pte)
        elif flags[page] & PG_LRU and vma.file is not None and vma.file.reclaim is not None:
            vma.file.reclaim(vma.pgoff_of(address))
    return 0


def _deactivate(vma: Vma, start: int, end: int) -> None:
    """Make PTEs old whose page is on the LRU and mapped once; raw PTEs have no page (K22)."""
    mm = vma.mm
    memory = mm.machine.memory
    for address, pte in mm.tables.populated(start, end):
        if not pte & PTE_PRESENT:
            continue
        page = mm.machine.vm_normal_page(vma, address, pte)
        if page >= 0 and memory.flags[page] & PG_LRU and memory.map[page] == 1:
            mm.tables.set(address, pte & ~PTE_YOUNG)


_ACTIONS: Final[dict[str, Callable[[Vma, int, int], int]]] = {
    "MADV_DONTNEED": _dontneed,
    "MADV_DONTNEED_LOCKED": _dontneed_locked,
    "MADV_FREE": _free,
    "MADV_REMOVE": _remove,
    "MADV_WILLNEED": _willneed,
    "MADV_COLD": _cold,
    "MADV_PAGEOUT": _pageout,
}


def msync(
    mm: MmStruct,
    start: int,
    end: int,
    *,
    sync: bool = False,
    asynchronous: bool = False,
    invalidate: bool = False,
) -> int:
    """Flush [start, end) (rule K13). 0 or a negative errno.

    Only MS_SYNC on a shared VMA does anything: it calls the file's fsync. PTEs are not looked
    at, so dirty bits of raw ones are nobody's business (K13) unless the file's own fsync is DAX's
    (K14).
    """
    if (sync and asynchronous) or start & PAGE_SIZE - 1 or end < start:
        return -errno.EINVAL
    at, result = start, 0
    for vma in mm.overlapping(start, end):
        if vma.start > at:
            result = -errno.ENOMEM
        first, at = max(vma.start, start), min(vma.end, end)
        if invalidate and vma.flags & VM_LOCKED:
            return -errno.EBUSY
        if sync and vma.file is not None and vma.flags & VM_SHARED:
            if not vma.file.has_fsync:
                return -errno.EINVAL
            if vma.file.fsync is not None:
                vma.file.fsync(vma.pgoff_of(first), at - first >> PAGE_SHIFT)
    return result if at >= end else -errno.ENOMEM
