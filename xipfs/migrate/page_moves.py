"""What became of single pages that were moved, for a bounded number of pages.

Arrays by blocks of 256 pages of a file, since pages move in runs and a bulk move must not wait for
its books. The blocks that moved latest are kept; counts of the others are gone, which ``forgotten``
says.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xipfs.fs.types import PageKind

_BLOCK_SHIFT: Final = 8
_BLOCK: Final = 1 << _BLOCK_SHIFT
#: 1,048,576 pages when they are dense, 38 MB.
BLOCKS_MAX: Final = 4096
COUNTS: Final = ("promoted", "demoted", "failed", "refaults", "pingpong")
_PROMOTED, _DEMOTED, _FAILED, _REFAULTS, _PINGPONG = range(len(COUNTS))
_KIND: Final = {PageKind.XIP: 1, PageKind.PAGECACHE: 2}

Places = npt.NDArray[np.int64] | slice


def _counts() -> npt.NDArray[np.uint32]:
    return np.zeros((len(COUNTS), _BLOCK), np.uint32)


@dataclass(eq=False, slots=True)
class _Block:
    """256 pages: counts, when each moved last, why and to what (0: never), refault to come."""

    counts: npt.NDArray[np.uint32] = field(default_factory=_counts)
    moved_ns: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BLOCK, np.int64))
    kind: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(_BLOCK, np.uint8))
    cause: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(_BLOCK, np.uint16))
    fresh: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(_BLOCK, np.bool_))


class PageMoves:
    """Moves, refaults and ping-pong of single pages."""

    def __init__(self, pingpong_ns: int, blocks_max: int = BLOCKS_MAX) -> None:
        self._pingpong_ns = pingpong_ns
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self.forgotten = 0

    def __len__(self) -> int:
        """Return how many blocks are kept."""
        return len(self._blocks)

    def _in_blocks(self, ino: int, pages: Sequence[int]) -> Iterator[tuple[_Block, Places]]:
        first, stop = pages[0], pages[-1] + 1
        if len(pages) == stop - first:
            while first < stop:
                number, at = divmod(first, _BLOCK)
                count = min(stop - first, _BLOCK - at)
                yield self._latest(ino, number), slice(at, at + count)
                first += count
        else:
            indexes = np.array(pages, np.int64)
            numbers = indexes >> _BLOCK_SHIFT
            for number in np.unique(numbers).tolist():
                yield self._latest(ino, number), indexes[numbers == number] & _BLOCK - 1
        self._forget()

    def _latest(self, ino: int, number: int) -> _Block:
        block = self._blocks.get((ino, number))
        if block is None:
            block = self._blocks[ino, number] = _Block()
        self._blocks.move_to_end((ino, number))
        return block

    def _forget(self) -> None:
        while len(self._blocks) > self._blocks_max:
            _, gone = self._blocks.popitem(last=False)
            self.forgotten += int(np.count_nonzero(gone.kind))

    def moved(self, ino: int, pages: Sequence[int], to: PageKind, now_ns: int, cause: int) -> int:
        """Enter pages that moved just now; return how many of them were ping-pong.

        ``cause`` is a number below 65,536 that ``faulted`` gives back.
        """
        if len(pages) == 1:
            return self._moved_one(ino, pages[0], to, now_ns, cause)
        pingpong, kind = 0, _KIND[to]
        for block, at in self._in_blocks(ino, pages):
            before = block.kind[at]
            recent = now_ns - block.moved_ns[at] <= self._pingpong_ns
            back = (before != 0) & (before != kind) & recent
            block.counts[_PINGPONG, at] += back
            block.counts[_PROMOTED if to is PageKind.PAGECACHE else _DEMOTED, at] += 1
            block.kind[at], block.moved_ns[at] = kind, now_ns
            block.cause[at], block.fresh[at] = cause, True
            pingpong += int(np.count_nonzero(back))
        return pingpong

    def _moved_one(self, ino: int, page: int, to: PageKind, now_ns: int, cause: int) -> int:
        """``moved`` for one page: on arrays it would take five times as long."""
        block, at, kind = self._latest(ino, page >> _BLOCK_SHIFT), page & _BLOCK - 1, _KIND[to]
        recent = now_ns - int(block.moved_ns[at]) <= self._pingpong_ns
        back = recent and int(block.kind[at]) not in (0, kind)
        block.counts[_PINGPONG, at] += back
        block.counts[_PROMOTED if to is PageKind.PAGECACHE else _DEMOTED, at] += 1
        block.kind[at], block.moved_ns[at] = kind, now_ns
        block.cause[at], block.fresh[at] = cause, True
        self._forget()
        return int(back)

    def failed(self, ino: int, pages: Sequence[int]) -> None:
        """Enter pages that were refused for good."""
        for block, at in self._in_blocks(ino, pages):
            block.counts[_FAILED, at] += 1

    def faulted(self, ino: int, page: int, time_ns: int) -> int | None:
        """Return the cause of the page's last move if this is the first fault since, else None."""
        block = self._blocks.get((ino, page >> _BLOCK_SHIFT))
        at = page & _BLOCK - 1
        if block is None or not block.fresh[at] or time_ns <= block.moved_ns[at]:
            return None
        block.fresh[at] = False
        block.counts[_REFAULTS, at] += 1
        return int(block.cause[at])

    def most_moved(self, count: int) -> list[dict[str, Any]]:
        """Return the ``count`` pages with the most moves and failures, the most first."""
        rows = heapq.nsmallest(count, self._rows(), key=lambda row: (-row[0], row[1], row[2]))
        return [
            {"ino": ino, "index": index, **dict(zip(COUNTS, counts, strict=True))}
            for _, ino, index, counts in rows
        ]

    def _rows(self) -> Iterator[tuple[int, int, int, list[int]]]:
        for (ino, number), block in self._blocks.items():
            moves = block.counts[_PROMOTED] + block.counts[_DEMOTED] + block.counts[_FAILED]
            for at in np.flatnonzero(moves).tolist():
                index = (number << _BLOCK_SHIFT) + at
                yield int(moves[at]), ino, index, block.counts[:, at].tolist()
