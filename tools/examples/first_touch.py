"""What the first touch of a page costs and counts, by kind of page and of access.

Run it with the project's Python: ``.venv/bin/python tools/examples/first_touch.py [RULES]``, where
RULES is a rule set such as 6.1 (the default), 2.6.32, seed or 6.1-nospecial.
"""

from __future__ import annotations

import sys

from xipfs.memory.frames import PhysicalMemory
from xipfs.mm import (
    VM_MIXEDMAP,
    VM_READ,
    VM_WRITE,
    Machine,
    MappedFile,
    MmStruct,
    Rules,
    Vmf,
    VmOperations,
    access,
    do_mmap,
    vmf_insert_mixed,
    vmf_insert_pfn,
)
from xipfs.units import PAGE_SIZE


def touch(rules: Rules, index: int, *, shared: bool, write: bool) -> tuple[int, MmStruct]:
    """Touch page ``index`` of a fresh file in a fresh process; faults taken, and the process."""
    machine = Machine(PhysicalMemory(ram_pages=4, nvram_pages=4), rules)
    xip, cached = machine.memory.nvram_pfn(0), machine.memory.alloc_ram()
    insert = vmf_insert_mixed if rules.kernel.insert_mixed else vmf_insert_pfn

    def fault(vmf: Vmf) -> int:
        if vmf.pgoff == 0:
            return insert(vmf.vma, vmf.address, xip)
        machine.memory.get_page(cached)
        vmf.page = cached
        return 0

    mm = MmStruct(machine)
    file = MappedFile("file", VmOperations(fault=fault))
    prot = VM_READ | VM_WRITE
    start = do_mmap(mm, file, 2, prot, shared=shared, extra_flags=VM_MIXEDMAP)
    return access(mm, start + index * PAGE_SIZE, write=write).faults, mm


def main(rules: Rules) -> None:
    """Print a line for each way to touch an XIP page and a cached page."""
    print("page    mapping  access  faults  raw PTEs  file rss  anon rss")
    for index, kind in enumerate(("XIP", "cached")):
        for shared in (False, True):
            for write in (False, True):
                faults, mm = touch(rules, index, shared=shared, write=write)
                print(
                    f"{kind:7} {'shared' if shared else 'private':8}"
                    f" {'write' if write else 'read':7} {faults:6}"
                    f" {mm.raw_ptes:9} {mm.file_rss:9} {mm.anon_rss:9}"
                )


if __name__ == "__main__":
    main(Rules.parse(sys.argv[1] if len(sys.argv) > 1 else "6.1"))
