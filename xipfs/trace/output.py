"""What the grammar puts out: collected in the order it was found, handed on in the order of effect.

A fault is known to be over only at its thread's next record, so it is found later than what other
threads did meanwhile. Among equal times the order of finding stays.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.trace import events, fault_batch
from xipfs.trace.fault_batch import Cells, FaultBatch

#: Faults handed on as one: the consumer's steps stay short.
BATCH_FAULTS_MAX: Final = 1 << 14
#: Fewer faults are handed on one by one.
_BATCH_FAULTS_MIN: Final = 8


class Output:
    """Collects events with the time they took effect; ``take`` returns them in that order."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self._events: list[events.Event] = []
        #: Faults by the array, and how many single events had been found before each array.
        self._batches: list[tuple[int, Cells]] = []

    def emit(self, time_ns: int, event: events.Event) -> None:
        """Add ``event``; among equal times the order of the calls stays."""
        self._times.append(time_ns)
        self._events.append(event)

    def emit_batch(self, cells: Cells) -> None:
        """Add faults, as rows of a ``FaultBatch``."""
        self._batches.append((len(self._times), cells))

    def take(self) -> list[events.Event | FaultBatch]:
        """Return and forget all events."""
        taken: list[events.Event | FaultBatch]
        if self._batches:
            taken = self._merged()
        else:
            order = sorted(range(len(self._times)), key=self._times.__getitem__)
            taken = [self._events[at] for at in order]
        self._times.clear()
        self._events.clear()
        self._batches.clear()
        return taken

    def _merged(self) -> list[events.Event | FaultBatch]:
        singles = np.array(self._times, np.int64)
        times: list[npt.NDArray[np.int64]] = []
        # What each time belongs to: a single event's place, or past them all a row of ``cells``.
        sources: list[npt.NDArray[np.int64]] = []
        cells = np.concatenate([each for _, each in self._batches])
        taken_singles, taken_rows = 0, len(singles)
        for before, each in [*self._batches, (len(singles), cells[:0])]:
            times += [singles[taken_singles:before], each[:, fault_batch.EFFECT]]
            sources.append(np.arange(taken_singles, before))
            sources.append(np.arange(taken_rows, taken_rows + len(each)))
            taken_singles, taken_rows = before, taken_rows + len(each)
        order = np.argsort(np.concatenate(times), kind="stable")
        source = np.concatenate(sources)[order]
        merged: list[events.Event | FaultBatch] = []
        start = 0
        for place in [*np.flatnonzero(source < len(singles)).tolist(), len(source)]:
            _add_rows(merged, cells, source[start:place] - len(singles))
            if place < len(source):
                merged.append(self._events[source[place]])
            start = place + 1
        return merged


def _add_rows(
    merged: list[events.Event | FaultBatch], cells: Cells, rows: npt.NDArray[np.int64]
) -> None:
    if 0 < len(rows) < _BATCH_FAULTS_MIN:
        merged += FaultBatch(cells[rows]).expand()
        return
    for start in range(0, len(rows), BATCH_FAULTS_MAX):
        merged.append(FaultBatch(cells.take(rows[start : start + BATCH_FAULTS_MAX], axis=0)))
