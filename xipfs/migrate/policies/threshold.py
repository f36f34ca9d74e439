"""``policy=threshold,promote=N``: a page earns RAM at its Nth fault while it is XIP.

Signal used: faults only. A fault that ends in a private copy (COW) is no reason to promote: the
process has its own page then, and the next fault there would not come from this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.engine import Move


@dataclass
class Threshold:
    """Counts XIP faults per page; memory is bounded by the pages that faulted below N."""

    promote: int
    _faults: Counter[tuple[int, int]] = field(default_factory=Counter, init=False)

    def plan(self, charges: Iterable[Charge]) -> list[Move]:
        """Return the promotions that these charges, in time order, have earned."""
        moves = []
        for charge in charges:
            if charge.kind is not PteKind.XIP or charge.hint:
                continue
            page = (charge.ino, charge.page)
            self._faults[page] += 1
            if self._faults[page] >= self.promote:
                del self._faults[page]
                moves.append(Move(*page, PageKind.PAGECACHE, f"{self.promote} faults"))
        return moves
