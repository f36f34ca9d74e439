"""A figure over the whole life of a mount in bounded memory: the longer it is, the coarser.

A point is the largest value seen in its interval. When all points are taken, two become one and the
interval doubles.
"""

from __future__ import annotations

from typing import Any, Final

POINTS_MAX: Final = 240
FIRST_INTERVAL_NS: Final = 1_000_000_000


class Series:
    """The largest value of each interval since ``start_ns``."""

    def __init__(self, start_ns: int) -> None:
        self._start_ns = start_ns
        self._interval_ns = FIRST_INTERVAL_NS
        self._points: list[int] = []
        self._last = 0

    def add(self, time_ns: int, value: int) -> None:
        """Enter the value from ``time_ns`` on; times go up."""
        place = max(time_ns - self._start_ns, 0) // self._interval_ns
        while place >= POINTS_MAX:
            self._halve()
            place //= 2
        # Until now it stayed as it was entered last.
        while len(self._points) <= place:
            self._points.append(self._last)
        if place == len(self._points) - 1:
            self._points[place] = max(self._points[place], value)
            self._last = value

    def _halve(self) -> None:
        points = self._points
        self._points = [max(points[at : at + 2]) for at in range(0, len(points), 2)]
        self._interval_ns *= 2

    def describe(self) -> dict[str, Any]:
        """Return when it begins, how long an interval is, and the largest value of each."""
        return {
            "start_ns": self._start_ns,
            "interval_ns": self._interval_ns,
            "max": list(self._points),
        }
