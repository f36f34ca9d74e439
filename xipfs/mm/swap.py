"""Swap: where anonymous pages go under MADV_PAGEOUT, and the swap cache.

Only what the rules and the recordings need: an entry counts the PTEs that hold it; the swap cache
holds one reference on a page that still has its entry. The device is synchronous, as on the
recorded machine, so an entry used by one PTE alone is read straight into a new page.
"""

from __future__ import annotations

from xipfs.memory.frames import PG_SWAPCACHE, PhysicalMemory


class Swap:
    """The swap device: entry to PTE count, entry to cached pfn, entry to bytes."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.counts: dict[int, int] = {}
        self.cache: dict[int, int] = {}
        self.data: dict[int, bytes] = {}
        self._entry_of: dict[int, int] = {}
        self._next = 1

    def allocate(self, ptes: int) -> int:
        """Return a new entry held by ``ptes`` PTEs."""
        entry = self._next
        self._next += 1
        self.counts[entry] = ptes
        return entry

    def duplicate(self, entry: int) -> None:
        """Count one more PTE that holds ``entry`` (swap_duplicate)."""
        self.counts[entry] += 1

    def free(self, entry: int) -> None:
        """Drop one PTE's hold of ``entry`` (swap_free; free_swap_and_cache at zap)."""
        self.counts[entry] -= 1
        if self.counts[entry] == 0 and entry not in self.cache:
            self._forget(entry)

    def _forget(self, entry: int) -> None:
        del self.counts[entry]
        self.data.pop(entry, None)

    def add_to_cache(self, memory: PhysicalMemory, entry: int, pfn: int) -> None:
        """Enter ``pfn``, whose one reference is the cache's from now on."""
        assert entry not in self.cache, entry
        self.cache[entry] = pfn
        self._entry_of[pfn] = entry
        memory.flags[pfn] |= PG_SWAPCACHE

    def count_of_cached(self, pfn: int) -> int:
        """Return how many PTEs hold the entry of a page in the swap cache."""
        return self.counts[self._entry_of[pfn]]

    def try_to_free(self, memory: PhysicalMemory, pfn: int) -> bool:
        """Take ``pfn`` out of the cache if no PTE holds its entry (folio_free_swap)."""
        entry = self._entry_of[pfn]
        if self.counts[entry]:
            return False
        del self._entry_of[pfn]
        del self.cache[entry]
        self._forget(entry)
        memory.flags[pfn] &= ~PG_SWAPCACHE
        memory.put_page(pfn)
        return True

    def reuse_entry(self, memory: PhysicalMemory, pfn: int) -> int:
        """Take ``pfn`` out of the cache and return its entry, held by one PTE more.

        What try_to_unmap() leaves in the PTE, and __remove_mapping() does to the page afterwards.
        """
        entry = self._entry_of.pop(pfn)
        del self.cache[entry]
        self.counts[entry] += 1
        memory.flags[pfn] &= ~PG_SWAPCACHE
        memory.put_page(pfn)
        return entry

    def put_page(self, memory: PhysicalMemory, pfn: int) -> None:
        """Drop a PTE's reference; an unmapped cached page without users of its entry goes too."""
        cached = memory.flags[pfn] & PG_SWAPCACHE and memory.map[pfn] == 0
        if cached and self.counts[self._entry_of[pfn]] == 0:
            self.try_to_free(memory, pfn)
        memory.put_page(pfn)

    def drop_unused(self, memory: PhysicalMemory, entry: int) -> None:
        """After a PTE let go of ``entry``: free a cached page nobody maps (free_swap_and_cache)."""
        pfn = self.cache.get(entry)
        if pfn is not None and self.counts[entry] == 0 and memory.map[pfn] == 0:
            self.try_to_free(memory, pfn)
