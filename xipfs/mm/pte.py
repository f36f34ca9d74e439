"""Page table entries as packed integers, and the page tables that hold them.

A PTE is one unsigned 64-bit integer: flag bits below bit 12, the pfn (or the swap offset) above.
0 is an empty entry. Eight bytes a PTE, in leaves of 512 entries that exist only where something
was mapped, is what keeps ten million modelled PTEs in 80 MB; a leaf is an ``array('Q')``, so that
compiled code can use the same memory through numpy's buffer view.

    bit 0 present   1 write   2 young   3 dirty   4 special   5 devmap   6 swap   7 swap exclusive

The bits have the meanings of x86-64's, except that a PTE under PROT_NONE stays ``present`` (as
pte_present() answers there); the VMA's permissions are what refuses the access.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from xipfs.units import PAGE_SHIFT, PAGE_SIZE

PTE_PRESENT: Final = 1 << 0
PTE_WRITE: Final = 1 << 1
PTE_YOUNG: Final = 1 << 2
PTE_DIRTY: Final = 1 << 3
PTE_SPECIAL: Final = 1 << 4
PTE_DEVMAP: Final = 1 << 5
PTE_SWAP: Final = 1 << 6
PTE_SWP_EXCLUSIVE: Final = 1 << 7
PTE_PFN_SHIFT: Final = 12

#: Bits that mprotect leaves alone (rule P10); the rest comes from the VMA's new protection.
PTE_CHG_MASK: Final = ~(PTE_WRITE | PTE_PRESENT)

PTRS_PER_PTE: Final = 512
LEAF_SHIFT: Final = PAGE_SHIFT + 9
_LEAF_BYTES: Final = PTRS_PER_PTE * 8


def mk_pte(pfn: int, prot: int) -> int:
    """Return the PTE that maps ``pfn`` with the protection bits ``prot``."""
    return pfn << PTE_PFN_SHIFT | prot


def pte_pfn(pte: int) -> int:
    """Return the pfn of a present PTE, or the swap offset of a swap PTE.

    >>> pte_pfn(mk_pte(77, PTE_PRESENT | PTE_YOUNG))
    77
    """
    return pte >> PTE_PFN_SHIFT


def describe_pte(pte: int) -> str:
    """Return ``pte`` for people: pfn and one letter a bit.

    >>> describe_pte(mk_pte(77, PTE_PRESENT | PTE_WRITE | PTE_SPECIAL))
    'pfn 77 pw--s'
    """
    if not pte:
        return "none"
    if pte & PTE_SWAP:
        return f"swap {pte_pfn(pte)}" + (" exclusive" if pte & PTE_SWP_EXCLUSIVE else "")
    bits = ((PTE_PRESENT, "p"), (PTE_WRITE, "w"), (PTE_YOUNG, "y"), (PTE_DIRTY, "d"))
    text = "".join(letter if pte & bit else "-" for bit, letter in bits)
    text += "v" if pte & PTE_DEVMAP else "s" if pte & PTE_SPECIAL else "n"
    return f"pfn {pte_pfn(pte)} {text}"


class PageTables:
    """One address space's PTEs: a dictionary of leaves by ``address >> LEAF_SHIFT``."""

    __slots__ = ("leaves",)

    def __init__(self) -> None:
        self.leaves: dict[int, array[int]] = {}

    def get(self, address: int) -> int:
        """Return the PTE at ``address`` (0 if empty)."""
        leaf = self.leaves.get(address >> LEAF_SHIFT)
        return 0 if leaf is None else leaf[address >> PAGE_SHIFT & PTRS_PER_PTE - 1]

    def set(self, address: int, pte: int) -> None:
        """Store ``pte`` at ``address``, making the leaf if there is none."""
        leaf = self.leaves.get(address >> LEAF_SHIFT)
        if leaf is None:
            leaf = self.leaves[address >> LEAF_SHIFT] = array("Q", bytes(_LEAF_BYTES))
        leaf[address >> PAGE_SHIFT & PTRS_PER_PTE - 1] = pte

    def populated(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (address, pte) of the non-empty entries of [start, end), in address order.

        The caller may change entries while iterating. The cost is that of the leaves that exist
        in the range, not of the range.
        """
        for key in self._keys(start, end):
            leaf = self.leaves.get(key)
            if leaf is None:
                continue
            base = key << LEAF_SHIFT
            first = max(start - base, 0) >> PAGE_SHIFT
            last = min(end - base, PTRS_PER_PTE << PAGE_SHIFT) >> PAGE_SHIFT
            for slot in range(first, last):
                pte = leaf[slot]
                if pte:
                    yield base + (slot << PAGE_SHIFT), pte

    def _keys(self, start: int, end: int) -> list[int]:
        first, last = start >> LEAF_SHIFT, (end - PAGE_SIZE) >> LEAF_SHIFT
        if last - first < len(self.leaves):
            return [key for key in range(first, last + 1) if key in self.leaves]
        return sorted(key for key in self.leaves if first <= key <= last)

    def free(self, floor: int, ceiling: int) -> None:
        """Drop the leaves that lie wholly in [floor, ceiling); they must be empty (T9)."""
        first = (floor + (1 << LEAF_SHIFT) - 1) >> LEAF_SHIFT
        for key in self._keys(first << LEAF_SHIFT, ceiling):
            if key + 1 << LEAF_SHIFT <= ceiling:
                assert not any(self.leaves[key]), (key, "freed page table is not empty")
                del self.leaves[key]

    def table_pages(self) -> int:
        """Return how many page-table pages (leaves of 4096 bytes) exist."""
        return len(self.leaves)
