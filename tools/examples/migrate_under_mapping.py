"""A page moves from XIP to the page cache and back while two processes map it (rules R1, K7, R14).

A raw PTE has no page, so there is no mapcount to tell who maps an XIP page and no reverse map to
find them. What finds them is the file: every mapping of it, by file index. The private copy that
one process made stays with it, whatever the page behind it does.
"""

from __future__ import annotations

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
    check,
    do_mmap,
    unmap_mapping_range,
    vmf_insert_mixed,
)


def show(event: str, mms: list[MmStruct], machine: Machine, page: int) -> None:
    """Print one line: the raw, file and anonymous PTEs of each process, and the RAM page."""
    spaces = "".join(f"{mm.raw_ptes:5}{mm.file_rss:5}{mm.anon_rss:5}" for mm in mms)
    print(f"{event:25}{spaces}{machine.memory.ref[page]:5}{machine.memory.map[page]:4}")


def main() -> None:
    """Read in two processes, copy in one, and migrate both ways."""
    machine = Machine(PhysicalMemory(ram_pages=4, nvram_pages=4), Rules("6.1"))
    block, page = machine.memory.nvram_pfn(0), machine.memory.alloc_ram()
    backing = "XIP"

    def fault(vmf: Vmf) -> int:
        if backing == "XIP":
            return vmf_insert_mixed(vmf.vma, vmf.address, block)
        machine.memory.get_page(page)
        vmf.page = page
        return 0

    file = MappedFile("file", VmOperations(fault=fault))
    mms = [MmStruct(machine, "A"), MmStruct(machine, "B"), MmStruct(machine, "C")]
    prot = VM_READ | VM_WRITE
    starts = [do_mmap(mm, file, 1, prot, extra_flags=VM_MIXEDMAP) for mm in mms]

    print("process                    A              B              C          RAM page")
    print("PTEs                     " + "  raw file anon" * 3 + "  ref map")

    def read_all(event: str) -> None:
        faults = [access(mm, at, write=False).faults for mm, at in zip(mms, starts, strict=True)]
        show(f"{event} {faults}", mms, machine, page)

    read_all("read, faults")
    access(mms[2], starts[2], write=True)
    show("C writes", mms, machine, page)
    for target in ("page cache", "XIP"):
        backing = target
        cleared = unmap_mapping_range(file, 0, 1, even_cows=False)
        show(f"to {target}, cleared {cleared}", mms, machine, page)
        read_all("read, faults")
    check(machine)


if __name__ == "__main__":
    main()
