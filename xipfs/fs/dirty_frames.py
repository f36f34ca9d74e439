"""Which frames hold what their homes do not, in the order in which they became so.

Arrays all through, so that a run of frames becomes clean by a few array operations. The order is
a queue. A frame that becomes clean leaves its place in it, which is known by the frame's being
elsewhere, or nowhere; such places are passed over, and closed up when the queue is full.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from xipfs.fs.frames_by_page import Numbers, Pfns
from xipfs.units import Pfn

_PLACES_MIN: Final = 256


class DirtyFrames:
    """The dirty frames of one page cache: 8 bytes a frame, up to 32 for each that is dirty."""

    def __init__(self, ram_pages: int) -> None:
        # np.zeros maps zero pages lazily: frames never used cost the host nothing.
        self._place = np.zeros(ram_pages, np.int64)  # in the queue, 1 added; 0: clean
        # One element of a memoryview is several times faster than one of an array.
        self._places = self._place.data
        self._count = 0
        self._set_queue(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def _set_queue(self, pfns: Pfns, since_ns: Numbers) -> None:
        """Have these frames queue up, the oldest first, with room for as many again."""
        room = np.zeros(max(pfns.size, _PLACES_MIN), np.int64)
        self._queue = np.concatenate([pfns, room])
        self._since = np.concatenate([since_ns, room])  # when each became dirty; ascends
        self._fast_queue, self._fast_since = self._queue.data, self._since.data
        self._start, self._end = 0, pfns.size
        self._place[pfns] = np.arange(1, pfns.size + 1)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, pfn: int) -> bool:
        return self._places[pfn] != 0

    def among(self, pfns: Pfns) -> Pfns:
        """Return those of ``pfns`` that are dirty."""
        dirty: Pfns = pfns[self._place[pfns] != 0]
        return dirty

    def add(self, pfn: Pfn, now_ns: int) -> None:
        """Note that the frame is dirty, since now if it was clean; now is never earlier."""
        if self._places[pfn]:
            return
        if self._end == self._queue.size:
            waiting = self._waiting(self._start, self._end)
            self._set_queue(self._queue[waiting], self._since[waiting])
        self._fast_queue[self._end], self._fast_since[self._end] = pfn, now_ns
        self._end += 1
        self._places[pfn] = self._end
        self._count += 1

    def clear(self, pfns: Pfns) -> None:
        """Note that ``pfns``, all dirty, each once, are clean."""
        self._place[pfns] = 0
        self._count -= pfns.size
        if not self._count:
            self._start = self._end = 0

    def oldest(self, limit: int, latest_ns: int) -> Pfns:
        """Return up to ``limit`` frames dirty since ``latest_ns`` or earlier, the oldest first."""
        due = self._start + int(
            np.searchsorted(self._since[self._start : self._end], latest_ns, side="right")
        )
        found: list[Pfns] = []
        at = self._start
        while at < due and limit > 0:
            stop = min(at + max(limit, _PLACES_MIN), due)
            waiting = self._waiting(at, stop)[:limit]
            if waiting.size:
                found.append(self._queue[waiting])
                limit -= waiting.size
            elif not found:
                self._start = stop  # nobody there waits any more: never to be looked at again
            at = stop
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _waiting(self, start: int, stop: int) -> Numbers:
        """Return those places from ``start`` up to ``stop`` whose frames wait there."""
        placed = self._place[self._queue[start:stop]] == np.arange(start + 1, stop + 1)
        return np.flatnonzero(placed) + start
