"""How often each block of the region was written: the lines that were flushed, counted by block.

A cell wears when its line reaches the medium, which is at a flush and not at a store. Counts are
kept by block, 4 bytes each: a count by line would cost 64 times as much. So what is known of a
cell's writes is the mean over its block's 64 lines; a line that had all of them had 64 times that.
Blocks that were never written near have no counts at all: neither memory nor a
snapshot's time grows with the region's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.units import PAGE_SHIFT

#: The unit in which a processor's cache writes memory back, in bytes.
LINE_SIZE: Final = 64
_LINE_SHIFT: Final = 6
_BLOCK_LINE_SHIFT: Final = PAGE_SHIFT - _LINE_SHIFT
LINES_PER_BLOCK: Final = 1 << _BLOCK_LINE_SHIFT
#: A stretch is 1,024 blocks: 4 MiB of the region, whose counts are one page of memory.
_STRETCH_SHIFT: Final = 10
_STRETCH_MASK: Final = (1 << _STRETCH_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class WearStatistics:
    """Line writes by block since the region was opened."""

    line_writes: int
    blocks_written: int
    hottest: list[tuple[int, int]]
    """(block, line writes), the most written first."""
    histogram: dict[int, int]
    """Number of blocks by the power of two that their line writes reach: 4 stands for 4 to 7."""


class Wear:
    """Line writes of every block of a region."""

    def __init__(self) -> None:
        #: Counts of the blocks of a stretch, by its number; made when one is first written.
        self._stretches: dict[int, npt.NDArray[np.uint32]] = {}
        # One element of a memoryview is several times faster than one of an array.
        self._fast: dict[int, memoryview[int]] = {}
        self._line_writes = 0

    def flushed(self, offset: int, size: int) -> int:
        """Count the lines of the range as written once; return how many they are."""
        if size <= 0:
            return 0
        first, last = offset >> _LINE_SHIFT, (offset + size - 1) >> _LINE_SHIFT
        lines = last - first + 1
        self._line_writes += lines
        block, last_block = first >> _BLOCK_LINE_SHIFT, last >> _BLOCK_LINE_SHIFT
        if block == last_block:
            self._stretch(block)[block & _STRETCH_MASK] += lines
            return lines
        self._stretch(block)[block & _STRETCH_MASK] += LINES_PER_BLOCK - first % LINES_PER_BLOCK
        self._stretch(last_block)[last_block & _STRETCH_MASK] += last % LINES_PER_BLOCK + 1
        self._count_whole(block + 1, last_block)
        return lines

    def _stretch(self, block: int) -> memoryview[int]:
        """Return the counts of the stretch that ``block`` lies in."""
        counts = self._fast.get(block >> _STRETCH_SHIFT)
        if counts is None:
            stretch = np.zeros(1 << _STRETCH_SHIFT, np.uint32)
            self._stretches[block >> _STRETCH_SHIFT] = stretch
            counts = self._fast[block >> _STRETCH_SHIFT] = stretch.data
        return counts

    def _count_whole(self, block: int, end: int) -> None:
        """Count every line of the blocks [block, end)."""
        while block < end:
            stop = min((block | _STRETCH_MASK) + 1, end)
            self._stretch(block)
            start = block & _STRETCH_MASK
            counts = self._stretches[block >> _STRETCH_SHIFT][start : start + stop - block]
            counts += LINES_PER_BLOCK
            block = stop

    def _written(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Return the blocks that were written, in order, and their counts."""
        blocks, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
        for number, stretch in sorted(self._stretches.items()):
            written = np.flatnonzero(stretch)
            blocks.append(written + (number << _STRETCH_SHIFT))
            counts.append(stretch[written])
        return np.concatenate(blocks), np.concatenate(counts)

    def statistics(self, hottest: int = 10) -> WearStatistics:
        """Return the figures; looks at every block near one that was written."""
        written, counts = self._written()
        # Of equals the lower block comes first, so that two calls agree.
        order = np.lexsort((written, -counts.astype(np.int64)))[:hottest]
        powers = np.floor(np.log2(counts)).astype(np.int64) if written.size else np.zeros(0, int)
        exponents, sizes = np.unique(powers, return_counts=True)
        return WearStatistics(
            line_writes=self._line_writes,
            blocks_written=int(written.size),
            hottest=[(int(written[at]), int(counts[at])) for at in order],
            histogram={1 << int(e): int(n) for e, n in zip(exponents, sizes, strict=True)},
        )
