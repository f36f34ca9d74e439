"""Counts of moves by cause, file and process; memory is bounded whatever there is of each.

A *cause* is the policy, its reason and the new kind; what nobody's policy asked for is ``manual``.
The process of a policy's move is the one whose touch earned it, that of a refault the one that
faulted. Moves by hand have none, nor do those planned at a signal of no process: they count for
process 0, so that each table sums up to the totals. A refault counts for the cause of the page's
last move, ping-pong for the cause of the move back.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from xipfs.fs.types import PageKind
from xipfs.units import PAGE_SIZE

#: Lines of each table that are kept apart; older ones are summed up in one.
LINES_MAX: Final = 1024

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class MoveCounts:
    """Pages; ``failed`` were refused for good."""

    promoted: int = 0
    demoted: int = 0
    failed: int = 0
    refaults: int = 0
    pingpong: int = 0

    def describe(self) -> dict[str, int]:
        """Return the counts and the bytes that moved."""
        return {
            "promoted": self.promoted,
            "demoted": self.demoted,
            "moved_bytes": self.moved() * PAGE_SIZE,
            "failed": self.failed,
            "refaults": self.refaults,
            "pingpong": self.pingpong,
        }

    def add(self, to: PageKind, pages: int) -> None:
        """Count pages that moved."""
        if to is PageKind.PAGECACHE:
            self.promoted += pages
        else:
            self.demoted += pages

    def moved(self) -> int:
        """Return the pages that moved, either way."""
        return self.promoted + self.demoted

    def merge(self, other: MoveCounts) -> None:
        """Add another's counts to these."""
        self.promoted += other.promoted
        self.demoted += other.demoted
        self.failed += other.failed
        self.refaults += other.refaults
        self.pingpong += other.pingpong


class Table(Generic[Key]):
    """One line a key; the lines unchanged for longest are summed up in ``older``."""

    def __init__(self, lines_max: int = LINES_MAX) -> None:
        self._lines_max = lines_max
        self._lines: OrderedDict[Key, MoveCounts] = OrderedDict()
        self.older = MoveCounts()
        self._nr_older = 0

    def line(self, key: Key) -> MoveCounts:
        """Return the line of ``key``, to be changed."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = MoveCounts()
            if len(self._lines) > self._lines_max:
                self.older.merge(self._lines.popitem(last=False)[1])
                self._nr_older += 1
        else:
            self._lines.move_to_end(key)
        return line

    def total(self) -> MoveCounts:
        """Return the sum of all lines."""
        total = dataclasses.replace(self.older)
        for counts in self._lines.values():
            total.merge(counts)
        return total

    def describe(self, names: tuple[str, ...], shown: int = LINES_MAX) -> list[dict[str, Any]]:
        """Return the lines as JSON-ready objects, the most moved first; ``names``: a key's parts.

        The sum of those above ``shown``, and of the older ones, comes last, its key's parts null.
        """
        rows: list[dict[str, Any]] = []
        lines = sorted(self._lines.items(), key=lambda line: -line[1].moved())
        for key, counts in lines[:shown]:
            parts = key if isinstance(key, tuple) else (key,)
            rows.append(dict(zip(names, parts, strict=True)) | counts.describe())
        others = dataclasses.replace(self.older)
        for _, counts in lines[shown:]:
            others.merge(counts)
        if others != MoveCounts():
            rows.append(dict.fromkeys(names) | others.describe())
        return rows

    def left_off(self, shown: int) -> int:
        """Return of how many lines ``describe`` gives the sum only; one that came back is two."""
        return self._nr_older + max(len(self._lines) - shown, 0)
