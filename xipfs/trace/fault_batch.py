"""Many faults as one array: what the compiled path makes of trace records, and accounting takes.

A batch stands for the same events one by one, which ``expand`` gives: each row a ``Fault`` of
origin TRAP and, where a window is noted, the ``Around`` that came with it. Rows are in the order in
which they took effect, and nothing else happened between the first and the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.trace import events
from xipfs.units import PAGE_MASK, PAGE_SHIFT

ERROR_PROTECTION: Final = 1
ERROR_WRITE: Final = 2
ERROR_USER: Final = 4
ERROR_EXEC: Final = 16

# Columns of FaultBatch.cells, int64.
TIME: Final = 0  #: when the trap came, ns
EFFECT: Final = 1  #: when its last record was written, ns
MM: Final = 2
PID: Final = 3
TID: Final = 4
ADDRESS: Final = 5  #: byte
INO: Final = 6
INDEX: Final = 7  #: page of the file
ERROR: Final = 8  #: the trap's error code, and FROM_KERNEL
VERDICT: Final = 9  #: place in VERDICTS
AROUND_FIRST: Final = 10  #: pages that fault-around tried; first above last: it did not run
AROUND_LAST: Final = 11
CELL_COLUMNS: Final = 12

#: Above every error code of the processor.
FROM_KERNEL: Final = 1 << 32
VERDICTS: Final = (events.MINOR, events.MAJOR)

#: AROUND_FIRST and AROUND_LAST where fault-around did not run.
NO_WINDOW: Final = (1, 0)

Cells = npt.NDArray[np.int64]
"""Shape (n, CELL_COLUMNS)."""


class FaultBatch:
    """Plain faults, all of pages known before: no mapping is told between them."""

    __slots__ = ("cells",)

    def __init__(self, cells: Cells) -> None:
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def expand(self) -> Iterator[events.Fault | events.Around]:
        """Yield the same faults and fault-arounds one by one."""
        for row in self.cells.tolist():
            yield fault_of(row)
            around = around_of(row)
            if around is not None:
                yield around


def expanded(items: Iterable[events.Event | FaultBatch]) -> Iterator[events.Event]:
    """Yield every event by itself."""
    for item in items:
        if isinstance(item, FaultBatch):
            yield from item.expand()
        else:
            yield item


def steps(
    items: list[events.Event | FaultBatch], count: int
) -> Iterator[list[events.Event] | FaultBatch]:
    """Yield batches by themselves and what is between them in lists of up to ``count``.

    Yields at least one step, if an empty one.
    """
    single: list[events.Event] = []
    for item in items:
        if isinstance(item, FaultBatch):
            if single:
                yield single
                single = []
            yield item
            continue
        single.append(item)
        if len(single) == count:
            yield single
            single = []
    if single or not items:
        yield single


def fault_of(row: list[int]) -> events.Fault:
    """Return the fault that a row of a batch stands for."""
    error = row[ERROR]
    return events.Fault(
        row[TIME],
        row[MM],
        row[PID],
        row[TID],
        row[ADDRESS],
        row[INO],
        row[INDEX],
        error & ERROR_WRITE != 0,
        error & ERROR_EXEC != 0,
        error & FROM_KERNEL == 0,
        error & ERROR_PROTECTION != 0,
        VERDICTS[row[VERDICT]],
        events.TRAP,
    )


def around_of(row: list[int]) -> events.Around | None:
    """Return the fault-around of the same row, if there was one."""
    first, last = row[AROUND_FIRST], row[AROUND_LAST]
    if first > last:
        return None
    address = (row[ADDRESS] & PAGE_MASK) + (first - row[INDEX] << PAGE_SHIFT)
    return events.Around(row[EFFECT], row[MM], row[PID], address, row[INO], first, last)


def as_cells(fault: events.Fault, effect_ns: int, first: int, last: int) -> Cells:
    """Return one row for a fault of origin TRAP and its fault-around."""
    error = ERROR_PROTECTION if fault.protection else 0
    error |= ERROR_WRITE if fault.write else 0
    error |= ERROR_EXEC if fault.execute else 0
    error |= ERROR_USER if fault.user else FROM_KERNEL
    verdict = VERDICTS.index(fault.verdict)
    who = (fault.mm, fault.pid, fault.tid)
    what = (fault.address, fault.ino, fault.index, error, verdict)
    return np.array([[fault.time_ns, effect_ns, *who, *what, first, last]], np.int64)
