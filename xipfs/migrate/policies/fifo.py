"""``policy=fifo``: every page earns RAM at its first fault; the baseline of comparisons.

Signal used: XIP faults. When RAM is full, what was promoted longest ago goes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.engine import Move


@dataclass
class Fifo:
    """Remembers nothing."""

    def plan(self, charges: Iterable[Charge]) -> list[Move]:
        """Return a promotion for each faulted page."""
        return [
            Move(charge.ino, charge.page, PageKind.PAGECACHE, "first fault")
            for charge in charges
            if charge.kind is PteKind.XIP and not charge.hint
        ]
