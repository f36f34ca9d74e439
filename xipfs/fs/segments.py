"""Cutting a range of map entries into stretches that can be handled by one copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from xipfs.fs.types import PageKind
from xipfs.image import layout
from xipfs.image.filemap import Entries


@dataclass(frozen=True, slots=True)
class Segment:
    """Pages [start, stop), counted from the range's first: of one kind, in consecutive blocks.

    ``block`` is the first page's home; meaningless for holes.
    """

    start: int
    stop: int
    kind: PageKind
    block: int


def kind_of(body: int) -> PageKind:
    """Return the kind of the page whose map entry is ``body``."""
    if body == 0:
        return PageKind.HOLE
    return PageKind.PAGECACHE if body & layout.ENTRY_PAGECACHE else PageKind.XIP


def segments(bodies: Entries) -> Iterator[Segment]:
    """Cut ``bodies`` (uint64[pages]) into the fewest segments, in order."""
    if bodies.size == 1:
        body = int(bodies[0])
        yield Segment(0, 1, kind_of(body), body & layout.ENTRY_BLOCK_MASK)
        return
    # Within a segment, entries of pages differ by 1 (the block number) and holes by 0.
    steps = np.diff(bodies)
    holes = bodies == 0
    broken = np.where(holes[1:], ~holes[:-1], (steps != 1) | holes[:-1])
    cuts = [0, *(np.flatnonzero(broken) + 1).tolist(), bodies.size]
    for start, stop in pairwise(cuts):
        body = int(bodies[start])
        yield Segment(start, stop, kind_of(body), body & layout.ENTRY_BLOCK_MASK)
