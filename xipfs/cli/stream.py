"""What a live mount tells of its faults and of everything else that happens, in order.

The daemon has two logs that answer by cursor; here they are put together. Nothing is lost without
being counted: the daemon keeps a bounded number of entries, and says how many went unread.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

from xipfs.cli.client import Json, ask
from xipfs.fuse.mounts import Mount
from xipfs.stats.trace_columns import parse_rows

POLL_S: Final = 0.2
#: Beyond any number: the daemon begins to keep what comes, and answers with the next number.
_START: Final = 10**15 - 1

Rows = list[list[Any]]
"""Each in the order of ``trace_columns.COLUMNS``."""


class Stream:
    """The daemon's two logs, put together in the order in which things happened.

    It begins with the state of now; faults told before that are not of this stream.
    """

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._next_fault = self._next_item = _START
        #: Items told before the faults that come before them, each with the next fault's number.
        self._held: deque[tuple[int, list[Any]]] = deque()
        self.faults = self.faults_missed = self.items_missed = self.events_lost = 0
        self._lost_before = int(ask(mount, f"faults.{_START}.json")["events_lost"])
        self._ask_items()
        self._next_fault = self._held[0][0]

    def losses(self) -> Json:
        """Return how many faults came, and what is missing between them."""
        return {
            "faults": self.faults,
            "faults_missed": self.faults_missed,
            "items_missed": self.items_missed,
            "events_lost": self.events_lost,
        }

    def poll(self) -> Iterator[Rows]:
        """Yield what has happened since the last time, in pieces."""
        while True:
            answer = ask(self._mount, f"faults.{self._next_fault}.json")
            # Items up to those faults are in the other log by now.
            while not self._ask_items():
                pass
            self.faults_missed += answer["missed"]
            # An observer that failed has no figures any more.
            lost = answer["events_lost"] - self._lost_before
            self.events_lost = max(self.events_lost, lost)
            faults = parse_rows(answer["faults"], answer["columns"])
            rows = []
            for number, row in enumerate(faults, answer["next"] - len(faults)):
                rows += [*self._items_before(number), row]
            rows += self._items_before(answer["next"])
            self.faults += len(faults)
            self._next_fault = answer["next"]
            if rows:
                yield rows
            if answer["next"] >= answer["end"]:
                return

    def _ask_items(self) -> bool:
        """Take the next items; return whether these were all."""
        answer = ask(self._mount, f"items.{self._next_item}.json")
        rows = parse_rows(answer["items"], answer["columns"])
        self._held.extend(zip(answer["next_faults"], rows, strict=True))
        if self._next_item != _START:
            self.items_missed += answer["missed"]
        self._next_item = answer["next"]
        return bool(answer["next"] >= answer["end"])

    def _items_before(self, fault: int) -> Rows:
        rows = []
        while self._held and self._held[0][0] <= fault:
            rows.append(self._held.popleft()[1])
        return rows


@contextlib.contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """Within, Ctrl-C and SIGTERM set the event; at the second time they interrupt.

    A flag, for an exception could come in the middle of an answer.
    """
    asked = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
