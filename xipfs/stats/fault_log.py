"""The latest faults with their charges, for readers that come back with a cursor.

Nothing is kept until a reader asks, and nothing once readers stay away. Memory is bounded: what a
slow reader missed is gone, and the answer says how many faults that were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

from xipfs.accounting.charges import Charge, ChargeBatch
from xipfs.accounting.effects import Effect
from xipfs.stats.trace_file import FAULT_COLUMNS
from xipfs.trace.events import Fault
from xipfs.trace.fault_batch import FaultBatch

#: Some 60 MB of faults; at 20,000 a second a reader may stay away for 6 s.
KEPT_FAULTS: Final = 1 << 17
#: Faults in one answer, some 3 MB of text.
ANSWER_FAULTS: Final = 1 << 14
#: A reader that has not come for so long is taken to be gone.
IDLE_S: Final = 60.0
_NO_EFFECT: Final = ("",) * len(Effect._fields)


class FaultLog:
    """Numbers faults from 1; ``since`` answers those from a number on."""

    def __init__(self, comm: Callable[[int], str], kept: int = KEPT_FAULTS) -> None:
        self._comm = comm
        self._kept: deque[tuple[Fault, Charge, str]] = deque(maxlen=kept)
        self.next_number = 1
        self._asked_s: float | None = None

    def add(self, fault: Fault, charge: Charge) -> None:
        """Number one fault; keep it while somebody reads."""
        self.next_number += 1
        if self._asked_s is not None:
            # Now: who asks later may find the process gone, and its name with it.
            self._kept.append((fault, charge, self._comm(fault.pid)))

    def add_many(self, batch: FaultBatch, charges: ChargeBatch) -> None:
        """Number the faults of a batch; while somebody reads there are none."""
        assert self._asked_s is None, "batches do not tell what a reader wants to know"
        assert len(batch) == len(charges), (len(batch), len(charges))
        self.next_number += len(batch)

    @property
    def active(self) -> bool:
        """Whether somebody reads."""
        return self._asked_s is not None

    def rest(self, now_s: float) -> None:
        """Stop keeping when no reader has come for long."""
        if self._asked_s is not None and now_s - self._asked_s > IDLE_S:
            self._asked_s = None
            self._kept.clear()

    def since(self, cursor: int, now_s: float) -> dict[str, Any]:
        """Return the faults from number ``cursor`` on, as tab-separated lines.

        ``next`` is the cursor to come back with, ``end`` that of the next fault to happen, and
        ``missed`` counts faults that are not kept any more. A cursor beyond the end gets nothing
        but its place: that is how a reader starts.
        """
        self._asked_s = now_s
        if cursor > self.next_number:
            return {
                "columns": FAULT_COLUMNS,
                "faults": "",
                "next": self.next_number,
                "end": self.next_number,
                "missed": 0,
            }
        oldest = self.next_number - len(self._kept)
        start = max(cursor, oldest)
        chosen = list(islice(self._kept, start - oldest, start - oldest + ANSWER_FAULTS))
        return {
            "columns": FAULT_COLUMNS,
            "faults": "\n".join("\t".join(map(str, self._row(*kept))) for kept in chosen),
            "next": start + len(chosen),
            "end": self.next_number,
            "missed": start - cursor,
        }

    def _row(self, fault: Fault, charge: Charge, name: str) -> tuple[int | str, ...]:
        access = "exec" if fault.execute else "write" if fault.write else "read"
        # A program can put any byte into its name.
        comm = " ".join(name.split())
        return (
            fault.time_ns,
            fault.mm,
            fault.pid,
            fault.tid,
            comm,
            fault.address,
            fault.ino,
            fault.index,
            access,
            "user" if fault.user else "kernel",
            int(fault.protection),
            fault.verdict,
            fault.origin,
            "hint" if charge.hint else charge.kind.value,
            int(charge.major),
            charge.extra,
            charge.cause,
            *(_NO_EFFECT if charge.effect is None else charge.effect),
        )
