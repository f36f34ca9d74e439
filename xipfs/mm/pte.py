"""Page table entries as packed integers, and the page tables that hold them.

A PTE is one unsigned 64-bit integer: flag bits below bit 12, the pfn (or the swap offset) above.
0 is an empty entry. Eight bytes a PTE, in leaves of 512 entries that exist only where something
was mapped, is what keeps ten million modelled PTEs in 80 MB. The tables' memory is the machine's
``TablePool``, where compiled code walks them too.

    bit 0 present   1 write   2 young   3 dirty   4 special   5 devmap   6 swap   7 swap exclusive

The bits have the meanings of x86-64's, except that a PTE under PROT_NONE stays ``present`` (as
pte_present() answers there); the VMA's permissions are what refuses the access.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.mm.table_pool import PTRS_PER_TABLE, TablePool
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

Stretches = npt.NDArray[np.int64]
_NO_STRETCHES: Final = np.zeros((0, 2), np.int64)
PTRS_PER_PTE: Final = PTRS_PER_TABLE
_TABLE_SHIFT: Final = 9
_SLOT_MASK: Final = PTRS_PER_PTE - 1
LEAF_SHIFT: Final = PAGE_SHIFT + _TABLE_SHIFT
MIDDLE_SHIFT: Final = LEAF_SHIFT + _TABLE_SHIFT


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


def pte_permits(pte: int, write: bool) -> bool:
    """Whether an access passes without a fault, as far as the PTE decides."""
    needed = PTE_PRESENT | PTE_WRITE if write else PTE_PRESENT
    return pte & needed == needed


def pte_after_access(pte: int, write: bool) -> int:
    """Return a PTE as the hardware leaves it after an access that it permits."""
    return pte | PTE_YOUNG | PTE_DIRTY if write else pte | PTE_YOUNG


class PageTables:
    """One address space's PTEs: leaves, middle tables over them, and a dictionary of those.

    A leaf spans 2 MiB of addresses, a middle table 1 GiB; ``middles`` finds a middle table by
    ``address >> MIDDLE_SHIFT``. Tables are named by the index of their first entry in the
    ``pool``; a middle table's entries are such names, or 0. Leaves exist only where something was
    mapped. ``leaf_count`` is their number.
    """

    __slots__ = ("leaf_count", "middles", "pool")

    def __init__(self, pool: TablePool | None = None) -> None:
        self.pool = TablePool() if pool is None else pool
        self.middles: dict[int, int] = {}
        self.leaf_count = 0

    def get(self, address: int) -> int:
        """Return the PTE at ``address`` (0 if empty)."""
        middle = self.middles.get(address >> MIDDLE_SHIFT)
        if middle is None:
            return 0
        entries = self.pool.entries
        leaf = entries[middle + (address >> LEAF_SHIFT & _SLOT_MASK)]
        return entries[leaf + (address >> PAGE_SHIFT & _SLOT_MASK)]

    def set(self, address: int, pte: int) -> None:
        """Store ``pte`` at ``address``, making the tables if there are none."""
        pool = self.pool
        middle = self.middles.get(address >> MIDDLE_SHIFT)
        if middle is None:
            middle = self.middles[address >> MIDDLE_SHIFT] = pool.take()
        leaf = pool.entries[middle + (address >> LEAF_SHIFT & _SLOT_MASK)]
        if not leaf:
            leaf = pool.take()
            pool.entries[middle + (address >> LEAF_SHIFT & _SLOT_MASK)] = leaf
            self.leaf_count += 1
        pool.entries[leaf + (address >> PAGE_SHIFT & _SLOT_MASK)] = pte

    def fill(self, start: int, end: int, pte: int) -> None:
        """Store ``pte`` at every page of [start, end): leaf by leaf, not page by page."""
        address = start
        while address < end:
            stop = min(end, ((address >> LEAF_SHIFT) + 1) << LEAF_SHIFT)
            self.set(address, pte)
            first = self._leaf(address >> LEAF_SHIFT) + (address >> PAGE_SHIFT & _SLOT_MASK)
            self.pool.array[first : first + (stop - address >> PAGE_SHIFT)] = pte
            address = stop

    def populated(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (address, pte) of the non-empty entries of [start, end), in address order.

        The caller may change entries while iterating. The cost is that of the leaves that exist
        in the range, not of the range.
        """
        for key in self._keys(start, end):
            leaf = self._leaf(key)
            if not leaf:
                continue
            base = key << LEAF_SHIFT
            first = max(start - base, 0) >> PAGE_SHIFT
            last = min(end - base, PTRS_PER_PTE << PAGE_SHIFT) >> PAGE_SHIFT
            for slot in (
                np.flatnonzero(self.pool.array[leaf + first : leaf + last]) + first
            ).tolist():
                # The pool may have grown since the last turn, so its entries are asked for again.
                pte = self.pool.entries[leaf + slot]
                if pte:
                    yield base + (slot << PAGE_SHIFT), pte

    def stretches(self, start: int, end: int) -> Stretches:
        """Return where the entries of [start, end) lie in the pool's array, leaf by leaf.

        One row a leaf, (first, past the last), in address order.
        """
        first, last = start >> LEAF_SHIFT, (end - PAGE_SIZE) >> LEAF_SHIFT
        found = [_NO_STRETCHES]
        for region in self._regions(first >> _TABLE_SHIFT, last >> _TABLE_SHIFT):
            base = region << _TABLE_SHIFT
            low, high = max(first, base), min(last, base | _SLOT_MASK) + 1
            middle = self.middles[region] - base
            table = self.pool.array[middle + low : middle + high]
            there = np.flatnonzero(table)
            leaves, pages = table[there], there + low << _TABLE_SHIFT
            starts = np.maximum((start >> PAGE_SHIFT) - pages, 0)
            stops = np.minimum((end >> PAGE_SHIFT) - pages, PTRS_PER_PTE)
            found.append(np.stack([leaves + starts, leaves + stops], axis=1))
        return np.concatenate(found)

    def replace(self, start: int, end: int, pte: int) -> int:
        """Store ``pte`` in every non-empty entry of [start, end); return how many there were."""
        count = 0
        stretches = self.stretches(start, end)
        # Leaves that were made one after the other lie so: one piece.
        cuts = np.flatnonzero(stretches[1:, 0] != stretches[:-1, 1])
        firsts = stretches[np.concatenate([[0], cuts + 1]), 0] if len(stretches) else []
        stops = stretches[np.concatenate([cuts, [-1]]), 1] if len(stretches) else []
        for first, stop in zip(firsts, stops, strict=True):
            entries = self.pool.array[first:stop]
            count += int(np.count_nonzero(entries))
            if pte:
                entries[entries != 0] = pte
            else:
                entries[:] = 0
        return count

    def _leaf(self, key: int) -> int:
        middle = self.middles.get(key >> _TABLE_SHIFT)
        return 0 if middle is None else self.pool.entries[middle + (key & _SLOT_MASK)]

    def _keys(self, start: int, end: int) -> list[int]:
        """Return ``address >> LEAF_SHIFT`` of the leaves that meet [start, end), in order."""
        first, last = start >> LEAF_SHIFT, (end - PAGE_SIZE) >> LEAF_SHIFT
        found = []
        for region in self._regions(first >> _TABLE_SHIFT, last >> _TABLE_SHIFT):
            base = region << _TABLE_SHIFT
            keys = range(max(first, base), min(last, base | _SLOT_MASK) + 1)
            found += [key for key in keys if self._leaf(key)]
        return found

    def _regions(self, low: int, high: int) -> list[int]:
        """Return ``address >> MIDDLE_SHIFT`` of the middle tables of low..high, in order."""
        if high - low < len(self.middles):
            return [region for region in range(low, high + 1) if region in self.middles]
        return sorted(region for region in self.middles if low <= region <= high)

    def free(self, floor: int, ceiling: int) -> None:
        """Drop the leaves that lie wholly in [floor, ceiling); they must be empty (T9)."""
        first = (floor + (1 << LEAF_SHIFT) - 1) >> LEAF_SHIFT
        entries = self.pool.entries
        touched = set()
        for key in self._keys(first << LEAF_SHIFT, ceiling):
            if key + 1 << LEAF_SHIFT <= ceiling:
                leaf = self._leaf(key)
                left = any(entries[leaf : leaf + PTRS_PER_PTE])
                assert not left, (key, "freed page table is not empty")
                entries[self.middles[key >> _TABLE_SHIFT] + (key & _SLOT_MASK)] = 0
                self.pool.give_back(leaf)
                self.leaf_count -= 1
                touched.add(key >> _TABLE_SHIFT)
        for region in touched:
            middle = self.middles[region]
            if not any(entries[middle : middle + PTRS_PER_PTE]):
                del self.middles[region]
                self.pool.give_back(middle)

    def table_pages(self) -> int:
        """Return how many page-table pages (leaves of 4096 bytes) exist."""
        return self.leaf_count
