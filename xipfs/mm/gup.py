"""get_user_pages: the kernel taking references on a process's pages (section 6).

A page taken stays held until ``Machine.release``; what FOLL_PIN adds to its count is 1024, but for
the zero page, which is not counted at all (recorded on 6.1).
"""

from __future__ import annotations

import errno

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE, PG_DIRTY, PG_REFERENCED
from xipfs.mm import rules
from xipfs.mm.fault import handle_mm_fault
from xipfs.mm.flags import (
    FAULT_FLAG_REMOTE,
    FAULT_FLAG_UNSHARE,
    FAULT_FLAG_WRITE,
    FOLL_DUMP,
    FOLL_FORCE,
    FOLL_GET,
    FOLL_LONGTERM,
    FOLL_PIN,
    FOLL_TOUCH,
    FOLL_WRITE,
    VM_ACCESS_FLAGS,
    VM_FAULT_ERROR,
    VM_FAULT_OOM,
    VM_IO,
    VM_MAYREAD,
    VM_MAYSHARE,
    VM_MAYWRITE,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
)
from xipfs.mm.fork import GUP_PIN_COUNTING_BIAS
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import PTE_DEVMAP, PTE_DIRTY, PTE_PRESENT, PTE_SPECIAL, PTE_WRITE, PTE_YOUNG
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

#: How often one page is tried before a livelock is called what it is (rule G2, seed).
LIVELOCK_TRIES = 16

_NO_PAGE = 0
_UNSHARE = -errno.EMLINK
#: The answer for a page that faults for ever: no errno, since the call never returns.
LIVELOCK = -1 << 20


def check_vma_flags(vma: Vma, gup_flags: int) -> int:
    """Refuse what no PTE could make right (rules G1, G7, F14). 0 or a negative errno."""
    kernel = vma.mm.machine.rules.kernel
    flags = vma.flags
    if flags & (VM_IO | VM_PFNMAP):
        return -errno.EFAULT
    if gup_flags & FOLL_LONGTERM and vma.is_dax:
        return -errno.EOPNOTSUPP
    if gup_flags & FOLL_WRITE:
        if not flags & VM_WRITE:
            if not gup_flags & FOLL_FORCE:
                return -errno.EFAULT
            if kernel.gup_forced_shared == "EFAULT" and not rules.is_cow_mapping(flags):
                return -errno.EFAULT
            if not flags & VM_MAYWRITE:
                return -errno.EFAULT
    elif not flags & VM_READ and not (gup_flags & FOLL_FORCE and flags & VM_MAYREAD):
        return -errno.EFAULT
    return 0


def can_follow_write_pte(vma: Vma, page: int, pte: int, gup_flags: int) -> bool:
    """Whether a write may use the PTE as it is (can_follow_write_pte)."""
    if pte & PTE_WRITE:
        return True
    if not gup_flags & FOLL_FORCE or vma.flags & (VM_MAYSHARE | VM_SHARED | VM_WRITE):
        return False
    if not vma.flags & VM_MAYWRITE or page < 0:
        return False
    flags = vma.mm.machine.memory.flags[page]
    if not flags & PG_ANON:
        return False
    by_flag = vma.mm.machine.rules.kernel.anon_reuse == "exclusive"
    return bool(flags & PG_ANON_EXCLUSIVE) if by_flag else bool(pte & PTE_DIRTY)


def follow_page(vma: Vma, address: int, gup_flags: int) -> tuple[int, int]:
    """Look the page up without faulting: (pfn, 0), (-1, 0) for "fault first", or (-1, -errno)."""
    mm = vma.mm
    machine = mm.machine
    kernel = machine.rules.kernel
    pte = mm.tables.get(address)
    if not pte & PTE_PRESENT:
        return -1, _NO_PAGE
    page = machine.vm_normal_page(vma, address, pte)
    if gup_flags & FOLL_WRITE and not can_follow_write_pte(vma, page, pte, gup_flags):
        return -1, _NO_PAGE
    if page < 0:
        if pte & PTE_DEVMAP and gup_flags & (FOLL_GET | FOLL_PIN):
            page = pte >> 12
        elif pte >> 12 == machine.zero_pfn and kernel.gup_zero_page:
            if gup_flags & FOLL_DUMP:
                return -1, -errno.EFAULT
            page = pte >> 12
        else:
            return -1, follow_pfn_pte(vma, address, pte, gup_flags)
    if must_unshare(vma, page, pte, gup_flags):
        return -1, _UNSHARE
    if gup_flags & FOLL_TOUCH:
        dirty = PG_DIRTY if gup_flags & FOLL_WRITE and not pte & PTE_DIRTY else 0
        machine.memory.flags[page] |= dirty | PG_REFERENCED
    return page, 0


def follow_pfn_pte(vma: Vma, address: int, pte: int, gup_flags: int) -> int:
    """A PTE is there but has no page (rule G2). A negative errno, or 0 to fault for ever (seed)."""
    kind = vma.mm.machine.rules.kernel.gup_raw
    if kind == "livelock":
        return _NO_PAGE
    if kind == "EFAULT":
        return -errno.EFAULT
    if gup_flags & FOLL_TOUCH:
        dirty = PTE_DIRTY if gup_flags & FOLL_WRITE else 0
        vma.mm.tables.set(address, pte | PTE_YOUNG | dirty)
    return -errno.EEXIST


def must_unshare(vma: Vma, page: int, pte: int, gup_flags: int) -> bool:
    """Whether a read pin of a shared anonymous page must get a page of its own first (F20, K4)."""
    machine = vma.mm.machine
    if pte & PTE_WRITE or machine.rules.kernel.anon_reuse != "exclusive":
        return False
    if gup_flags & (FOLL_WRITE | FOLL_PIN) != FOLL_PIN:
        return False
    flags = machine.memory.flags[page]
    return bool(flags & PG_ANON) and not flags & PG_ANON_EXCLUSIVE


def get_user_pages_locked(
    mm: MmStruct, start: int, pages: int, gup_flags: int
) -> tuple[int, int, list[int]]:
    """Take ``pages`` pages from ``start`` on: (pages done, errno or 0, pfns held).

    With neither FOLL_GET nor FOLL_PIN nothing is held, and raw PTEs are passed over where the
    era allows it (rules G2, K20). An error after some pages ends the call with those pages; the
    error is returned as well, for callers that care (rules G1, G3).
    """
    machine = mm.machine
    held: list[int] = []
    takes = bool(gup_flags & (FOLL_GET | FOLL_PIN))
    for number in range(pages):
        address = start + (number << PAGE_SHIFT)
        page, error = get_one(mm, address, gup_flags)
        if error == -errno.EEXIST and not takes:
            continue
        if error:
            return number, error, held
        if takes:
            references = grab(machine.zero_pfn, page, gup_flags, machine.rules.kernel.pin_bias)
            if references:
                machine.hold(page, references)
            if gup_flags & FOLL_PIN:
                mm.has_pinned = True
            held.append(page)
    return pages, 0, held


def grab(zero_pfn: int, page: int, gup_flags: int, pin_bias: bool) -> int:
    """Return how many references a taken page gains (rule G5)."""
    if not gup_flags & FOLL_PIN or not pin_bias:
        return 1
    return 0 if page == zero_pfn else GUP_PIN_COUNTING_BIAS


def get_one(mm: MmStruct, address: int, gup_flags: int) -> tuple[int, int]:
    """Follow one page, faulting as often as it takes: (pfn, 0) or (-1, -errno)."""
    vma = mm.find_vma(address)
    if vma is None:
        return -1, -errno.EFAULT
    error = check_vma_flags(vma, gup_flags)
    if error:
        return -1, error
    fault_flags = FAULT_FLAG_REMOTE if mm.machine.current is not mm else 0
    if gup_flags & FOLL_WRITE:
        fault_flags |= FAULT_FLAG_WRITE
    for _ in range(LIVELOCK_TRIES):
        page, error = follow_page(vma, address & PAGE_MASK, gup_flags)
        if page >= 0:
            return page, 0
        unshare = FAULT_FLAG_UNSHARE if error == _UNSHARE else 0
        if error and not unshare:
            return -1, error
        result = fault_for_caller(mm, address, unshare or fault_flags)
        if result & VM_FAULT_ERROR:
            return -1, -errno.ENOMEM if result & VM_FAULT_OOM else -errno.EFAULT
        if fault_flags & FAULT_FLAG_WRITE and broke_cow_read_only(vma, address):
            # Before the exclusive flag a forced write looked the copy up as for reading.
            gup_flags &= ~FOLL_WRITE
    return -1, LIVELOCK


def fault_for_caller(mm: MmStruct, address: int, flags: int) -> int:
    """Fault on behalf of the machine's current task, which the fault is charged to (rule F2)."""
    current = mm.machine.current
    before = (mm.min_flt, mm.maj_flt)
    result = handle_mm_fault(mm, address, flags)
    if current is not None and current is not mm:
        current.min_flt += mm.min_flt - before[0]
        current.maj_flt += mm.maj_flt - before[1]
        mm.min_flt, mm.maj_flt = before
    return result


def broke_cow_read_only(vma: Vma, address: int) -> bool:
    """Whether a forced write just left a read-only private copy (VM_FAULT_WRITE, rule F17)."""
    if vma.mm.machine.rules.kernel.anon_reuse == "exclusive" or vma.flags & VM_WRITE:
        return False
    pte = vma.mm.tables.get(address & PAGE_MASK)
    page = vma.mm.machine.vm_normal_page(vma, address & PAGE_MASK, pte)
    return page >= 0 and bool(vma.mm.machine.memory.flags[page] & PG_ANON)


def get_user_pages(
    mm: MmStruct, address: int, *, pages: int = 1, write: bool = False, force: bool = False
) -> tuple[int, list[int]]:
    """Take references on ``pages`` pages: (pages taken or -errno, pfns held) (rules G1 to G6)."""
    flags = FOLL_GET | FOLL_TOUCH | (FOLL_WRITE if write else 0) | (FOLL_FORCE if force else 0)
    done, error, held = get_user_pages_locked(mm, address & PAGE_MASK, pages, flags)
    return (done or error), held


def fast_pages(mm: MmStruct, address: int, pages: int, *, write: bool, pin: bool = False) -> int:
    """Return how many pages the lockless walk can take before it must stop (rules G8, G9)."""
    if not mm.machine.pte_special:
        return 0
    for number in range(pages):
        at = address + number * PAGE_SIZE
        pte, vma = mm.tables.get(at), mm.find_vma(at)
        # The PTEs of a PROT_NONE VMA lack the bit that lets user space in.
        if not pte & PTE_PRESENT or vma is None or not vma.flags & VM_ACCESS_FLAGS:
            return number
        if write and not pte & PTE_WRITE:
            return number
        if pte & PTE_SPECIAL and not pte & PTE_DEVMAP:
            return number
        if pin and must_unshare(vma, pte >> 12, pte, FOLL_PIN):
            return number
    return pages


def get_user_pages_fast(
    mm: MmStruct,
    address: int,
    *,
    pages: int = 1,
    write: bool = False,
    force: bool = False,
    pin: bool = False,
) -> tuple[int, list[int]]:
    """Lockless where the PTEs allow, the slow path for the rest (rules G8 to G10, G13).

    The walk sees no VMA. So it takes the private copy of a page in a PFNMAP VMA, which the slow
    path refuses before it looks at any PTE (rule G1; gup_pte_range, check_vma_flags in 6.1).
    """
    machine = mm.machine
    flags = (FOLL_PIN if pin else FOLL_GET) | FOLL_TOUCH | (FOLL_WRITE if write else 0)
    flags |= FOLL_FORCE if force else 0
    at = address & PAGE_MASK
    fast = fast_pages(mm, at, pages, write=write, pin=pin)
    held = [mm.tables.get(at + number * PAGE_SIZE) >> 12 for number in range(fast)]
    for page in held:
        machine.hold(page, grab(machine.zero_pfn, page, flags, machine.rules.kernel.pin_bias))
        machine.memory.flags[page] |= PG_REFERENCED
    if fast and pin:
        mm.has_pinned = True
    if fast == pages:
        return pages, held
    rest = at + fast * PAGE_SIZE
    done, error, slow = get_user_pages_locked(mm, rest, pages - fast, flags)
    return (fast + done or error), held + slow


def put_user_pages(mm: MmStruct, held: list[int], *, pin: bool = False) -> None:
    """Let go of what a call above holds."""
    machine = mm.machine
    for page in held:
        flags = FOLL_PIN if pin else FOLL_GET
        references = grab(machine.zero_pfn, page, flags, machine.rules.kernel.pin_bias)
        if references:
            machine.release(page, references)
