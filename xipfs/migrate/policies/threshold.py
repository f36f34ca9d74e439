"""``policy=threshold``: a page earns RAM at its fault number ``promote`` while it is XIP.

Signals used: XIP faults and hint faults. A fault that ends in a private copy (COW) is no reason
to promote: the process has its own page then, and the next fault there would not come from this
one. Pages of a scan, seen once, stay out of RAM: there it finds more pages in RAM than FIFO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from xipfs.migrate.parts import Remembered
from xipfs.migrate.policy import FAULT, HINT, Move, PteKind, Seen, Signal, promote


@dataclass
class Threshold:
    """Counts faults per page, of the pages that faulted latest."""

    SIGNALS: ClassVar[frozenset[str]] = frozenset({FAULT, HINT})
    promote: int
    _faults: Remembered = field(default_factory=Remembered, init=False)

    def plan(self, signal: Signal, _seen: Seen) -> Iterable[Move]:
        """Return a promotion at the Nth fault."""
        if signal.kind is PteKind.XIP and self._faults.count(signal.page) >= self.promote:
            self._faults.forget(signal.page)
            yield promote(signal.page, f"{self.promote} faults")
