"""``policy=write-hot``: only pages that are written to, ``writes`` times, earn RAM.

Signals used: XIP write faults, WRITE requests. A store through a mapping makes one of each, when
the kernel writes it back: the first request that follows a page's write fault counts as the same
write. Reading costs the medium no endurance, so pages
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
    #: When a page had a write fault that no request has followed yet.
    _stored_ns: Remembered = field(default_factory=Remembered, init=False)
    #: When a page had a request that followed no such fault; it may be heard before its fault.
    _requested_ns: Remembered = field(default_factory=Remembered, init=False)

    def plan(self, signal: Signal, _seen: Seen) -> Iterable[Move]:
        """Return a promotion at the Nth write."""
        if not signal.write or signal.kind is not PteKind.XIP or self._is_counted(signal):
            return
        page = signal.page
        if self._writes.count(page) >= self.writes:
            self._writes.forget(page)
            yield promote(page, f"{self.writes} writes")

    def _is_counted(self, signal: Signal) -> bool:
        """Return whether the other half of this write was counted: its fault, or its write-back."""
        page = signal.page
        if signal.source == FAULT:
            requested_ns = self._requested_ns.get(page)
            if requested_ns is not None and signal.time_ns <= requested_ns:
                self._requested_ns.forget(page)
                return True
            self._stored_ns.put(page, signal.time_ns)
            return False
        if self._stored_ns.get(page) is not None:
            self._stored_ns.forget(page)
            return True
        self._requested_ns.put(page, signal.time_ns)
        return False
