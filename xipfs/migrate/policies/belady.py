"""``policy=belady``: keeps in RAM what is used next; replays only, since it knows the future.

Signals used: faults, hint faults, READ and WRITE requests, moves, evictions, and every touch that
the trace still holds. A touched page that is used again moves to RAM if there is a free frame, or
in place of the page whose next use is the latest, if that is later than its own (Belady's rule with
bypass). No order of moves made after the touch that asks for them finds more touches in RAM.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from xipfs.migrate.policy import DONE, EVICTED, MOVED, TOUCHES, Move, Page, PteKind, Seen, Signal
from xipfs.migrate.policy import demote as demotion_of
from xipfs.migrate.policy import promote as promotion_of

_NEVER: Final = 1 << 63


@dataclass
class Belady:
    """Knows when each page is touched; remembers which pages are in RAM, or about to be."""

    SIGNALS: ClassVar[frozenset[str]] = DONE | TOUCHES
    _touches_ns: dict[Page, list[int]] = field(default_factory=dict, init=False)
    _resident: set[Page] = field(default_factory=set, init=False)
    #: (next use negated, page): the latest first; entries of the past are mended when met.
    _latest: list[tuple[int, Page]] = field(default_factory=list, init=False)
    _now_ns: int = field(default=-1, init=False)

    def foresee(self, touches: Iterable[tuple[int, Page]]) -> None:
        """Learn all touches of the stream as (time in ns, page), in any order."""
        for time_ns, page in touches:
            self._touches_ns.setdefault(page, []).append(time_ns)
        for times in self._touches_ns.values():
            times.sort()

    def plan(self, signal: Signal, seen: Seen) -> Iterable[Move]:
        """Return the touched page's promotion, and the demotion that makes room for it."""
        page, self._now_ns = signal.page, signal.time_ns
        if signal.source == EVICTED or (signal.source == MOVED and signal.kind is PteKind.XIP):
            self._resident.discard(page)
        elif signal.kind is PteKind.PAGECACHE and signal.source in TOUCHES | {MOVED}:
            self._keep(page)
        elif signal.source in TOUCHES and signal.kind is PteKind.XIP:
            yield from self._consider(page, seen)

    def _consider(self, page: Page, seen: Seen) -> Iterable[Move]:
        again_ns = self._next_ns(page)
        if again_ns == _NEVER:
            return
        if seen.ram_pages_used >= seen.ram_pages:
            victim = self._pop_latest()
            if victim is None:
                return
            if self._next_ns(victim) <= again_ns:
                self._keep(victim)
                return
            yield demotion_of(victim, "used latest")
        yield promotion_of(page, "used again")

    def _keep(self, page: Page) -> None:
        self._resident.add(page)
        heapq.heappush(self._latest, (-self._next_ns(page), page))

    def _next_ns(self, page: Page) -> int:
        times = self._touches_ns.get(page, ())
        place = bisect_right(times, self._now_ns)
        return times[place] if place < len(times) else _NEVER

    def _pop_latest(self) -> Page | None:
        """Take the page with the latest next use out of what is remembered."""
        while self._latest:
            use, page = heapq.heappop(self._latest)
            if page not in self._resident:
                continue
            use_ns = self._next_ns(page)
            if use_ns != -use:
                heapq.heappush(self._latest, (-use_ns, page))
                continue
            self._resident.remove(page)
            return page
        return None
