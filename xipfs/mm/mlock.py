"""mlock and its relatives: which VMAs take VM_LOCKED, and what is faulted in (rules K18 to K20).

VM_LOCKED and populating are two steps, and only the first passes PFNMAP, and since 3.14 MIXED,
VMAs by: a private writable MIXED VMA is still copied page by page into RAM.
"""

from __future__ import annotations

import errno

from xipfs.mm.flags import VM_LOCKED
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import change_flags, may_lock, vma_merge
from xipfs.mm.populate import mlock_errno, mm_populate
from xipfs.mm.vma import Vma


def mlock(mm: MmStruct, start: int, end: int) -> int:
    """Lock [start, end) and fault it in; 0 or a negative errno."""
    error = _apply(mm, start, end, VM_LOCKED)
    if error:
        return error
    return mlock_errno(mm_populate(mm, start, end, ignore_errors=False))


def munlock(mm: MmStruct, start: int, end: int) -> int:
    """Unlock [start, end); nothing is unmapped. 0 or -ENOMEM if the range has a hole."""
    return _apply(mm, start, end, 0)


def mlockall(mm: MmStruct, *, current: bool = False, future: bool = False) -> int:
    """Lock what is mapped now, what will be mapped, or both; 0 or -EINVAL for neither."""
    if not current and not future:
        return -errno.EINVAL
    mm.def_flags = VM_LOCKED if future else 0
    if current:
        for vma in list(mm):
            _mlock_fixup(vma, vma.start, vma.end, VM_LOCKED)
        end = max((vma.end for vma in mm), default=0)
        mm_populate(mm, 0, end, ignore_errors=True)
    return 0


def munlockall(mm: MmStruct) -> int:
    """Undo ``mlockall``."""
    mm.def_flags = 0
    for vma in list(mm):
        _mlock_fixup(vma, vma.start, vma.end, 0)
    return 0


def _apply(mm: MmStruct, start: int, end: int, lock: int) -> int:
    """apply_vma_lock_flags(): a hole ends it after what lies before the hole was changed."""
    at = start
    for vma in mm.overlapping(start, end):
        if vma.start > at:
            break
        at = min(vma.end, end)
        _mlock_fixup(vma, max(vma.start, start), at, lock)
    return 0 if at >= end else -errno.ENOMEM


def _mlock_fixup(vma: Vma, start: int, end: int, lock: int) -> None:
    mm = vma.mm
    flags = vma.flags & ~VM_LOCKED | lock
    if flags == vma.flags or not may_lock(vma):
        return
    piece = change_flags(mm, vma, start, end, flags)
    mm.locked_vm += piece.pages if lock else -piece.pages
    vma_merge(mm, piece)
