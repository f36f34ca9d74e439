"""A log for readers that come back with a cursor: what the fault log and the item log share.

Nothing is kept until a reader asks, and nothing once readers stay away. Memory is bounded: what a
slow reader missed is gone, and the answer says how much that was.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final, Generic, TypeVar

Entry = TypeVar("Entry")

#: A reader that has not come for so long is taken to be gone.
IDLE_S: Final = 60.0


class KeptLog(Generic[Entry]):
    """Numbers entries from 1; the latest are kept while somebody reads."""

    def __init__(self, kept: int) -> None:
        self._kept: deque[Entry] = deque(maxlen=kept)
        self._asked_s: float | None = None
        self.next_number = 1

    @property
    def active(self) -> bool:
        """Whether somebody reads; otherwise nothing needs to be kept."""
        return self._asked_s is not None

    def wake(self, now_s: float) -> None:
        """Begin to keep entries: somebody reads."""
        self._asked_s = now_s

    def rest(self, now_s: float) -> None:
        """Stop keeping when no reader has come for long."""
        if self._asked_s is not None and now_s - self._asked_s > IDLE_S:
            self._asked_s = None
            self._kept.clear()

    def _from(self, cursor: int, most: int) -> tuple[list[Entry], dict[str, int]]:
        """Return up to ``most`` entries from number ``cursor`` on, and what to tell of them.

        ``next`` is the cursor to come back with, ``end`` that of the next entry to come, and
        ``missed`` counts entries that are not kept any more. A cursor beyond the end gets nothing
        but its place: that is how a reader starts.
        """
        oldest = self.next_number - len(self._kept)
        start = min(max(cursor, oldest), self.next_number)
        chosen = list(islice(self._kept, start - oldest, start - oldest + most))
        return chosen, {
            "next": start + len(chosen),
            "end": self.next_number,
            "missed": max(start - cursor, 0),
        }
