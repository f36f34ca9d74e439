"""The shadow of one address space: which ranges map, or may map, a file of the mount.

A mapping made by mmap is known by its range and file offset before it is known whose file it maps:
the descriptor's number says nothing once the program has gone on. So every file mapping enters as a
*candidate* and gets its inode from the first fault in it, whose page-cache event names inode and
page: until then it has no PTE, hence nothing is lost by not knowing. exec's mappings make no system
call; their ranges come from the maple tree's events, and even the offset from the first fault.

Neighbouring mappings that the kernel merges stay apart here; the pages they map are the same.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from xipfs.units import PAGE_SHIFT


class Vma:
    """One range ``[start, end)``; ``ino`` and ``pgoff`` are None while unknown."""

    __slots__ = (
        "dontfork",
        "end",
        "fresh",
        "ino",
        "locked",
        "pgoff",
        "prot",
        "prot_known",
        "shared",
        "start",
        "told",
    )

    def __init__(
        self,
        start: int,
        end: int,
        *,
        ino: int | None = None,
        pgoff: int | None = None,
        prot: int = 0,
        shared: bool = False,
        prot_known: bool = True,
        fresh: bool = True,
    ) -> None:
        assert start < end, (start, end)
        self.start = start
        self.end = end
        self.ino = ino
        self.pgoff = pgoff
        self.prot = prot
        self.shared = shared
        self.prot_known = prot_known
        #: Nothing was mapped in it before it was known.
        self.fresh = fresh
        self.dontfork = False
        #: VM_LOCKED, and populated when it was locked: yes, no, or None: perhaps.
        self.locked: bool | None = False
        self.told = False

    def index_at(self, address: int) -> int:
        """Return the page of the file that ``address`` maps; the offset must be known."""
        assert self.pgoff is not None, "the mapping's file offset is not known"
        return self.pgoff + ((address - self.start) >> PAGE_SHIFT)

    def address_of(self, index: int) -> int | None:
        """Return where page ``index`` is mapped, or None where it is not or cannot be known."""
        if self.pgoff is None or index < self.pgoff:
            return None
        address = self.start + (index - self.pgoff << PAGE_SHIFT)
        return address if address < self.end else None

    def piece(self, start: int, end: int) -> Vma:
        """Return this mapping cut to ``[start, end)``."""
        assert self.start <= start < end <= self.end
        cut = Vma(
            start,
            end,
            ino=self.ino,
            pgoff=None if self.pgoff is None else self.index_at(start),
            prot=self.prot,
            shared=self.shared,
            prot_known=self.prot_known,
            fresh=self.fresh,
        )
        cut.dontfork = self.dontfork
        cut.locked = self.locked
        cut.told = self.told
        return cut


class VmaMap:
    """The mappings of one address space, sorted and without overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._vmas: list[Vma] = []

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)

    def find(self, address: int) -> Vma | None:
        """Return the mapping that holds ``address``."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        vma = self._vmas[at]
        return vma if address < vma.end else None

    def meeting(self, start: int, end: int) -> list[Vma]:
        """Return the mappings that share an address with ``[start, end)``, as they are."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        stop = bisect_left(self._starts, end)
        return [vma for vma in self._vmas[first:stop] if vma.end > start]

    def insert(self, vma: Vma) -> None:
        """Add a mapping; its range must be free."""
        at = bisect_left(self._starts, vma.start)
        assert at == len(self._vmas) or vma.end <= self._vmas[at].start, "mappings overlap"
        assert at == 0 or self._vmas[at - 1].end <= vma.start, "mappings overlap"
        self._starts.insert(at, vma.start)
        self._vmas.insert(at, vma)

    def carve(self, start: int, end: int) -> list[Vma]:
        """Free ``[start, end)`` and return what was there, cut to it."""
        pieces = self.isolate(start, end)
        if pieces:
            at = bisect_left(self._starts, pieces[0].start)
            del self._starts[at : at + len(pieces)]
            del self._vmas[at : at + len(pieces)]
        return pieces

    def isolate(self, start: int, end: int) -> list[Vma]:
        """Split mappings at ``start`` and ``end``; return those between, still in place."""
        if start >= end:
            return []
        self._split(start)
        self._split(end)
        return self._vmas[bisect_left(self._starts, start) : bisect_left(self._starts, end)]

    def _split(self, address: int) -> None:
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return
        vma = self._vmas[at]
        if vma.start < address < vma.end:
            self._vmas[at : at + 1] = [vma.piece(vma.start, address), vma.piece(address, vma.end)]
            self._starts.insert(at + 1, address)
