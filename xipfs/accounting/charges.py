"""What a fault is charged as, and the books that are kept of it: totals, and one line a process."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, NamedTuple


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
        self.pgfault += 1
        self.pgmajfault += charge.major
        self.pgfault_extra += charge.extra
        if charge.kind is PteKind.XIP:
            self.pgfault_xip += 1
        elif charge.kind is PteKind.PAGECACHE:
            self.pgfault_pagecache += 1
        elif charge.kind is PteKind.COW:
            self.pgfault_cow += 1
        else:
            self.pgfault_sigbus += 1

    def merge(self, other: FaultCounters) -> None:
        """Add another's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class ProcessCharges:
    """One address space's line; ``comm`` is the name it had when it was last charged."""

    pid: int
    comm: str
    exited: bool = False
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

    def charge(self, mm: int, comm: str, charge: Charge) -> None:
        """Enter ``charge`` in the totals and in the line of address space ``mm``."""
        self.total.add(charge)
        line = self.live.get(mm)
        if line is None:
            # A fault can be told just after its process's exit.
            line = self.exited.get(mm)
        if line is None:
            line = self.live[mm] = ProcessCharges(charge.pid, comm)
        line.comm = comm or line.comm
        line.faults.add(charge)

    def exit(self, mm: int) -> None:
        """Close the line of ``mm``, keeping its figures."""
        line = self.live.pop(mm, None)
        if line is None:
            return
        line.exited = True
        self.exited[mm] = line
        if len(self.exited) > KEEP_EXITED:
            _, oldest = self.exited.popitem(last=False)
            self.older.faults.merge(oldest.faults)

    def lines(self) -> list[ProcessCharges]:
        """Return every line, oldest first; their sum is the total."""
        older = [self.older] if self.older.faults.pgfault else []
        return [*older, *self.exited.values(), *self.live.values()]
