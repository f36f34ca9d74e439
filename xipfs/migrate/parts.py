"""Parts that policies are made of: bounded memory, the pages in RAM, watermarks, a rate limit.

None reads a clock: time is what the signals say.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import Final

from xipfs.errors import UsageError
from xipfs.migrate.policy import EVICTED, MOVED, TOUCHES, Page, PteKind, Seen, Signal

NS_PER_MS: Final = 1_000_000
_NS_PER_S: Final = 1_000_000_000
#: Pages that a policy remembers unless it says otherwise, some 14 MB.
REMEMBERED_PAGES: Final = 1 << 16
#: Pages demoted at one signal: they move together, and no signal costs more than so many steps.
BATCH_PAGES: Final = 64


class Remembered:
    """One whole number a page, for a bounded number of pages: the one set longest ago goes."""

    def __init__(self, pages_max: int = REMEMBERED_PAGES) -> None:
        assert pages_max > 0, pages_max
        self._pages_max = pages_max
        self._values: OrderedDict[Page, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, page: Page) -> int | None:
        """Return the page's number, None if it has none or was forgotten."""
        return self._values.get(page)

    def put(self, page: Page, value: int) -> None:
        """Set the page's number; it is now the page that was set last."""
        self._values[page] = value
        self._values.move_to_end(page)
        if len(self._values) > self._pages_max:
            self._values.popitem(last=False)

    def forget(self, page: Page) -> None:
        """Drop the page's number."""
        self._values.pop(page, None)

    def count(self, page: Page) -> int:
        """Add one to the page's number, from 0; return the sum."""
        value = (self.get(page) or 0) + 1
        self.put(page, value)
        return value


class Residents:
    """The pages in RAM as the signals tell of them, with a mark on those touched since.

    Pages of files that shrink leave RAM without a signal; so there are never more than RAM has
    frames, and the one at the front goes.
    """

    def __init__(self) -> None:
        self._touched: OrderedDict[Page, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._touched)

    def hear(self, signal: Signal, seen: Seen, *, to_end: bool = False) -> None:
        """Take in one signal; ``to_end``: a touched page counts as having just come."""
        page = signal.page
        if signal.source == EVICTED or (signal.source == MOVED and signal.kind is PteKind.XIP):
            self._touched.pop(page, None)
        elif signal.source == MOVED:
            self._touched[page] = False
        elif signal.source in TOUCHES and signal.kind is PteKind.PAGECACHE:
            self._touched[page] = True
            if to_end:
                self._touched.move_to_end(page)
        while len(self._touched) > seen.ram_pages:
            self._touched.popitem(last=False)

    def longest_untouched(self, count: int) -> list[Page]:
        """Return up to ``count`` pages from the front; each is then at the end.

        So a page whose demotion is held back or refused is not asked for again at once.
        """
        chosen = list(islice(self._touched, count))
        for page in chosen:
            self._touched.move_to_end(page)
        return chosen

    def second_chance(self, count: int) -> list[Page]:
        """Return up to ``count`` pages as a clock's hand finds them.

        A page that was touched loses its mark and is passed by; the hand stops after one round.
        """
        chosen: list[Page] = []
        for _ in range(len(self._touched)):
            if len(chosen) == count:
                break
            page, touched = next(iter(self._touched.items()))
            self._touched[page] = False
            self._touched.move_to_end(page)
            if not touched:
                chosen.append(page)
        return chosen


@dataclass
class Watermarks:
    """Hysteresis: nothing until RAM is ``high`` percent full, then down to ``low`` percent."""

    high: int
    low: int

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= 100:
            raise UsageError(
                f"high={self.high} and low={self.low}", expected="percent, low below high"
            )

    def excess(self, seen: Seen) -> int:
        """Return how many frames are to be given back now, at most ``BATCH_PAGES``.

        >>> marks = Watermarks(high=90, low=80)
        >>> [marks.excess(Seen(used, 100)) for used in (85, 89, 90, 95)]
        [0, 0, 10, 15]
        """
        if seen.ram_pages_used * 100 < self.high * seen.ram_pages:
            return 0
        return min(seen.ram_pages_used - self.low * seen.ram_pages // 100, BATCH_PAGES)


class RateLimit:
    """At most so many in each second of the stream; 0: no limit."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._second = -1
        self._taken = 0

    def take(self, time_ns: int) -> bool:
        """Return whether one more fits into the second of ``time_ns``, and take it."""
        if self._per_s == 0:
            return True
        second = time_ns // _NS_PER_S
        # A signal may be a little older than the one before; that opens no second anew.
        if second > self._second:
            self._second, self._taken = second, 0
        if self._taken == self._per_s:
            return False
        self._taken += 1
        return True
