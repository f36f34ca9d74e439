"""The latest faults with their charges, for readers that come back with a cursor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from xipfs.accounting.charges import Charge, ChargeBatch
from xipfs.accounting.effects import Effect
from xipfs.stats.kept_log import KeptLog
from xipfs.stats.trace_columns import FAULT_COLUMNS, printable
from xipfs.trace.events import Fault
from xipfs.trace.fault_batch import FaultBatch

#: Some 75 MB of faults; at 20,000 a second a reader may stay away for 6 s.
KEPT_FAULTS: Final = 1 << 17
#: Faults in one answer, some 3 MB of text.
ANSWER_FAULTS: Final = 1 << 14
_NO_EFFECT: Final = ("",) * len(Effect._fields)


class FaultLog(KeptLog[tuple[Fault, Charge, str, str]]):
    """Numbers faults from 1; ``since`` answers those from a number on."""

    def __init__(
        self, comm: Callable[[int], str], path: Callable[[int], str], kept: int = KEPT_FAULTS
    ) -> None:
        super().__init__(kept)
        self._comm = comm
        self._path = path

    def add(self, fault: Fault, charge: Charge) -> None:
        """Number one fault; keep it while somebody reads."""
        self.next_number += 1
        if self.active:
            # Now: who asks later may find the process gone, and its name with it, or the file's.
            self._kept.append((fault, charge, self._comm(fault.pid), self._path(fault.ino)))

    def add_many(self, batch: FaultBatch, charges: ChargeBatch) -> None:
        """Number the faults of a batch; while somebody reads there are none."""
        assert not self.active, "batches do not tell what a reader wants to know"
        assert len(batch) == len(charges), (len(batch), len(charges))
        self.next_number += len(batch)

    def since(self, cursor: int, now_s: float) -> dict[str, Any]:
        """Return the faults from number ``cursor`` on, as tab-separated lines."""
        self.wake(now_s)
        chosen, place = self._from(cursor, ANSWER_FAULTS)
        return {
            "columns": FAULT_COLUMNS,
            "faults": "\n".join("\t".join(map(str, self._row(*kept))) for kept in chosen),
            **place,
        }

    def _row(self, fault: Fault, charge: Charge, comm: str, path: str) -> tuple[int | str, ...]:
        access = "exec" if fault.execute else "write" if fault.write else "read"
        return (
            fault.time_ns,
            fault.mm,
            fault.pid,
            fault.tid,
            told_comm(comm),
            fault.address,
            fault.ino,
            path,
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


def told_comm(name: str) -> str:
    """Return a process's name as text of one line: a program can put any byte into it."""
    return printable(" ".join(name.split()).encode("utf-8", "surrogateescape"))
