"""Faulting a range in ahead of use: MAP_POPULATE, mlock, MADV_POPULATE_* (rules K19, K20)."""

from __future__ import annotations

import errno

from xipfs.mm.flags import (
    FOLL_FORCE,
    FOLL_GET,
    FOLL_TOUCH,
    FOLL_WRITE,
    VM_ACCESS_FLAGS,
    VM_IO,
    VM_PFNMAP,
    VM_SHARED,
    VM_WRITE,
)
from xipfs.mm.gup import get_user_pages_locked
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT


def populate_vma_page_range(vma: Vma, start: int, end: int) -> int:
    """Fault [start, end) of one VMA in, without taking pages; pages done, or -errno.

    A private writable VMA is faulted for writing, so that it is copied now (rules K19, K20).
    Where mlock still sets VM_LOCKED on MIXED VMAs it also takes references, which a raw PTE
    cannot give (rule K19).
    """
    flags = FOLL_TOUCH
    if vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE:
        flags |= FOLL_WRITE
    if vma.flags & VM_ACCESS_FLAGS:
        flags |= FOLL_FORCE
    if not vma.mm.machine.rules.kernel.mixed_is_special:
        flags |= FOLL_GET
    done, error, held = get_user_pages_locked(vma.mm, start, end - start >> PAGE_SHIFT, flags)
    for page in held:
        vma.mm.machine.release(page)
    return done if done else error


def mm_populate(mm: MmStruct, start: int, end: int, *, ignore_errors: bool) -> int:
    """Populate every VMA of [start, end); 0 or the first error (__mm_populate).

    After an error in the middle of a VMA its rest is tried once more and then given up, so a
    page that cannot be had costs its handler two calls.
    """
    at = start
    while at < end:
        found = mm.overlapping(at, end)
        if not found:
            return 0
        vma = found[0]
        at = max(at, vma.start)
        stop = min(vma.end, end)
        if vma.flags & (VM_IO | VM_PFNMAP):
            at = stop
            continue
        done = populate_vma_page_range(vma, at, stop)
        if done < 0:
            if not ignore_errors:
                return done
            at = stop
            continue
        at += done << PAGE_SHIFT
    return 0


def mlock_errno(error: int) -> int:
    """Return the errno mlock(2) reports for a populate error (__mlock_posix_error_return)."""
    if error == -errno.EFAULT:
        return -errno.ENOMEM
    return -errno.EAGAIN if error == -errno.ENOMEM else error
