"""A recording of a live mount holds each fault of a program that ran meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from live import COMMAND, ENVIRONMENT, LiveMount, new_image, wait_until, xipfs

TOUCH = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
    print(sum(pages[index * 4096] for index in (0, 16, 32)))
"""


def test_three_faults_are_recorded_and_counted(tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    trace = tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=tracefs"])
    try:
        (directory / "file").write_bytes(b"x" * (48 * 4096))
        recorder = subprocess.Popen(
            [*COMMAND, "record", directory, "-o", trace], env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        wait_until("the recording began", trace.exists)
        subprocess.run([sys.executable, "-c", TOUCH, directory / "file"], check=True)
        recorder.send_signal(signal.SIGTERM)
        _, said = recorder.communicate(timeout=30)
        assert recorder.returncode == 0, said
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
    assert [(line["page"], line["faults"], line["xip"]) for line in told["lines"]] == [
        (0, 1, 1),
        (16, 1, 1),
        (32, 1, 1),
    ]
    table = xipfs("faults", trace).stdout.splitlines()
    assert table[0] == "3 faults, 0 missed, 0 events lost; observer tracefs"
    assert max(map(len, table)) <= 80


def test_the_end_of_the_daemon_ends_the_recording_and_keeps_it(tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    trace = tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=off"])
    try:
        recorder = subprocess.Popen(
            [*COMMAND, "record", directory, "-o", trace], env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        wait_until("the recording began", trace.exists)
    finally:
        mounted.close()
    _, said = recorder.communicate(timeout=30)
    assert (recorder.returncode, b".xipfs" in said) == (1, True), said
    told = json.loads(xipfs("faults", trace, "--json").stdout)
    assert told["metadata"]["losses"]["mount_outlived_recording"] is False
