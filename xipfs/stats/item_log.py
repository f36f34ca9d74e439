"""The latest items of the stream beside the faults, for recordings that come with a cursor.

Each item knows the number of the fault that follows it, so that a reader can
put the two logs together again.
"""

from __future__ import annotations

from typing import Any, Final

from xipfs.stats.kept_log import KeptLog
from xipfs.stats.trace_items import ITEM_COLUMNS, Row

#: Some 100 MB of items; a fault comes with three or four.
KEPT_ITEMS: Final = 1 << 18
#: Items in one answer, some 4 MB of text.
ANSWER_ITEMS: Final = 1 << 15


class ItemLog(KeptLog[tuple[int, Row]]):
    """Numbers items from 1; ``since`` answers those from a number on."""

    def __init__(self, kept: int = KEPT_ITEMS) -> None:
        super().__init__(kept)

    def add(self, next_fault: int, row: Row) -> None:
        """Number one item that comes before fault ``next_fault``."""
        self._kept.append((next_fault, row))
        self.next_number += 1

    def since(self, cursor: int, now_s: float) -> dict[str, Any]:
        """Return the items from number ``cursor`` on, as tab-separated lines.

        ``next_faults`` has one number for each line.
        """
        self.wake(now_s)
        chosen, place = self._from(cursor, ANSWER_ITEMS)
        return _answer(chosen, place)

    def first(self, state: list[Row], next_fault: int) -> dict[str, Any]:
        """Return ``state`` as a reader's first items; its next are those that come from now on."""
        _, place = self._from(self.next_number, 0)
        return _answer([(next_fault, row) for row in state], place)

    def rest(self, now_s: float) -> None:
        """Stop keeping when no reader has come for long."""
        kept_before = self.active
        super().rest(now_s)
        if kept_before and not self.active:
            # Nobody counts what comes from here on: who comes back after all has missed something.
            self.next_number += 1


def _answer(chosen: list[tuple[int, Row]], place: dict[str, int]) -> dict[str, Any]:
    return {
        "columns": list(ITEM_COLUMNS),
        "items": "\n".join(_line(row) for _, row in chosen),
        "next_faults": [next_fault for next_fault, _ in chosen],
        **place,
    }


def _line(row: Row) -> str:
    # The JSON of ``detail`` has neither tabs nor line ends in it: json.dumps escapes them.
    return "\t".join(str(row.get(column, "")) for column in ITEM_COLUMNS)
