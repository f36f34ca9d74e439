"""How often each block of the region was written: the lines that were flushed, counted by block.

A cell wears when its line reaches the medium, which is at a flush and not at a store. Counts are
kept by block, 4 bytes each, in memory that the host gives out when a block is first written: a
count by line would cost 64 times as much. So a block's *cell writes* are the mean over its 64
lines; a line that is written more often than its neighbours wears faster than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.units import PAGE_SHIFT, PAGE_SIZE

#: The unit in which a processor's cache writes memory back, in bytes.
LINE_SIZE: Final = 64
_LINE_SHIFT: Final = 6
LINES_PER_BLOCK: Final = PAGE_SIZE // LINE_SIZE
_BLOCK_LINE_SHIFT: Final = PAGE_SHIFT - _LINE_SHIFT


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

    def __init__(self, size_bytes: int) -> None:
        self._by_block: npt.NDArray[np.uint32] = np.zeros(
            -(-size_bytes // PAGE_SIZE), dtype=np.uint32
        )
        # One element of a memoryview is several times faster than one of an array.
        self._counts = self._by_block.data
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
            self._counts[block] += lines
            return lines
        self._counts[block] += LINES_PER_BLOCK - first % LINES_PER_BLOCK
        self._counts[last_block] += last % LINES_PER_BLOCK + 1
        if last_block > block + 1:
            self._by_block[block + 1 : last_block] += LINES_PER_BLOCK
        return lines

    def statistics(self, hottest: int = 10) -> WearStatistics:
        """Return the figures; looks at every block of the region."""
        written = np.flatnonzero(self._by_block)
        counts = self._by_block[written]
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
