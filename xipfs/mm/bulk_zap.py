"""Many PTEs taken away at once: raw ones, and those of file pages that somebody else still holds.

What else there is (private copies, swap entries, a page's last reference, PTEs that no rule
explains) is left where it is, for ``zap_page_range``. The loop is for numba and runs without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.memory.frames import PG_ANON, PG_DIRTY, PG_REFERENCED, PG_SWAPBACKED, PG_SWAPCACHE
from xipfs.mm import rules
from xipfs.mm.machine import MM_FILEPAGES
from xipfs.mm.pte import PTE_DIRTY, PTE_PFN_SHIFT, PTE_PRESENT, PTE_YOUNG
from xipfs.mm.vma import Vma

_NOT_PLAIN: Final = PG_ANON | PG_SWAPBACKED | PG_SWAPCACHE

Counts = npt.NDArray[np.int64]
Run = Callable[
    [Counts, Counts, npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8], int, int],
    tuple[int, int, int],
]


def run(
    stretches: Counts,
    entries: Counts,
    refcount: npt.NDArray[np.int32],
    mapcount: npt.NDArray[np.int32],
    page_flags: npt.NDArray[np.uint8],
    vm_flags: int,
    zero_pfn: int,
) -> tuple[int, int, int]:
    """Clear the entries of ``stretches`` (see ``PageTables.stretches``) as ``zap_pte`` does.

    Returns how many were raw and file PTEs, and how many it left.
    """
    raw = files = left = 0
    for row in range(len(stretches)):
        for place in range(stretches[row, 0], stretches[row, 1]):
            pte = entries[place]
            if pte == 0:
                continue
            pfn = pte >> PTE_PFN_SHIFT
            valid = pfn < len(refcount)
            kind = rules.BAD
            if pte & PTE_PRESENT:
                kind = rules.pte_kind_special(pte, vm_flags, valid, pfn == zero_pfn)
            if kind == rules.RAW:
                raw += 1
            elif kind == rules.NORMAL and refcount[pfn] > 1 and page_flags[pfn] & _NOT_PLAIN == 0:
                flags = page_flags[pfn]
                if pte & PTE_DIRTY:
                    flags |= PG_DIRTY
                if pte & PTE_YOUNG:
                    flags |= PG_REFERENCED
                page_flags[pfn] = flags
                mapcount[pfn] -= 1
                refcount[pfn] -= 1
                files += 1
            else:
                left += 1
                continue
            entries[place] = 0
    return raw, files, left


def zap_plain(vma: Vma, start: int, end: int, loop: Run) -> bool:
    """Clear through ``loop`` what it can of [start, end), which lies within ``vma``.

    Returns whether that was all there is.
    """
    mm = vma.mm
    machine = mm.machine
    if not machine.pte_special:
        return False  # an era that looks at the pfn: zap_page_range knows how
    memory = machine.memory
    raw, files, left = loop(
        mm.tables.stretches(start, end),
        machine.table_pool.array,
        memory.refcount,
        memory.mapcount,
        memory.page_flags,
        vma.flags,
        machine.zero_pfn,
    )
    mm.raw_ptes -= raw
    machine.nr_special_ptes -= raw
    mm.rss[MM_FILEPAGES] -= files
    machine.nr_normal_ptes -= files
    return left == 0
