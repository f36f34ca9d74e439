"""Recorded oddities that no rule of mm asks for, each behind a switch of ``Machine.quirks``.

    x86-pat-fork-enomem     fork fails once page 0 of a private PFNMAP VMA was copied
    cramfs-last-block-zero  a full last block of a cramfs file reads as zeros from the page cache
    um-stale-host-mapping   a child without the mapping (MADV_DONTFORK) can still read the page
    um-mremap-grow-enomem   growing a special VMA in place fails if its vm_ops have no close
    cow-through-current     rule F16a: a raw page is copied through the current task's addresses

The first four are named in the headers of recordings; the last is read from the kernel's source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipfs.mm import rules
from xipfs.mm.flags import VM_PFNMAP
from xipfs.mm.pte import PTE_PRESENT

if TYPE_CHECKING:
    from xipfs.mm.mm_struct import MmStruct
    from xipfs.mm.vma import Vma

PAT_FORK: Final = "x86-pat-fork-enomem"
CRAMFS_LAST_BLOCK: Final = "cramfs-last-block-zero"
STALE_HOST_MAPPING: Final = "um-stale-host-mapping"
MREMAP_GROW: Final = "um-mremap-grow-enomem"
COW_THROUGH_CURRENT: Final = "cow-through-current"
NAMES: Final = frozenset(
    {PAT_FORK, CRAMFS_LAST_BLOCK, STALE_HOST_MAPPING, MREMAP_GROW, COW_THROUGH_CURRENT}
)


def fork_fails(mm: MmStruct) -> bool:
    """x86 finds a remapped range's memory type through its first PTE (track_pfn_copy).

    Once that page of a private mapping was copied, the PTE names ordinary RAM, and fork gives up.
    """
    machine = mm.machine
    if PAT_FORK not in machine.quirks:
        return False
    for vma in mm:
        if vma.flags & VM_PFNMAP and rules.is_cow_mapping(vma.flags):
            pte = mm.tables.get(vma.start)
            if pte & PTE_PRESENT and machine.vm_normal_page(vma, vma.start, pte) >= 0:
                return True
    return False


def expand_fails(vma: Vma) -> bool:
    """6.1 grows a VMA in place by merging it with its own extension if it has no ->close.

    VM_SPECIAL VMAs, so MIXED ones too (rule K21), do not merge, and mremap gives up instead of
    moving. Whether there is room to grow in place is up to the layout, which is why only one of
    the recorded machines shows it. This is our reading of mremap() and vma_merge(); the recording
    does not name a cause.
    """
    if MREMAP_GROW not in vma.mm.machine.quirks or not vma.is_special:
        return False
    return vma.vm_ops is None or vma.vm_ops.close is None
