"""The latest items of the stream beside the faults, for recordings that come with a cursor.

As in the fault log nothing is kept until a reader asks, memory is bounded, and what a slow reader
missed is counted. Each item knows the number of the fault that follows it, so that a reader can
put the two logs together again.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, Final

from xipfs.stats.fault_log import IDLE_S
from xipfs.stats.trace_items import ITEM_COLUMNS, Row

#: Some 100 MB of items; a fault comes with three or four.
KEPT_ITEMS: Final = 1 << 18
#: Items in one answer, some 4 MB of text.
ANSWER_ITEMS: Final = 1 << 15


class ItemLog:
    """Numbers items from 1; ``since`` answers those from a number on."""

    def __init__(self, kept: int = KEPT_ITEMS) -> None:
        self._kept: deque[tuple[int, Row]] = deque(maxlen=kept)
        self._asked_s: float | None = None
        self.next_number = 1

    @property
    def active(self) -> bool:
        """Whether anybody reads; otherwise nothing needs to be added."""
        return self._asked_s is not None

    def wake(self, now_s: float) -> None:
        """Begin to keep items: somebody will read."""
        self._asked_s = now_s

    def add(self, next_fault: int, row: Row) -> None:
        """Number one item that comes before fault ``next_fault``."""
        self._kept.append((next_fault, row))
        self.next_number += 1

    def rest(self, now_s: float) -> None:
        """Stop keeping when no reader has come for long."""
        if self._asked_s is not None and now_s - self._asked_s > IDLE_S:
            self._asked_s = None
            self._kept.clear()

    def since(self, cursor: int, now_s: float) -> dict[str, Any]:
        """Return the items from number ``cursor`` on, as tab-separated lines.

        ``next``, ``end`` and ``missed`` are as those of the fault log; ``next_faults`` has one
        number for each line.
        """
        self._asked_s = now_s
        oldest = self.next_number - len(self._kept)
        start = min(max(cursor, oldest), self.next_number)
        chosen = list(islice(self._kept, start - oldest, start - oldest + ANSWER_ITEMS))
        return {
            "columns": list(ITEM_COLUMNS),
            "items": "\n".join(_line(row) for _, row in chosen),
            "next_faults": [next_fault for next_fault, _ in chosen],
            "next": start + len(chosen),
            "end": self.next_number,
            "missed": max(start - cursor, 0),
        }


def _line(row: Row) -> str:
    # The JSON of ``detail`` has neither tabs nor line ends in it: json.dumps escapes them.
    return "\t".join(str(row.get(column, "")) for column in ITEM_COLUMNS)
