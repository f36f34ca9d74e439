"""The kernel's own VMAs of one address space, as the stores into its maple tree tell them.

The kernel merges neighbours that are alike and splits them again; what a fork copies goes by whole
VMAs, so it matters where they end. A store replaces what lay in its range; of a VMA that it cuts,
the rest stays. Each extent has a mark, the consumer's to use: True, False, or None: not known.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Mark = bool | None


def joined(marks: Iterable[Mark]) -> Mark:
    """Return True if any mark is, else None if any is not known, else False."""
    sure = False
    for mark in marks:
        if mark:
            return True
        sure |= mark is None
    return None if sure else False


class Extents:
    """Disjoint ranges ``[start, end)`` with a mark each, by their starts."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._marks: list[Mark] = []

    def copy(self) -> Extents:
        """Return an independent copy."""
        other = Extents()
        other._starts = self._starts.copy()
        other._ends = self._ends.copy()
        other._marks = self._marks.copy()
        return other

    def store(self, start: int, end: int, mark: Mark = False) -> None:
        """Make ``[start, end)`` one extent; its mark joins ``mark`` and those it replaces."""
        assert start < end, (start, end)
        mark = joined([mark, *(old for _, _, old in self.meeting(start, end))])
        self.cut(start, end)
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        self._marks.insert(at, mark)

    def cut(self, start: int, end: int) -> None:
        """Free ``[start, end)``; what an extent has outside keeps its mark."""
        rest = []
        first, stop = self._meeting(start, end)
        for at in range(first, stop):
            if self._starts[at] < start:
                rest.append((self._starts[at], start, self._marks[at]))
            if self._ends[at] > end:
                rest.append((end, self._ends[at], self._marks[at]))
        self._starts[first:stop] = [low for low, _, _ in rest]
        self._ends[first:stop] = [high for _, high, _ in rest]
        self._marks[first:stop] = [mark for _, _, mark in rest]

    def mark(self, address: int) -> None:
        """Mark the extent that holds ``address`` with True, if there is one."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ends[at]:
            self._marks[at] = True

    def meeting(self, start: int, end: int) -> list[tuple[int, int, Mark]]:
        """Return (start, end, mark) of the extents that share an address with [start, end)."""
        first, stop = self._meeting(start, end)
        return list(
            zip(self._starts[first:stop], self._ends[first:stop], self._marks[first:stop],
                strict=True)
        )  # fmt: skip

    def cover(self, start: int, end: int) -> Iterator[tuple[int, int, Mark]]:
        """Yield ``[start, end)`` in pieces with their marks; None where there is no extent."""
        for low, high, mark in self.meeting(start, end):
            if start < low:
                yield start, low, None
            yield max(start, low), min(end, high), mark
            start = high
        if start < end:
            yield start, end, None

    def _meeting(self, start: int, end: int) -> tuple[int, int]:
        first = max(bisect_right(self._starts, start) - 1, 0)
        if first < len(self._starts) and self._ends[first] <= start:
            first += 1
        return first, max(first, bisect_left(self._starts, end))
