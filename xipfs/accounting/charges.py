"""What a fault is charged as, and the books that are kept of it: totals, and one line a process."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xipfs.accounting.effects import Effect
from xipfs.mm.access import MAPS_ANON, MAPS_NONE, MAPS_PAGECACHE, MAPS_XIP
from xipfs.trace.fault_batch import ERROR, ERROR_WRITE, INDEX, INO, PID, TIME, Cells

Ints = npt.NDArray[np.int64]


class PteKind(enum.Enum):
    """What the PTE maps once a fault is over."""

    XIP = "xip"
    """A frame without counted page: an XIP page, or the zero page over a hole."""
    PAGECACHE = "pagecache"
    """A page-cache page, counted."""
    COW = "cow"
    """An anonymous page: a private copy."""
    NONE = "sigbus"
    """Nothing: the access ended in SIGBUS."""


class Charge(NamedTuple):
    """One real fault as VM_MIXEDMAP would have charged it; ``page`` is the file page's index."""

    time_ns: int
    pid: int
    ino: int
    page: int
    kind: PteKind
    write: bool
    major: bool
    extra: int
    """Further faults that the rules would have taken for this access."""
    hint: bool = False
    """The modelled PTE let the access pass: the fault is xipfs's own doing (see ``hints``)."""
    cause: str = ""
    """What took the page from the kernel if xipfs did: move, evict or hint (see ``causes``)."""
    effect: Effect | None = None
    """What the fault did count by count, where faults are read one by one."""


#: The kinds by what ``maps_what`` answers.
KINDS: Final = {
    MAPS_NONE: PteKind.NONE,
    MAPS_XIP: PteKind.XIP,
    MAPS_PAGECACHE: PteKind.PAGECACHE,
    MAPS_ANON: PteKind.COW,
}


class ChargeBatch:
    """The charges of a ``FaultBatch``, as arrays beside its ``cells``.

    ``kind``: a MAPS_ constant (see ``KINDS``); ``major``; ``extra``. What was charged by itself is
    in ``by_hand``, by its place, and has the kind -1.
    """

    def __init__(
        self, cells: Cells, kind: Ints, major: Ints, extra: Ints, by_hand: dict[int, Charge]
    ) -> None:
        self.cells = cells
        self.kind = kind
        self.major = major
        self.extra = extra
        self.by_hand = by_hand

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Charge]:
        """Yield the charges one by one."""
        columns = (TIME, PID, INO, INDEX, ERROR)
        rows = zip(
            *(self.cells[:, column].tolist() for column in columns),
            self.kind.tolist(),
            self.major.tolist(),
            self.extra.tolist(),
            strict=True,
        )
        for place, (time_ns, pid, ino, page, error, kind, major, extra) in enumerate(rows):
            if kind < 0:
                yield self.by_hand[place]
                continue
            write = error & ERROR_WRITE != 0
            yield Charge(time_ns, pid, ino, page, KINDS[kind], write, bool(major), extra)


@dataclass
class FaultCounters:
    """Counts of faults since the start; names as in /proc/vmstat where it has them."""

    pgfault: int = 0
    pgmajfault: int = 0
    pgfault_xip: int = 0
    pgfault_pagecache: int = 0
    pgfault_cow: int = 0
    pgfault_sigbus: int = 0
    pgfault_extra: int = 0
    pgfault_hint: int = 0

    def add(self, charge: Charge) -> None:
        """Count one charge; a hint fault in ``pgfault_hint`` and nowhere else."""
        if charge.hint:
            self.pgfault_hint += 1
            return
        self.add_many(charge.kind, 1, charge.major, charge.extra)

    def add_many(self, kind: PteKind, times: int, major: int, extra: int) -> None:
        """Count so many charges of a kind that are alike; no hint faults."""
        self.pgfault += times
        self.pgmajfault += times * major
        self.pgfault_extra += times * extra
        if kind is PteKind.XIP:
            self.pgfault_xip += times
        elif kind is PteKind.PAGECACHE:
            self.pgfault_pagecache += times
        elif kind is PteKind.COW:
            self.pgfault_cow += times
        else:
            self.pgfault_sigbus += times

    def merge(self, other: FaultCounters) -> None:
        """Add another's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class ProcessCharges:
    """One address space's line; ``comm`` is the name it had when it was last charged.

    ``incomplete``: trace records were lost while it lived, so its figures may be too low.
    """

    pid: int
    comm: str
    exited: bool = False
    incomplete: bool = False
    faults: FaultCounters = field(default_factory=FaultCounters)


#: Lines of exited processes that are kept apart; older ones are summed up in one.
KEEP_EXITED: Final = 4096


class Ledger:
    """Totals and lines by address space. Memory is bounded whatever the number of processes."""

    def __init__(self) -> None:
        self.total = FaultCounters()
        self.live: dict[int, ProcessCharges] = {}
        self.exited: OrderedDict[int, ProcessCharges] = OrderedDict()
        self.older = ProcessCharges(0, "(older)", exited=True)
        #: Living address spaces that records were lost of, charged by now or not.
        self.incomplete: set[int] = set()

    def charge(self, mm: int, comm: str, charge: Charge) -> None:
        """Enter ``charge`` in the totals and in the line of address space ``mm``."""
        self.total.add(charge)
        self._line(mm, charge.pid, comm).faults.add(charge)

    def charge_many(self, mm: int, pid: int, comm: str, counters: FaultCounters) -> None:
        """Enter what faults of address space ``mm`` were charged."""
        self.total.merge(counters)
        self._line(mm, pid, comm).faults.merge(counters)

    def _line(self, mm: int, pid: int, comm: str) -> ProcessCharges:
        line = self.live.get(mm)
        if line is None:
            # A fault can be told just after its process's exit.
            line = self.exited.get(mm)
        if line is None:
            line = self.live[mm] = ProcessCharges(pid, comm, incomplete=mm in self.incomplete)
        line.comm = comm or line.comm
        return line

    def mark_incomplete(self, mm: int) -> None:
        """Say from now on that records of ``mm`` were lost."""
        self.incomplete.add(mm)
        if mm in self.live:
            self.live[mm].incomplete = True

    def exit(self, mm: int) -> None:
        """Close the line of ``mm``, keeping its figures."""
        self.incomplete.discard(mm)
        line = self.live.pop(mm, None)
        if line is None:
            return
        line.exited = True
        self.exited[mm] = line
        if len(self.exited) > KEEP_EXITED:
            _, oldest = self.exited.popitem(last=False)
            self.older.faults.merge(oldest.faults)
            self.older.incomplete |= oldest.incomplete

    def lines(self) -> list[ProcessCharges]:
        """Return every line, oldest first; their sum is the total."""
        older = [self.older] if self.older.faults.pgfault else []
        return [*older, *self.exited.values(), *self.live.values()]
