"""Trace files and the log that feeds them: what goes in comes out, and what is broken says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import new_image

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.charges import Charge, PteKind
from xipfs.accounting.effects import Effect
from xipfs.clock import SystemClock
from xipfs.errors import UsageError
from xipfs.fs.types import PageRun
from xipfs.fuse.recording import RecordedFilesystem, Recorder
from xipfs.mm.rules import Rules
from xipfs.stats.fault_log import FaultLog
from xipfs.stats.item_log import ItemLog
from xipfs.stats.trace_columns import COLUMNS, parse_rows
from xipfs.stats.trace_file import TraceReader
from xipfs.stats.trace_items import MEANINGS, event_of, event_row, row, values_of
from xipfs.stats.trace_writer import TraceWriter
from xipfs.trace import events as ev
from xipfs.trace.events import MINOR, TRAP, Fault

ROW = [5, 1, 20, 21, "a prog", 0xFFFF_FFFF_FFFF_F008, 3, "a/file", 7]
ROW += ["write", "user", 0, MINOR, TRAP]
ROW += ["xip", 0, 1, "move", "mkwrite", "before", "special", 0, 0, -1, 0, "fault", None, None]
EFFECT = Effect("mkwrite", "before", "special", 0, 0, -1, 0)


def pair(time_ns: int) -> tuple[Fault, Charge]:
    address = 0xFFFF_FFFF_FFFF_F008
    fault = Fault(time_ns, 1, 20, 21, address, 3, 7, True, False, True, False, MINOR, TRAP)
    return fault, Charge(time_ns, 20, 3, 7, PteKind.XIP, True, False, 1, False, "move", EFFECT)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    writer = TraceWriter(path)
    writer.append([ROW])
    writer.append([[6, *ROW[1:]]])
    writer.close({"losses": {"faults": 2}})
    assert path.stat().st_mode & 0o777 == 0o600
    with TraceReader(path) as trace:
        assert trace.rows == 2
        assert trace.metadata["schema"] == 5
        assert trace.metadata["losses"] == {"faults": 2}
        assert trace.metadata["items"]["fault"].startswith("one real fault")
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


def test_the_log_answers_by_cursor_and_counts_what_was_missed() -> None:
    log = FaultLog(lambda _pid: "a\tprog", lambda _ino: "a/file", kept=2)
    log.add(*pair(1))  # nobody reads yet
    start = log.since(10**15 - 1, now_s=0.0)
    assert (start["faults"], start["next"], start["missed"]) == ("", 2, 0)
    for time_ns in (5, 6, 7):
        log.add(*pair(time_ns))
    answer = log.since(2, now_s=1.0)
    assert parse_rows(answer["faults"], answer["columns"]) == [[6, *ROW[1:]], [7, *ROW[1:]]]
    assert (answer["next"], answer["end"], answer["missed"]) == (5, 5, 1)
    log.rest(now_s=62.0)
    log.add(*pair(8))
    assert log.since(5, now_s=63.0)["missed"] == 1


def test_a_file_is_looked_at_while_somebody_records_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = new_image(tmp_path / "image")
    fs = RecordedFilesystem.open(image, ram_bytes=1 << 20, clock=SystemClock())
    ino = fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino
    books = Accountant(fs, Rules.parse("6.1"), lambda _pid: "")
    recorder = Recorder(fs, books, FaultLog(lambda _pid: "", lambda _ino: ""))
    looks: list[int] = []

    def look(ino: int) -> Iterator[PageRun]:
        looks.append(ino)
        return iter(())

    monkeypatch.setattr(fs, "runs", look)
    recorder.file(ino)
    assert looks == []
    recorder.since(10**15 - 1, now_s=0.0)
    recorder.file(ino)
    recorder.file(ino)
    assert looks == [ino]
    recorder.rest(now_s=62.0)
    recorder.file(ino + 1)
    assert looks == [ino]
    fs.close()


EVENTS: list[ev.Event] = [
    ev.Map(1, 2, 3, 0x1000, 0x5000, 7, 4, 3, True, False),
    ev.Unmap(2, 2, 0x1000, 0x2000),
    ev.Protect(3, 2, 0x2000, 0x3000, 1),
    ev.Move(4, 2, 0x2000, 0x3000, 0x9000, 0xA000, True),
    ev.Zap(5, 2, 0x9000, 0xA000),
    ev.Doubt(6, 2, 0x9000, 0xA000, True),
    ev.Extent(6, 2, 0x9000, 0xB000),
    ev.Split(7, 2, 0x9000, 0xA000),
    ev.Registered(7, 2, 3),
    ev.Fork(8, 2, 9, 3, 4, ((0x1000, 0x2000), (0x4000, 0x5000))),
    ev.Exit(9, 2),
    ev.Around(10, 9, 4, 0x9000, 7, 16, 31),
    ev.CacheAdd(11, 7, 16, 4),
    ev.CacheDelete(12, 7, 0, 1),
    ev.Lost(13, 100),
    ev.Incomplete(13, 7, 20),
    ev.Unplaced(13, 7, 20, 21, 0x9000, 3, "write", "user"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_the_file_as_it_was(tmp_path: Path, event: ev.Event) -> None:
    log = ItemLog()
    made = event_row(event)
    assert made is not None
    assert made["item"] in MEANINGS
    log.wake(0.0)
    log.add(5, made)
    answer = log.since(1, 0.0)
    assert (answer["next_faults"], answer["next"], answer["end"]) == ([5], 2, 2)
    writer = TraceWriter(tmp_path / "t.parquet")
    writer.append(parse_rows(answer["items"], answer["columns"]))
    writer.close({})
    with TraceReader(tmp_path / "t.parquet") as trace:
        (batch,) = trace.batches()
    assert event_of({name: batch[name][0] for name in COLUMNS}) == event


def test_a_fault_comes_back_as_it_was_and_copies_are_told_by_their_faults() -> None:
    fault, _ = pair(5)
    assert event_of(dict(zip(COLUMNS, [5, *ROW[1:]], strict=True))) == fault
    assert event_row(ev.CowBroken(1, 2, 3, 3, 0, 4096)) is None


def test_other_items_keep_text_numbers_and_lists() -> None:
    moved = {"ino": 3, "to": "xip", "reason": "a\tb\n", "moved": [[1, 2]], "time_ns": 9}
    made = row("move", moved)
    assert "\t" not in made["detail"]
    assert "\n" not in made["detail"]
    assert values_of(made) == moved
    assert event_of(made) is None


def test_the_item_log_keeps_nothing_until_it_is_woken_and_tells_what_was_missed() -> None:
    log = ItemLog(kept=2)
    assert not log.active
    log.wake(0.0)
    for number in range(3):
        log.add(number, row("sync", {"time_ns": number}))
    answer = log.since(1, 1.0)
    assert (answer["missed"], answer["next_faults"], answer["next"]) == (1, [1, 2], 4)
    log.rest(62.0)
    assert not log.active
    # One that was dropped, and what came since nobody counted: also for who had read all.
    assert log.since(3, 63.0)["missed"] == 2
    assert log.since(4, 64.0)["missed"] == 1
    assert log.since(5, 65.0)["missed"] == 0
