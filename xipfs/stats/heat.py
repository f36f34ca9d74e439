"""Which pages fault most: counts per file page, by what the fault was charged as."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xipfs.accounting.charges import KINDS, Charge, ChargeBatch, PteKind
from xipfs.mm.access import MAPS_NONE
from xipfs.trace.fault_batch import INDEX, INO

#: Faults that are counted together: 8 MiB of them.
_PENDING_MAX: Final = 1 << 20


class Heat:
    """Faults per page since the mount. Memory grows with the pages that ever faulted, not more."""

    def __init__(self) -> None:
        self._pages: dict[tuple[int, int], list[int]] = {}
        #: By inode: page << 2 | what it was charged as, of faults not counted in ``_pages`` yet.
        self._pending: dict[int, list[npt.NDArray[np.int64]]] = {}
        self._pending_count = 0

    def add(self, charges: Iterable[Charge]) -> None:
        """Count the charges; a SIGBUS has no page."""
        for charge in charges:
            if charge.kind is PteKind.NONE:
                continue
            counts = self._pages.setdefault((charge.ino, charge.page), [0, 0, 0])
            counts[_SLOT[charge.kind]] += 1

    def add_many(self, charges: ChargeBatch) -> None:
        """Count many at once: they are sorted by page only when there are enough, or asked for."""
        self.add(charge for charge in charges.by_hand.values() if not charge.hint)
        inos = charges.cells[:, INO]
        keys = charges.cells[:, INDEX] << 2 | charges.kind
        many = charges.kind > MAPS_NONE
        for ino in [int(inos[0])] if (inos == inos[0]).all() else np.unique(inos).tolist():
            self._pending.setdefault(ino, []).append(keys[many & (inos == ino)])
        self._pending_count += len(charges)
        if self._pending_count > _PENDING_MAX:
            self._merge()

    def _merge(self) -> None:
        for ino, keys in self._pending.items():
            different, counts = np.unique(np.concatenate(keys), return_counts=True)
            for key, count in zip(different.tolist(), counts.tolist(), strict=True):
                slot = _SLOT[KINDS[key & 3]]
                self._pages.setdefault((ino, key >> 2), [0, 0, 0])[slot] += count
        self._pending.clear()
        self._pending_count = 0

    def hottest(self, count: int) -> list[dict[str, Any]]:
        """Return the ``count`` pages with the most faults, hottest first, as JSON-ready objects."""
        self._merge()
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
        self._merge()
        return len(self._pages)


_SLOT = {PteKind.XIP: 0, PteKind.PAGECACHE: 1, PteKind.COW: 2}
