"""``policy=write-hot``: only pages that are written to, ``writes`` times, earn RAM.

Signals used: XIP write faults, WRITE requests. Reading costs the medium no endurance, so pages
that are only read stay XIP, however hot they are. Where few pages are written, fewer writes reach
the region than under FIFO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from xipfs.migrate.parts import Remembered
from xipfs.migrate.policy import FAULT, WRITE, Move, PteKind, Seen, Signal, promote


@dataclass
class WriteHot:
    """Counts writes per page, of the pages that were written latest."""

    SIGNALS: ClassVar[frozenset[str]] = frozenset({FAULT, WRITE})
    writes: int = 2
    _writes: Remembered = field(default_factory=Remembered, init=False)

    def plan(self, signal: Signal, _seen: Seen) -> Iterable[Move]:
        """Return a promotion at the Nth write."""
        written = signal.write and signal.kind is PteKind.XIP
        if written and self._writes.count(signal.page) >= self.writes:
            self._writes.forget(signal.page)
            yield promote(signal.page, f"{self.writes} writes")
