"""``policy=tpp``: a page earns RAM at its second fault within a window, at a bounded rate.

Signals used: XIP faults and hint faults, with their time stamps. A page seen once (a scan) earns
nothing, and neither does one whose faults lie further apart than ``window_ms``: between scans it
finds more pages in RAM than FIFO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.engine import Move

_NS_PER_MS = 1_000_000
#: Pages that are remembered; the one that faulted longest ago is forgotten.
_REMEMBERED = 1 << 16


@dataclass
class Tpp:
    """Time is the charges' own, so the same charges give the same plan."""

    window_ms: int = 1000
    pages_per_s: int = 10_000
    _last_ns: dict[tuple[int, int], int] = field(default_factory=dict, init=False)
    _second: int = field(default=-1, init=False)
    _promoted: int = field(default=0, init=False)

    def plan(self, charges: Iterable[Charge]) -> list[Move]:
        """Return the promotions that these charges, in time order, have earned."""
        moves = []
        for charge in charges:
            if charge.kind is not PteKind.XIP:
                continue
            page = (charge.ino, charge.page)
            before_ns = self._last_ns.pop(page, None)
            soon = (
                before_ns is not None and charge.time_ns - before_ns <= self.window_ms * _NS_PER_MS
            )
            if soon and self._within_rate(charge.time_ns):
                moves.append(Move(*page, PageKind.PAGECACHE, f"2 faults in {self.window_ms} ms"))
                continue
            self._last_ns[page] = charge.time_ns
            if len(self._last_ns) > _REMEMBERED:
                del self._last_ns[next(iter(self._last_ns))]
        return moves

    def _within_rate(self, time_ns: int) -> bool:
        second = time_ns // (1000 * _NS_PER_MS)
        if second != self._second:
            self._second, self._promoted = second, 0
        self._promoted += 1
        return self._promoted <= self.pages_per_s
