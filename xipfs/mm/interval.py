"""An index of intervals of page numbers: who overlaps this page, or this range?

It stands for the kernel's i_mmap interval tree (rule R1). A live mount asks it at every migration
and truncation, so a query must not walk all mappings, nor may one huge mapping cost many entries.
An interval is filed at the level whose buckets (8 times as wide from level to level) are at least
as long as itself, hence in at most two buckets; a query looks at its buckets on every level used.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

_LEVEL_SHIFT: Final = 3
T = TypeVar("T")


class IntervalBuckets(Generic[T]):
    """A multimap from half-open intervals of non-negative integers to objects.

    >>> index = IntervalBuckets()
    >>> index.add(0, 100, "text")
    >>> index.add(50, 51, "page")
    >>> sorted(index.overlapping(50, 60)), index.overlapping(100, 200)
    (['page', 'text'], [])
    """

    def __init__(self) -> None:
        self._intervals: dict[T, tuple[int, int, int]] = {}
        self._serial = 0
        self._levels: dict[int, dict[int, dict[T, None]]] = {}

    def __len__(self) -> int:
        return len(self._intervals)

    def _buckets(self, first: int, end: int) -> tuple[int, range]:
        level = max(0, (end - first - 1).bit_length() + _LEVEL_SHIFT - 1) // _LEVEL_SHIFT
        shift = level * _LEVEL_SHIFT
        return level, range(first >> shift, (end - 1 >> shift) + 1)

    def add(self, first: int, end: int, item: T) -> None:
        """File ``item`` under [first, end); it must not be filed yet."""
        assert first < end, (first, end)
        assert item not in self._intervals, item
        self._serial += 1
        self._intervals[item] = (first, end, self._serial)
        level, keys = self._buckets(first, end)
        buckets = self._levels.setdefault(level, {})
        for key in keys:
            buckets.setdefault(key, {})[item] = None

    def remove(self, item: T) -> None:
        """Forget ``item``."""
        first, end, _ = self._intervals.pop(item)
        level, keys = self._buckets(first, end)
        buckets = self._levels[level]
        for key in keys:
            del buckets[key][item]
            if not buckets[key]:
                del buckets[key]
        if not buckets:
            del self._levels[level]

    def overlapping(self, first: int, end: int) -> list[T]:
        """Return the items whose interval meets [first, end), in the order they were added."""
        found: dict[T, None] = {}
        for level, buckets in self._levels.items():
            shift = level * _LEVEL_SHIFT
            low, high = first >> shift, end - 1 >> shift
            keys = range(low, high + 1) if high - low < len(buckets) else list(buckets)
            for key in keys:
                for item in buckets.get(key, ()):
                    begin, finish, _ = self._intervals[item]
                    if begin < end and first < finish:
                        found[item] = None
        return sorted(found, key=lambda item: self._intervals[item][2])
