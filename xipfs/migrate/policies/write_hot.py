"""``policy=write-hot``: only a page written ``writes`` times through a mapping earns RAM.

Signal used: XIP write faults. Reading costs the medium no endurance, so pages that are only read
stay XIP, however hot they are. Where few pages are written, fewer writes reach the region than
under FIFO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.engine import Move


@dataclass
class WriteHot:
    """Counts XIP write faults per page."""

    writes: int = 2
    _faults: Counter[tuple[int, int]] = field(default_factory=Counter, init=False)

    def plan(self, charges: Iterable[Charge]) -> list[Move]:
        """Return the promotions that these charges, in time order, have earned."""
        moves = []
        for charge in charges:
            if charge.kind is not PteKind.XIP or charge.hint or not charge.write:
                continue
            page = (charge.ino, charge.page)
            self._faults[page] += 1
            if self._faults[page] >= self.writes:
                del self._faults[page]
                moves.append(Move(*page, PageKind.PAGECACHE, f"{self.writes} write faults"))
        return moves
