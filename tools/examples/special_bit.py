"""The same pfn inserted the same way, with and without the special PTE bit (rules N9, N12).

VM_MIXEDMAP began by asking the pfn: what has a struct page is counted. With the bit it is the way
of insertion that decides, and whoever inserted the page answers for its lifetime.
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
    VmOperations,
    do_mmap,
    get_user_pages,
    put_user_pages,
    vm_insert_mixed,
    vm_insert_page,
)


def main() -> None:
    """Insert one RAM page by both calls under both kinds of architecture."""
    for name in ("6.1", "6.1-nospecial"):
        for call in (vm_insert_page, vm_insert_mixed):
            machine = Machine(PhysicalMemory(ram_pages=4, nvram_pages=4), Rules.parse(name))
            page = machine.memory.alloc_ram()
            mm = MmStruct(machine)
            file = MappedFile("device", VmOperations())
            start = do_mmap(mm, file, 1, VM_READ, extra_flags=VM_MIXEDMAP)
            vma = mm.find_vma(start)
            assert vma is not None
            call(vma, start, page)
            counts = (machine.memory.ref[page], machine.memory.map[page])
            taken, held = get_user_pages(mm, start)
            put_user_pages(mm, held)
            print(
                f"{name:14} {call.__name__:16} refcount {counts[0]}, mapcount {counts[1]},"
                f" get_user_pages {'1 page' if taken == 1 else 'refused'}"
            )


if __name__ == "__main__":
    main()
