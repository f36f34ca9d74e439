"""``policy=fifo``: every page earns RAM at its first fault; the baseline of comparisons.

Signals used: XIP faults. When RAM is full the page cache evicts; this policy demotes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from xipfs.migrate.policy import FAULT, Move, PteKind, Seen, Signal, promote


@dataclass
class Fifo:
    """Remembers nothing."""

    SIGNALS: ClassVar[frozenset[str]] = frozenset({FAULT})

    def plan(self, signal: Signal, _seen: Seen) -> Iterable[Move]:
        """Return a promotion for a fault on an XIP page."""
        if signal.kind is PteKind.XIP:
            yield promote(signal.page, "first fault")
