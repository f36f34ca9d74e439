"""Which pages fault most: counts per file page, by what the fault was charged as."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np

from xipfs.accounting.charges import KINDS, Charge, ChargeBatch, PteKind
from xipfs.trace.fault_batch import INDEX, INO


class Heat:
    """Faults per page since the mount. Memory grows with the pages that ever faulted, not more."""

    def __init__(self) -> None:
        self._pages: dict[tuple[int, int], list[int]] = {}

    def add(self, charges: Iterable[Charge]) -> None:
        """Count the charges; a SIGBUS has no page."""
        for charge in charges:
            if charge.kind is PteKind.NONE:
                continue
            counts = self._pages.setdefault((charge.ino, charge.page), [0, 0, 0])
            counts[_SLOT[charge.kind]] += 1

    def add_many(self, charges: ChargeBatch) -> None:
        """Count many at once: what a page is charged as goes into one number with it."""
        inos = charges.cells[:, INO]
        self.add(charge for charge in charges.by_hand.values() if not charge.hint)
        many = charges.kind >= 0
        for ino in np.unique(inos).tolist():
            own = many & (inos == ino)
            keys = charges.cells[own, INDEX] << 2 | charges.kind[own]
            different, counts = np.unique(keys, return_counts=True)
            for key, count in zip(different.tolist(), counts.tolist(), strict=True):
                slot = _SLOT.get(KINDS[key & 3])
                if slot is not None:
                    self._pages.setdefault((ino, key >> 2), [0, 0, 0])[slot] += count

    def hottest(self, count: int) -> list[dict[str, Any]]:
        """Return the ``count`` pages with the most faults, hottest first, as JSON-ready objects."""
        top = heapq.nsmallest(count, self._pages.items(), key=lambda item: (-sum(item[1]), item[0]))
        return [
            {
                "ino": ino,
                "index": index,
                "pgfault": sum(counts),
                "pgfault_xip": counts[0],
                "pgfault_pagecache": counts[1],
                "pgfault_cow": counts[2],
            }
            for (ino, index), counts in top
        ]

    def __len__(self) -> int:
        return len(self._pages)


_SLOT = {PteKind.XIP: 0, PteKind.PAGECACHE: 1, PteKind.COW: 2}
