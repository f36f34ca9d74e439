"""Traces that are not whole, or not ours: what can be read of them, and what is said of them."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT
from t3_trace_file import ROW

from xipfs.errors import UsageError
from xipfs.stats import trace_writer
from xipfs.stats.partial_trace import follow, partial_of
from xipfs.stats.trace_columns import TraceError
from xipfs.stats.trace_file import TraceReader
from xipfs.stats.trace_writer import TraceWriter

BEGAN = {"losses": {"faults": 0, "faults_missed": 0}, "observer": {"mode": "tracefs"}}


def row(time_ns: int) -> list[Any]:
    return [time_ns, *ROW[1:]]


def flushed(writer: TraceWriter, *times: int) -> None:
    """Have the recorder write rows of these times, as it does after each poll."""
    writer.append([row(time_ns) for time_ns in times])
    writer.flush({"faults": max(times)})


def whole_trace(path: Path) -> bytes:
    writer = TraceWriter(path, BEGAN)
    flushed(writer, 1, 2, 3)
    flushed(writer, 4)
    writer.close({"losses": {"faults": 4}})
    return path.read_bytes()


def times_of(path: Path) -> list[int]:
    with TraceReader(path) as trace:
        times = [time_ns for batch in trace.batches() for time_ns in batch["time_ns"]]
        assert trace.rows == len(times)
        return times


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as raised:
        times_of(path)
    return str(raised.value)


def chosen(end: int, first: int = 0) -> list[int]:
    """Return sizes from ``first`` to below ``end``: all near the two, and many between."""
    near = [*range(first, first + 64), *range(end - 64, end)]
    return sorted({*near, *range(first, end, 13)})


def test_a_trace_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    data = whole_trace(path)
    assert times_of(path) == [1, 2, 3, 4]
    advice = "its recording was cut off, or the file was truncated; record again, and end it with"
    for size in reversed(chosen(len(data))):
        os.truncate(path, size)
        lacks = "no end" if size else "nothing in it"
        assert refusal(path) == f"{path} has {lacks}: {advice} Ctrl-C or SIGTERM", size


def test_a_damaged_byte_is_refused_or_changes_no_row(tmp_path: Path) -> None:
    path = tmp_path / "t"
    data = whole_trace(path)
    seed = random.randrange(1 << 32)
    print(f"random.Random({seed})")
    for place in random.Random(seed).sample(range(len(data)), 300):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        try:
            with TraceReader(path) as trace:
                columns = [batch.values() for batch in trace.batches()]
            rows = [list(each) for batch in columns for each in zip(*batch, strict=True)]
        except TraceError:
            continue
        assert rows == [row(time_ns) for time_ns in (1, 2, 3, 4)], place


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    """One damaged byte of the schema can make it that."""
    path = tmp_path / "t"
    whole_trace(path)
    table = pyarrow.parquet.read_table(path)
    at = table.schema.get_field_index("item")
    changed = table.schema.set(at, table.schema.field(at).with_type(pyarrow.binary()))
    told = pyarrow.parquet.read_metadata(path).metadata
    with pyarrow.parquet.ParquetWriter(path, changed) as writer:
        writer.write_table(table.cast(changed))
        writer.add_key_value_metadata({key: told[key] for key in told if b"xipfs" in key})
    assert refusal(path) == f"{path} is damaged: its column item holds binary; expected string"


def test_what_a_killed_recorder_left_is_read_up_to_its_last_whole_batch(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, BEGAN)
    partial = partial_of(path)
    ends = [partial.stat().st_size]
    for times in ((1, 2), (3,), (4, 5, 6)):
        flushed(writer, *times)
        ends.append(partial.stat().st_size)
    data = partial.read_bytes()
    copy = tmp_path / "copy"  # nobody holds its lock
    copy.write_bytes(data)
    near = {size for end in ends[:-1] for size in range(end, end + 9)}
    for size in sorted({*near, *chosen(ends[-1] + 1, ends[0])}, reverse=True):
        os.truncate(copy, size)
        whole = sum(size >= end for end in ends) - 1
        last = (0, 2, 3, 6)[whole]
        assert times_of(copy) == list(range(1, last + 1)), size
        with TraceReader(copy) as trace:
            assert trace.metadata["unfinished"] == "cut off"
            assert trace.metadata["losses"] == {"faults": last, "faults_missed": 0}
            assert trace.metadata["observer"] == {"mode": "tracefs"}
    os.truncate(copy, 100)
    assert f"{copy} was cut off before its first row, or is no trace: " in refusal(copy)
    writer.release()


def test_an_unfinished_recording_is_named_by_the_file_that_it_will_be(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, BEGAN)
    partial = partial_of(path)
    flushed(writer, 1)
    assert refusal(path) == (
        f"{path} has nothing in it yet: it is being recorded; {partial} has what there is so far "
        "(xipfs faults, with --follow too, reads it)"
    )
    with TraceReader(partial) as trace:
        assert trace.metadata["unfinished"] == "being recorded"
    with pytest.raises(UsageError, match="is being recorded already"):
        TraceWriter(path, force=True)
    left = tmp_path / "left"
    partial_of(left).write_bytes(partial.read_bytes())
    left.touch()
    assert refusal(left) == (
        f"{left} has nothing in it: its recording was cut off; {partial_of(left)} has what was "
        "recorded until then, and is read like a trace"
    )
    # What is left of a recording is overwritten only if that is said.
    left.unlink()
    with pytest.raises(UsageError, match=r"left\.partial exists; --force overwrites it"):
        TraceWriter(left)
    assert times_of(partial_of(left)) == [1]
    assert not left.exists()
    TraceWriter(left, force=True).close({})
    assert times_of(left) == []
    writer.close({})
    assert not partial.exists()


def test_a_recording_is_followed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, BEGAN)
    flushed(writer, 1)
    steps: Iterator[Callable[[], None]] = iter(
        [lambda: flushed(writer, 2, 3), lambda: None, lambda: writer.close({})]
    )

    def wait() -> bool:
        next(steps)()
        return True

    seen = list(follow(partial_of(path), wait))
    assert [batch.get("time_ns") for batch, _ in seen] == [[], [1], [2, 3], [], None]
    assert [told["losses"]["faults"] for _, told in seen] == [0, 1, 3, 3, 3]
    assert "unfinished" not in seen[-1][1]
    assert next(steps, None) is None


def test_following_ends_when_the_recorder_is_gone_or_nobody_wants_more(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, BEGAN)
    flushed(writer, 1)
    *_, (_, told) = follow(partial_of(path), lambda: False)
    assert told["unfinished"] == "being recorded"
    copy = tmp_path / "copy"
    copy.write_bytes(partial_of(path).read_bytes()[:-3])
    waits: list[int] = []

    def wait() -> bool:
        waits.append(0)
        assert len(waits) < 9, "it waits for a recorder that is gone"
        return True

    seen = list(follow(copy, wait))
    assert [batch.get("time_ns") for batch, _ in seen] == [[], None]
    assert seen[-1][1]["unfinished"] == "cut off"
    assert seen[-1][1]["losses"] == BEGAN["losses"]
    writer.release()


def test_a_conversion_that_is_interrupted_leaves_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, BEGAN)
    flushed(writer, 1, 2)

    def interrupted(stream: Any) -> Iterator[list[Any]]:
        yield [next(stream) for _ in range(2)]
        raise KeyboardInterrupt

    monkeypatch.setattr(trace_writer, "_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close({})
    assert path.stat().st_size > 0
    assert "its recording was cut off" in refusal(path)
    assert times_of(partial_of(path)) == [1, 2]
    with TraceReader(partial_of(path)) as trace:
        assert "unfinished" not in trace.metadata, "all its rows are there"


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_what_was_recorded_until_then(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, BEGAN)
    partial = partial_of(path)
    flushed(writer, 1)
    with files_end_at(partial.stat().st_size + 100):
        with pytest.raises(TraceError) as raised:
            flushed(writer, *range(2, 200))
        assert str(raised.value) == (
            f"{partial} cannot be written: File too large; {partial} has what was recorded until "
            "then"
        )
        writer.close({})
    assert times_of(partial) == [1]


def parquet(path: Path, metadata: dict[str, str], columns: dict[str, list[int]]) -> Path:
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path)
    return path


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("something else")
    assert refusal(path) == f"{path} is not a trace file; expected a file of `xipfs record`"
    again = "expected trace schema 5; record it again with this version of xipfs"
    parquet(path, {}, {"a": [1]})
    assert refusal(path) == f"{path} is not a trace of xipfs; {again}"
    for schema in (1, 2, 3, 4, 99):
        parquet(path, {"xipfs.schema": json.dumps(schema)}, {"a": [1]})
        assert refusal(path) == f"{path} is of trace schema {schema}; {again}"
    parquet(path, {"xipfs.schema": "5"}, {"a": [1]})
    assert refusal(path).startswith(f"{path} has other columns than a trace; expected time_ns, mm,")
    parquet(path, {"xipfs.schema": "{"}, {"a": [1]})
    assert refusal(path).startswith(f"{path} is damaged: ")
    with pyarrow.ipc.RecordBatchStreamWriter(
        path, pyarrow.schema([("a", pyarrow.int64())])
    ) as stream:
        stream.write_batch(pyarrow.record_batch({"a": [1]}))
    assert refusal(path) == f"{path} is not a trace of xipfs; {again}"
    assert refusal(tmp_path / "none").endswith("cannot be read: No such file or directory")
    assert refusal(tmp_path) == f"{tmp_path} cannot be read: Is a directory"


@needs("root")
def test_a_file_that_may_not_be_read() -> None:
    path = Path("/tmp") / f"xipfs-unreadable-{os.getpid()}"
    whole_trace(path)
    nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
    try:
        done = subprocess.run(
            [*nobody, *COMMAND, "faults", str(path)],
            env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        path.unlink()
    said = f"xipfs faults: {path} cannot be read: Permission denied\n"
    assert (done.returncode, done.stderr) == (2, said)
