"""Recorded oddities that no rule of mm asks for, each behind a switch of ``Machine.quirks``.

    x86-pat-fork-enomem     fork fails once page 0 of a private PFNMAP VMA was copied
    cramfs-last-block-zero  a full last block of a cramfs file reads as zeros from the page cache
    um-stale-host-mapping   a child without the mapping (MADV_DONTFORK) can still read the page
    um-mremap-grow-enomem   growing a mapping of vm_insert_page() pages by mremap fails
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
