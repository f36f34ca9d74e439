"""Trace files and the log that feeds them: what goes in comes out, and what is broken says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from xipfs.accounting.charges import Charge, PteKind
from xipfs.errors import UsageError
from xipfs.stats.fault_log import FaultLog
from xipfs.stats.trace_file import TraceError, TraceReader, TraceWriter, parse_rows
from xipfs.trace.events import MINOR, TRAP, Fault

ROW = [5, 1, 20, 21, "a prog", 0xFFFF_FFFF_FFFF_F008, 3, 7, "write", "user", 0, MINOR, TRAP]
ROW += ["xip", 0, 1]


def pair(time_ns: int) -> tuple[Fault, Charge]:
    address = 0xFFFF_FFFF_FFFF_F008
    fault = Fault(time_ns, 1, 20, 21, address, 3, 7, True, False, True, False, MINOR, TRAP)
    return fault, Charge(time_ns, 20, 3, 7, PteKind.XIP, True, False, 1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    writer = TraceWriter(path)
    writer.append([ROW])
    writer.append([[6, *ROW[1:]]])
    writer.close({"losses": {"faults": 2}})
    assert path.stat().st_mode & 0o777 == 0o600
    with TraceReader(path) as trace:
        assert trace.faults == 2
        assert trace.metadata == {"schema": 1, "record": "fault", "losses": {"faults": 2}}
        (batch,) = trace.batches()
    assert batch["time_ns"] == [5, 6]
    assert batch["address"] == [0xFFFF_FFFF_FFFF_F008] * 2
    assert batch["comm"] == ["a prog"] * 2
    assert [column[0] for column in batch.values()] == ROW


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        TraceWriter(path)
    assert path.read_text() == "mine"


def test_cut_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    writer = TraceWriter(path)
    writer.append([ROW])
    writer.close({})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceError, match="cut off"):
        TraceReader(path)
    path.write_text("something else")
    with pytest.raises(TraceError, match="not a trace file"):
        TraceReader(path)
    with pytest.raises(TraceError, match="cannot be read"):
        TraceReader(tmp_path / "none")


def test_the_log_answers_by_cursor_and_counts_what_was_missed() -> None:
    log = FaultLog(lambda _pid: "a\tprog", kept=2)
    log.add(*pair(1))  # nobody reads yet
    start = log.since(10**15 - 1, now_s=0.0)
    assert (start["faults"], start["next"], start["missed"]) == ("", 2, 0)
    for time_ns in (5, 6, 7):
        log.add(*pair(time_ns))
    answer = log.since(2, now_s=1.0)
    assert parse_rows(answer["faults"]) == [[6, *ROW[1:]], [7, *ROW[1:]]]
    assert (answer["next"], answer["end"], answer["missed"]) == (5, 5, 1)
    log.rest(now_s=62.0)
    log.add(*pair(8))
    assert log.since(5, now_s=63.0)["missed"] == 1
