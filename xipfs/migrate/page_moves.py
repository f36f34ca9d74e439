"""What became of single pages that were moved, for a bounded number of pages.

Arrays by blocks of 256 pages of a file, since pages move in runs and a bulk move must not wait for
its books; and faults come in batches, which must not either. The blocks that moved latest are kept;
counts of the others are gone, and ``forgotten`` says of how many pages.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xipfs.fs.types import PageKind
from xipfs.migrate.books import MoveCounts

_BLOCK_SHIFT: Final = 8
_BLOCK: Final = 1 << _BLOCK_SHIFT
#: 1,048,576 pages when they are dense, 32 MB.
BLOCKS_MAX: Final = 4096
#: Rows of the counts, in the order of MoveCounts' fields.
_PROMOTED, _DEMOTED, _FAILED, _REFAULTS, _PINGPONG = range(5)
_KIND: Final = {PageKind.XIP: 1, PageKind.PAGECACHE: 2}

Ints = npt.NDArray[np.int64]


class PageMoves:
    """Moves, refaults and ping-pong of single pages.

    A block has a slot; a page's place is its slot's first one and its number within the block.
    """

    def __init__(self, pingpong_ns: int, blocks_max: int = BLOCKS_MAX) -> None:
        self._pingpong_ns = pingpong_ns
        self._blocks_max = blocks_max
        #: The slot of each block (inode, page number >> 8), the one that moved latest last.
        self._slots: OrderedDict[tuple[int, int], int] = OrderedDict()
        # Memory that nobody has written is not there yet.
        places = blocks_max << _BLOCK_SHIFT
        self._counts = np.zeros((_PINGPONG + 1, places), np.uint32)
        #: When the page moved last, to what (0: never), why; whether a refault is to come.
        self._moved_ns = np.zeros(places, np.int64)
        self._kind = np.zeros(places, np.uint8)
        self._cause = np.zeros(places, np.uint16)
        self._fresh = np.zeros(places, np.bool_)
        #: How many pages' refaults are to come.
        self.nr_fresh = 0
        self.forgotten = 0

    def _slot(self, block: tuple[int, int]) -> int:
        """Return the block's slot, which is now the one used last; the oldest may lose its own."""
        slot = self._slots.get(block)
        if slot is None:
            slot = len(self._slots)
            if slot == self._blocks_max:
                slot = self._slots.popitem(last=False)[1]
                self._clear(slice(slot << _BLOCK_SHIFT, (slot + 1) << _BLOCK_SHIFT))
            self._slots[block] = slot
        self._slots.move_to_end(block)
        return slot

    def _clear(self, places: slice) -> None:
        self.forgotten += int(np.count_nonzero(self._kind[places]))
        self.nr_fresh -= int(np.count_nonzero(self._fresh[places]))
        self._counts[:, places] = 0
        for array in (self._moved_ns, self._kind, self._cause, self._fresh):
            array[places] = 0

    def _in_blocks(self, ino: int, pages: Sequence[int]) -> Iterator[Ints | slice]:
        """Yield the places of ``pages``, which ascend, block by block."""
        low, high = pages[0] >> _BLOCK_SHIFT, pages[-1] >> _BLOCK_SHIFT
        run = len(pages) == pages[-1] + 1 - pages[0]
        indexes = np.zeros(0, np.int64) if run else np.array(pages, np.int64)
        numbers = indexes >> _BLOCK_SHIFT
        blocks = range(low, high + 1) if run else np.unique(numbers).tolist()
        # A block that is kept must not lose its slot to another one of the same move.
        for number in blocks:
            if (ino, number) in self._slots:
                self._slots.move_to_end((ino, number))
        if run:
            yield from self._run_in_blocks(ino, pages[0], pages[-1])
            return
        for number in blocks:
            place = self._slot((ino, number)) << _BLOCK_SHIFT
            yield place + (indexes[numbers == number] & _BLOCK - 1)

    def _run_in_blocks(self, ino: int, first: int, last: int) -> Iterator[slice]:
        """Yield the places of a run of pages; blocks whose slots lie together at once."""
        start = stop = 0
        for number in range(first >> _BLOCK_SHIFT, (last >> _BLOCK_SHIFT) + 1):
            block = ino, number
            if start < stop and len(self._slots) == self._blocks_max and block not in self._slots:
                yield slice(start, stop)  # before the next block takes a slot away
                start = stop
            base = (self._slot(block) - number) << _BLOCK_SHIFT
            low = base + max(first, number << _BLOCK_SHIFT)
            if low != stop:
                if start < stop:
                    yield slice(start, stop)
                start = low
            stop = base + min(last, number << _BLOCK_SHIFT | _BLOCK - 1) + 1
        yield slice(start, stop)

    def moved(self, ino: int, pages: Sequence[int], to: PageKind, now_ns: int, cause: int) -> int:
        """Enter pages that moved just now; return how many of them were ping-pong.

        ``cause`` is a number below 65,536 that ``faulted`` gives back.
        """
        if len(pages) == 1:
            return self._moved_one(ino, pages[0], to, now_ns, cause)
        pingpong, kind = 0, _KIND[to]
        for at in self._in_blocks(ino, pages):
            before = self._kind[at]
            recent = now_ns - self._moved_ns[at] <= self._pingpong_ns
            back = (before != 0) & (before != kind) & recent
            self._counts[_PINGPONG, at] += back
            self._counts[_PROMOTED if to is PageKind.PAGECACHE else _DEMOTED, at] += 1
            self._kind[at], self._moved_ns[at] = kind, now_ns
            self.nr_fresh += before.size - int(np.count_nonzero(self._fresh[at]))
            self._cause[at], self._fresh[at] = cause, True
            pingpong += int(np.count_nonzero(back))
        return pingpong

    def _moved_one(self, ino: int, page: int, to: PageKind, now_ns: int, cause: int) -> int:
        """``moved`` for one page: on arrays it would take five times as long."""
        at = (self._slot((ino, page >> _BLOCK_SHIFT)) << _BLOCK_SHIFT) + (page & _BLOCK - 1)
        kind = _KIND[to]
        recent = now_ns - int(self._moved_ns[at]) <= self._pingpong_ns
        back = recent and int(self._kind[at]) not in (0, kind)
        self._counts[_PINGPONG, at] += back
        self._counts[_PROMOTED if to is PageKind.PAGECACHE else _DEMOTED, at] += 1
        self._kind[at], self._moved_ns[at] = kind, now_ns
        self.nr_fresh += not self._fresh[at]
        self._cause[at], self._fresh[at] = cause, True
        return int(back)

    def failed(self, ino: int, pages: Sequence[int]) -> None:
        """Enter pages that were refused for good."""
        for at in self._in_blocks(ino, pages):
            self._counts[_FAILED, at] += 1

    def faulted(self, ino: int, page: int, time_ns: int) -> int | None:
        """Return the cause of the page's last move if this is the first fault since, else None."""
        if not self.nr_fresh:
            return None
        slot = self._slots.get((ino, page >> _BLOCK_SHIFT))
        if slot is None:
            return None
        at = (slot << _BLOCK_SHIFT) + (page & _BLOCK - 1)
        if not self._fresh[at] or time_ns <= self._moved_ns[at]:
            return None
        self._fresh[at] = False
        self.nr_fresh -= 1
        self._counts[_REFAULTS, at] += 1
        return int(self._cause[at])

    def faulted_many(self, inos: Ints, pages: Ints, times_ns: Ints) -> tuple[Ints, Ints]:
        """``faulted`` of many: return which of them (ascending) are refaults, and their causes."""
        none = np.zeros(0, np.int64)
        if not self.nr_fresh or not inos.size:
            return none, none
        numbers = pages >> _BLOCK_SHIFT
        # A program's faults stay in a block for a while: one look-up for each stay.
        new = np.flatnonzero((np.diff(inos) != 0) | (np.diff(numbers) != 0)) + 1
        starts = np.concatenate([[0], new])
        stays = zip(inos[starts].tolist(), numbers[starts].tolist(), strict=True)
        slots = np.array([self._slots.get(block, -1) for block in stays], np.int64)
        slot = np.repeat(slots, np.diff(np.append(starts, inos.size)))
        known = np.flatnonzero(slot >= 0)
        at = (slot[known] << _BLOCK_SHIFT) + (pages[known] & _BLOCK - 1)
        answers = self._fresh[at] & (times_ns[known] > self._moved_ns[at])
        # Of several faults of a page the first one is it.
        at, first = np.unique(at[answers], return_index=True)
        self._fresh[at] = False
        self.nr_fresh -= at.size
        self._counts[_REFAULTS, at] += 1
        which, causes = known[answers][first], self._cause[at].astype(np.int64)
        order = np.argsort(which)
        return which[order], causes[order]

    def most_moved(self, count: int) -> list[dict[str, Any]]:
        """Return the ``count`` pages with the most moves and failures, the most first."""
        rows = heapq.nsmallest(count, self._rows(), key=lambda row: (-row[0], row[1], row[2]))
        return [
            {"ino": ino, "index": index, **MoveCounts(*counts).describe()}
            for _, ino, index, counts in rows
        ]

    def _rows(self) -> Iterator[tuple[int, int, int, list[int]]]:
        for (ino, number), slot in self._slots.items():
            counts = self._counts[:, slot << _BLOCK_SHIFT : (slot + 1) << _BLOCK_SHIFT]
            moves = counts[_PROMOTED] + counts[_DEMOTED] + counts[_FAILED]
            for at in np.flatnonzero(moves).tolist():
                index = (number << _BLOCK_SHIFT) + at
                yield int(moves[at]), ino, index, counts[:, at].tolist()
