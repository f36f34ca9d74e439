"""``policy=clock``: a page earns RAM at its first touch; the clock's hand takes what is not used.

Signals used: faults, hint faults, READ and WRITE requests, moves, evictions. Above ``high`` percent
of RAM the hand goes round: a page touched since it last passed gets a second chance, the others
are demoted, down to ``low`` percent. Where some pages are used again and again it finds more of
them in RAM than FIFO, which takes them out as if they were not. No page goes back within
``stay_ms``; that must be short beside the time in which RAM takes in as many pages as it holds, or
the hand finds nothing that may leave.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from xipfs.migrate.parts import Residents, Watermarks
from xipfs.migrate.policy import DONE, TOUCHES, Move, Page, PteKind, Seen, Signal, demote, promote


@dataclass
class Clock:
    """Remembers the pages in RAM, each with a mark."""

    SIGNALS: ClassVar[frozenset[str]] = DONE | TOUCHES
    high: int = 98
    low: int = 95
    stay_ms: int = 10
    _residents: Residents = field(default_factory=Residents, init=False)
    _marks: Watermarks = field(init=False)

    def __post_init__(self) -> None:
        self._marks = Watermarks(self.high, self.low)

    def plan(self, signal: Signal, seen: Seen) -> Iterable[Move]:
        """Return the promotion of a touched XIP page, and demotions if RAM runs short."""
        self._residents.hear(signal, seen)
        if signal.source in TOUCHES and signal.kind is PteKind.XIP:
            yield promote(signal.page, "first touch")
        for page in self.victims(self._marks.excess(seen), seen):
            yield demote(page, f"RAM above {self.high} %, not touched since the hand passed")

    def victims(self, count: int, _seen: Seen) -> list[Page]:
        """Return what the hand finds."""
        return self._residents.second_chance(count)
