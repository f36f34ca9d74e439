"""Frames and homes that follow one another: what is copied between them in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import FsError
from xipfs.fs.frames_by_page import Numbers, Pfns
from xipfs.image.layout import BLOCK_SHIFT
from xipfs.memory.region import Medium
from xipfs.units import PAGE_SIZE

#: Frames of one file that lie in shorter runs than this, on average, are gathered at once.
_RUN_PAGES_MIN: Final = 8


def runs(numbers: Numbers) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the slices of ``numbers`` that count up by one.

    >>> list(runs(np.array([7, 8, 9, 4, 5])))
    [(0, 3), (3, 5)]
    """
    if not numbers.size:
        return
    cuts = (numbers[1:] != numbers[:-1] + 1).nonzero()[0] + 1
    yield from pairwise([0, *cuts.tolist(), numbers.size])


def rows(pfns: Pfns) -> Iterator[tuple[slice, slice | Pfns]]:
    """Cut ``pfns`` into parts, each with the frames' rows: a slice, which copies nothing, if the
    frames lie together; if they are scattered too much for that, all of them at once.
    """
    together = list(runs(pfns))
    if len(together) * _RUN_PAGES_MIN > pfns.size + _RUN_PAGES_MIN:
        yield slice(0, pfns.size), pfns
        return
    for start, stop in together:
        yield slice(start, stop), slice(int(pfns[start]), int(pfns[start]) + stop - start)


def write_runs(
    medium: Medium, frames: npt.NDArray[np.uint8], pfns: Pfns, homes: Numbers
) -> tuple[npt.NDArray[np.bool_], FsError | None]:
    """Store and flush the frames ``pfns`` at ``homes``, which ascend, in as few pieces as can be.

    ``frames`` has shape (pages of RAM, PAGE_SIZE). Return which were written, and the first error
    of those that the medium had no room for.
    """
    written = np.ones(pfns.size, bool)
    failed: FsError | None = None
    for start, stop in runs(homes):
        try:
            _write(medium, frames, pfns[start:stop], int(homes[start]))
        except FsError:
            # Some of the run may have the room.
            for at in range(start, stop):
                try:
                    _write(medium, frames, pfns[at : at + 1], int(homes[at]))
                except FsError as error:
                    written[at], failed = False, failed or error
    return written, failed


def _write(medium: Medium, frames: npt.NDArray[np.uint8], pfns: Pfns, home: int) -> None:
    for part, which in rows(pfns):
        offset = home + part.start << BLOCK_SHIFT
        medium.store(offset, frames[which].reshape(-1).data)
    medium.flush(home << BLOCK_SHIFT, pfns.size * PAGE_SIZE)
