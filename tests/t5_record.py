"""A recording of a live mount holds each fault of a program that ran meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from live import COMMAND, ENVIRONMENT, LiveMount, new_image, wait_until, xipfs

from xipfs.stats.partial_trace import partial_of
from xipfs.stats.trace_file import TraceReader
from xipfs.stats.trace_items import values_of

TOUCH = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    print(sum(pages[index * 4096] for index in (0, 16, 32)))
"""


def recording(directory: Path, trace: Path) -> subprocess.Popen[bytes]:
    """Return a recording of the mount into ``trace`` that has begun."""
    recorder = subprocess.Popen(
        [*COMMAND, "record", directory, "-o", trace], env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    wait_until("the recording began", trace.exists)
    return recorder


def end_recording(recorder: subprocess.Popen[bytes], timeout_s: float = 30) -> None:
    recorder.send_signal(signal.SIGTERM)
    _, said = recorder.communicate(timeout=timeout_s)
    assert recorder.returncode == 0, said


def test_three_faults_are_recorded_and_counted(tmp_path: Path) -> None:
    directory, trace = tmp_path / "mnt", tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=tracefs"])
    try:
        (directory / "file").write_bytes(b"x" * (48 * 4096))
        xipfs("policy", "set", directory, "threshold,promote=99,stay_ms=7", "--dry")
        recorder = recording(directory, trace)
        xipfs("policy", "set", directory, "off")
        subprocess.run([sys.executable, "-c", TOUCH, directory / "file"], check=True)
        end_recording(recorder)
    finally:
        mounted.close()
    told = json.loads(xipfs("faults", trace, "--by", "page", "--json").stdout)
    assert told["metadata"]["losses"] == {
        "mount_outlived_recording": True,
        "faults": 3,
        "faults_missed": 0,
        "items_missed": 0,
        "events_lost": 0,
    }
    assert told["metadata"]["policy"] == {
        "policy": "threshold",
        "parameters": {"pages_per_s": 0, "stay_ms": 7, "promote": 99},
        "files_sha256": "",
        "dry": True,
    }, "the one that acted at the start"
    assert [(line["page"], line["faults"], line["xip"]) for line in told["lines"]] == [
        (0, 1, 1),
        (16, 1, 1),
        (32, 1, 1),
    ]
    table = xipfs("faults", trace).stdout.splitlines()
    assert table[0] == "3 faults, 0 missed, 0 events lost; observer tracefs"
    assert max(map(len, table)) <= 80


def test_the_end_of_the_daemon_ends_the_recording_and_keeps_it(tmp_path: Path) -> None:
    directory, trace = tmp_path / "mnt", tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=off"])
    try:
        recorder = recording(directory, trace)
    finally:
        mounted.close()
    _, said = recorder.communicate(timeout=30)
    assert (recorder.returncode, b".xipfs" in said) == (1, True), said
    told = json.loads(xipfs("faults", trace, "--json").stdout)
    assert told["metadata"]["losses"]["mount_outlived_recording"] is False


def test_a_killed_daemon_leaves_the_recording(tmp_path: Path) -> None:
    directory, trace = tmp_path / "mnt", tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=tracefs"])
    try:
        (directory / "file").write_bytes(b"x" * (48 * 4096))
        recorder = recording(directory, trace)
        subprocess.run([sys.executable, "-c", TOUCH, directory / "file"], check=True)
        partial = partial_of(trace)
        wait_until("three faults recorded", lambda: faults_in(partial) == 3, timeout_s=60)
        mounted.kill()
        _, said = recorder.communicate(timeout=60)
    finally:
        mounted.close()
    assert (recorder.returncode, b".xipfs" in said) == (1, True), said
    assert b"Traceback" not in said
    told = json.loads(xipfs("faults", trace, "--by", "page", "--json").stdout)
    assert told["metadata"]["losses"]["mount_outlived_recording"] is False
    assert [(line["page"], line["faults"]) for line in told["lines"]] == [(0, 1), (16, 1), (32, 1)]
    assert not partial.exists()


def faults_in(partial: Path) -> int:
    with TraceReader(partial) as reader:
        return sum(batch["item"].count("fault") for batch in reader.batches())


def test_a_killed_recorder_leaves_what_it_had_read(tmp_path: Path) -> None:
    directory, trace = tmp_path / "mnt", tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=tracefs"])
    try:
        (directory / "file").write_bytes(b"x" * (48 * 4096))
        recorder = recording(directory, trace)
        partial = partial_of(trace)
        assert partial.stat().st_mode & 0o777 == 0o600
        follower = subprocess.Popen(
            [*COMMAND, "faults", partial, "--follow", "--json"],
            env=ENVIRONMENT, stdout=subprocess.PIPE,
        )  # fmt: skip
        subprocess.run([sys.executable, "-c", TOUCH, directory / "file"], check=True)
        wait_until("three faults recorded", lambda: faults_in(partial) == 3, timeout_s=60)
        recorder.kill()
        recorder.communicate()
        out, _ = follower.communicate(timeout=60)
    finally:
        mounted.close()
    refused = xipfs("faults", trace, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"its recording was cut off; {partial} has what was recorded" in refused.stderr
    losses = {"mount_outlived_recording": True, "faults": 3}
    losses |= {"faults_missed": 0, "items_missed": 0, "events_lost": 0}
    told = json.loads(xipfs("faults", partial, "--by", "page", "--json").stdout)
    assert (told["metadata"]["losses"], told["metadata"]["unfinished"]) == (losses, "cut off")
    assert [(line["page"], line["faults"]) for line in told["lines"]] == [(0, 1), (16, 1), (32, 1)]
    table = xipfs("faults", partial).stdout.splitlines()
    assert table[0] == "3 faults, 0 missed, 0 events lost; observer tracefs; cut off"
    assert follower.returncode == 0
    *faults, last = map(json.loads, out.splitlines())
    assert [fault["page"] for fault in faults] == [0, 16, 32]
    assert last == {"losses": losses, "unfinished": "cut off"}


TOUCH_AGAIN = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    for page in (0, 0, 1):
        print(pages[page * 4096], flush=True)
        sys.stdin.readline()
"""


def test_the_stream_tells_moves_and_which_faults_they_caused(tmp_path: Path) -> None:
    directory, trace = tmp_path / "mnt", tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=tracefs"])
    try:
        (directory / "file").write_bytes(b"x" * (2 * 4096))
        ino = (directory / "file").stat().st_ino
        recorder = recording(directory, trace)
        program = subprocess.Popen(
            [sys.executable, "-c", TOUCH_AGAIN, directory / "file"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdout.readline()
        mounted.migrate("file", "pagecache", "0")
        for _ in range(2):
            program.stdin.write(b"\n")
            program.stdin.flush()
            program.stdout.readline()
        program.communicate(b"\n", timeout=30)
        end_recording(recorder)
    finally:
        mounted.close()
    with TraceReader(trace) as reader:
        (batch,) = reader.batches()
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    told = [
        (row["item"], row["page"], row["cause"], row["charged"])
        for row in rows
        if row["ino"] == ino and row["item"] in ("file", "map", "fault", "move", "read")
    ]
    assert [each for each in told if each[0] != "read"] == [
        ("file", None, "", None),
        ("map", None, "", None),
        ("fault", 0, "", "xip"),
        ("move", 0, "", None),
        ("fault", 0, "move", "pagecache"),
        ("fault", 1, "", "xip"),
    ]
    assert [each[2] for each in told if each[0] == "read"] == ["", "move", ""]
    (move,) = [values_of(row) for row in rows if row["item"] == "move"]
    assert (move["to"], move["by"], move["moved"], move["refused"]) == (
        "pagecache",
        "manual",
        [[0, 1]],
        {},
    )
    state = next(values_of(row) for row in rows if row["item"] == "file" and row["ino"] == ino)
    assert (state["size_bytes"], state["runs"]) == (8192, [[0, 2, "xip"]])
