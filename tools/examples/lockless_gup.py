"""How far get_user_pages comes without a lock, and what one XIP page does to it (rules G8 to G11).

The lockless walk has no VMA to ask, so only the PTE can say that it has no page: the special bit.
It takes pages up to the first such PTE and leaves the rest to the slow path, which takes the lock
that all threads share. On a raw PTE that path fails too.
"""

from __future__ import annotations

from xipfs.memory.frames import PhysicalMemory
from xipfs.mm import (
    VM_MIXEDMAP,
    VM_READ,
    Machine,
    MappedFile,
    MmStruct,
    Rules,
    Vmf,
    VmOperations,
    access,
    do_mmap,
    get_user_pages_fast,
    put_user_pages,
    vmf_insert_mixed,
)
from xipfs.mm.gup import fast_pages
from xipfs.units import PAGE_SIZE

PAGES = 8


def buffer(rules: Rules, xip: set[int]) -> tuple[MmStruct, int]:
    """Map and touch ``PAGES`` pages, of which those of ``xip`` are in place."""
    machine = Machine(PhysicalMemory(ram_pages=PAGES, nvram_pages=PAGES), rules)
    memory = machine.memory
    ram = [memory.alloc_ram() for _ in range(PAGES)]

    def fault(vmf: Vmf) -> int:
        if vmf.pgoff in xip:
            return vmf_insert_mixed(vmf.vma, vmf.address, memory.nvram_pfn(vmf.pgoff))
        memory.get_page(ram[vmf.pgoff])
        vmf.page = ram[vmf.pgoff]
        return 0

    mm = MmStruct(machine)
    file = MappedFile("buffer", VmOperations(fault=fault))
    start = do_mmap(mm, file, PAGES, VM_READ, extra_flags=VM_MIXEDMAP)
    for index in range(PAGES):
        access(mm, start + index * PAGE_SIZE, write=False)
    return mm, start


def main() -> None:
    """Print, for three buffers and two architectures, how far each path comes."""
    print("rules          XIP pages   lockless  taken in all")
    for name in ("6.1", "6.1-nospecial"):
        for xip in ((), (5,), (0,)):
            mm, start = buffer(Rules.parse(name), set(xip))
            lockless = fast_pages(mm, start, PAGES, write=False)
            taken, held = get_user_pages_fast(mm, start, pages=PAGES)
            put_user_pages(mm, held)
            where = ", ".join(map(str, xip)) or "none"
            result = f"{taken} of {PAGES}" if taken >= 0 else "an error"
            print(f"{name:14} {where:11} {lockless:8}  {result}")


if __name__ == "__main__":
    main()
