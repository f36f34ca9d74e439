"""The stream that clients make of a mount's two logs: whole, in order, or counted as missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import new_image
from t3_trace_file import pair

from xipfs.accounting.accountant import Accountant
from xipfs.cli import stream
from xipfs.cli.client import Json
from xipfs.clock import SystemClock
from xipfs.fuse.mounts import Mount
from xipfs.fuse.recording import RecordedFilesystem, Recorder
from xipfs.mm.rules import Rules
from xipfs.stats.fault_log import FaultLog
from xipfs.stats.item_log import ItemLog
from xipfs.stats.trace_columns import COLUMNS
from xipfs.stats.trace_items import event_of, values_of
from xipfs.trace import events as ev


class Daemon:
    """What answers a stream's questions on a mount, without the mount."""

    def __init__(self, fs: RecordedFilesystem) -> None:
        self.fs = fs
        self.faults = FaultLog(lambda _pid: "prog", fs.paths.of, kept=4)
        self.books = Accountant(fs, Rules.parse("6.1"), lambda _pid: "")
        self.recorder = Recorder(fs, self.books, self.faults)
        self.recorder.log = ItemLog(kept=6)
        self.recorder.policy = lambda: {"policy": "off"}
        self.lost = 0

    def ask(self, _mount: Mount, name: str) -> Json:
        what, cursor, _ = name.split(".")
        if what == "items":
            return self.recorder.since(int(cursor), now_s=0.0)
        return self.faults.since(int(cursor), now_s=0.0) | {"events_lost": self.lost}

    def fault(self, time_ns: int) -> None:
        self.faults.add(*pair(time_ns))


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    fs = RecordedFilesystem.open(
        new_image(tmp_path / "image"), ram_bytes=1 << 20, clock=SystemClock()
    )
    made = Daemon(fs)
    monkeypatch.setattr(stream, "ask", made.ask)
    yield made
    fs.close()


def begin() -> stream.Stream:
    return stream.Stream(Mount(0, 1, Path("mnt"), "fuse.xipfs", "image", frozenset()))


def told(reader: stream.Stream) -> list[tuple[str, Any]]:
    rows = [dict(zip(COLUMNS, row, strict=True)) for rows in reader.poll() for row in rows]
    return [(row["item"], row["ino"] if row["item"] == "file" else row["time_ns"]) for row in rows]


def names(reader: stream.Stream) -> list[str]:
    return [item for item, _ in told(reader)]


def test_two_readers_are_each_told_the_state_once_and_all_that_follows(daemon: Daemon) -> None:
    old = daemon.fs.mknod(1, b"old", 0o100644, 0, 0, 0).ino
    new = daemon.fs.mknod(1, b"new", 0o100644, 0, 0, 0).ino
    daemon.lost = 7  # before anybody read
    first = begin()
    daemon.recorder.file(old)
    daemon.fault(11)
    assert told(first)[2:] == [("file", old), ("fault", 11)]
    second = begin()
    # A file that the first has heard of is told to the second too, and only to that one.
    daemon.recorder.event(ev.CacheAdd(12, old, 0, 1), "")
    daemon.fault(13)
    daemon.recorder.file(new)
    told_first, told_second = told(first), told(second)
    assert told_first == [("cache_add", 12), ("fault", 13), ("file", new)]
    assert [item for item, _ in told_second[:3]] == ["file", "start", "policy"]
    assert told_second[0] == ("file", old)
    assert told_second[3:] == told_first
    assert (first.losses(), second.losses()) == (
        {"faults": 2, "faults_missed": 0, "items_missed": 0, "events_lost": 0},
        {"faults": 1, "faults_missed": 0, "items_missed": 0, "events_lost": 0},
    )


def test_pages_mapped_without_a_fault_are_told_page_by_page(daemon: Daemon) -> None:
    """Of the file's pages 0..5 are cached; 3 was added just now, so its READ may be under way."""
    fs, books = daemon.fs, daemon.books
    ino = fs.mknod(1, b"lib", 0o100644, 0, 0, 0).ino
    fs.write(ino, 0, bytes(8 * 4096))
    start, now_ns = 0x10000, 5_000_000_000
    fault = ev.Fault(
        now_ns, 9, 20, 20, start, ino, 0, write=False, execute=False, user=True, protection=False,
        verdict=ev.MINOR, origin=ev.TRAP,
    )  # fmt: skip
    around = ev.Around(now_ns + 1, 9, 20, start, ino, 0, 7)
    books.consume([
        ev.CacheAdd(1, ino, 0, 3), ev.CacheAdd(now_ns - 1, ino, 3, 1), ev.CacheAdd(1, ino, 4, 2),
    ])  # fmt: skip
    first = begin()
    told(first)
    books.consume([ev.Map(2, 9, 20, start, start + 0x8000, ino, 0, 1, False, True), fault, around])
    rows = [dict(zip(COLUMNS, row, strict=True)) for rows in first.poll() for row in rows]
    assert [row["item"] for row in rows] == ["file", "map", "around"]
    assert {row["path"] for row in rows} == {"lib"}
    whole = {name: rows[-1][name] for name in ("mm", "pid", "comm", "ino", "page", "pages")}
    assert whole == {"mm": 9, "pid": 20, "comm": "", "ino": ino, "page": 0, "pages": 5}
    told_of = values_of(rows[-1])
    assert (told_of["mapped"], told_of["unsure"], told_of["last"]) == (
        [[1, 2], [4, 2]],
        [[3, 1]],
        7,
    )
    assert event_of(rows[-1]) == around
    # Who begins now is told all six, and that nobody knows how they came.
    second = begin()
    rows = [dict(zip(COLUMNS, row, strict=True)) for rows in second.poll() for row in rows]
    mapped = rows[-1]
    assert [row["item"] for row in rows] == ["file", "start", "policy", "map", "mapped"]
    assert (mapped["mm"], mapped["pid"], mapped["ino"], mapped["path"]) == (9, 20, ino, "lib")
    told_of = values_of(mapped)
    assert (told_of["pages"], told_of["mapped"], told_of["unsure"]) == (
        6,
        [[0, 3], [4, 2]],
        [[3, 1]],
    )


def test_what_comes_faster_than_it_is_read_is_counted(daemon: Daemon) -> None:
    reader = begin()
    assert names(reader) == ["start", "policy"]
    for time_ns in range(9):
        daemon.recorder.note("sync", time_ns=time_ns)
        daemon.fault(time_ns)
    daemon.lost = 5
    # The logs keep 4 faults and 6 items.
    assert [each for each in told(reader) if each[0] == "fault"] == [
        ("fault", time_ns) for time_ns in (5, 6, 7, 8)
    ]
    assert reader.losses() == {
        "faults": 4,
        "faults_missed": 5,
        "items_missed": 3,
        "events_lost": 5,
    }
    assert told(reader) == []


def test_a_reader_that_stayed_away_too_long_is_told_that_items_are_missing(daemon: Daemon) -> None:
    reader = begin()
    told(reader)
    daemon.recorder.rest(now_s=61.0)
    assert not daemon.recorder.active
    assert told(reader) == []
    assert reader.items_missed == 1
    # And from here on it hears of everything again.
    daemon.recorder.event(ev.CacheAdd(12, 3, 0, 1), "")
    assert daemon.books.on_event is not None
    assert told(reader) == [("cache_add", 12)]
