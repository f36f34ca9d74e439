"""Injected time: the program asks a Clock, tests own one. Nothing else reads the system's time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where timestamps and durations come from."""

    def realtime_ns(self) -> int:
        """Nanoseconds since the epoch: what inode times are made of."""
        ...

    def monotonic_ns(self) -> int:
        """Nanoseconds of CLOCK_MONOTONIC: the clock that trace events are stamped with."""
        ...


class SystemClock:
    """The host's clocks."""

    def realtime_ns(self) -> int:
        """Return CLOCK_REALTIME in nanoseconds."""
        return time.time_ns()

    def monotonic_ns(self) -> int:
        """Return CLOCK_MONOTONIC in nanoseconds."""
        return time.monotonic_ns()


class ManualClock:
    """A clock that moves only when told; both times share one hand."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self.now_ns = start_ns

    def advance(self, delta_ns: int) -> None:
        """Move the clock forward; it never runs backwards."""
        assert delta_ns >= 0, delta_ns
        self.now_ns += delta_ns

    def realtime_ns(self) -> int:
        """Return the hand's position in nanoseconds."""
        return self.now_ns

    def monotonic_ns(self) -> int:
        """Return the hand's position in nanoseconds."""
        return self.now_ns
