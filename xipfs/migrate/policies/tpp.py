"""``policy=tpp``: a page earns RAM at its second fault within a window; cold ones leave early.

Signals used: faults and hint faults with their time stamps, moves, evictions. After TPP (Maruf et
al., ASPLOS 2023). A page seen once (a scan) earns nothing, and neither does one whose faults lie
further apart than ``window_ms``: between scans it finds more pages in RAM than FIFO. Demotion runs
ahead of need: above ``high`` percent of RAM the pages longest untouched go, down to ``low``.
Promotions and demotions are bounded by ``pages_per_s``, and no page goes back within ``stay_ms``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from xipfs.migrate.parts import NS_PER_MS, Remembered, Residents, Watermarks
from xipfs.migrate.policy import (
    DONE,
    FAULT,
    HINT,
    TOUCHES,
    Move,
    Page,
    PteKind,
    Seen,
    Signal,
    demote,
    promote,
)


@dataclass
class Tpp:
    """Remembers the last fault of the pages that faulted latest, and the order of those in RAM."""

    SIGNALS: ClassVar[frozenset[str]] = DONE | {FAULT, HINT}
    window_ms: int = 1000
    pages_per_s: int = 10_000
    stay_ms: int = 100
    high: int = 95
    low: int = 90
    _last_ns: Remembered = field(default_factory=Remembered, init=False)
    _residents: Residents = field(default_factory=Residents, init=False)
    _marks: Watermarks = field(init=False)

    def __post_init__(self) -> None:
        self._marks = Watermarks(self.high, self.low)

    def plan(self, signal: Signal, seen: Seen) -> Iterable[Move]:
        """Return the promotion that this fault has earned, and demotions if RAM runs short."""
        self._residents.hear(signal, seen, to_end=True)
        if signal.source in TOUCHES and signal.kind is PteKind.XIP:
            before_ns = self._last_ns.get(signal.page)
            self._last_ns.put(signal.page, signal.time_ns)
            window_ns = self.window_ms * NS_PER_MS
            if before_ns is not None and signal.time_ns - before_ns <= window_ns:
                yield promote(signal.page, f"2 faults in {self.window_ms} ms")
        for page in self.victims(self._marks.excess(seen), seen):
            yield demote(page, f"RAM above {self.high} %, longest untouched")

    def victims(self, count: int, _seen: Seen) -> list[Page]:
        """Return the pages longest untouched."""
        return self._residents.longest_untouched(count)
