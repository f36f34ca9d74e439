"""Faults on damaged images: charged as what they were, and no end of the observing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, Mounts, wait_until, xipfs
from t4_damaged import image_without_page_1_of_first, mutant

pytestmark = [needs("root", "fuse", "tracefs")]


def test_a_touch_of_a_page_without_a_sound_entry_is_sigbus_in_the_model_too(
    live: Mounts, tmp_path: Path, touch: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(image_without_page_1_of_first())
    mount = live.mount(path, "observe=tracefs")
    mount.expected_log = [r"is damaged: map of inode 2: the entry at offset", r"nothing is changed"]
    command = [str(touch), "map", str(mount / "first"), "private", "r", "read", "0-1"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGBUS
    stats = mount.stats()
    assert (stats["observer"]["mode"], stats["observer"]["reason"]) == ("tracefs", "")
    assert stats["vmstat"]["pgfault_xip"] == 1
    assert stats["vmstat"]["pgfault_sigbus"] == 1


def test_a_recording_goes_on_over_a_damaged_file(live: Mounts, tmp_path: Path, touch: Path) -> None:
    """Its state cannot be told; its sound page is read as without the recording."""
    path = tmp_path / "image"
    path.write_bytes(image_without_page_1_of_first())
    mount = live.mount(path, "observe=tracefs")
    trace = tmp_path / "trace.parquet"
    recorder = subprocess.Popen(
        [*COMMAND, "record", str(mount.directory), "-o", str(trace)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until("the recording", lambda: trace.with_name(trace.name + ".partial").exists())
        command = [str(touch), "map", str(mount / "first"), "private", "r", "read", "0"]
        assert subprocess.run(command, check=False).returncode == 0
        assert mount.cat_stats()["observer"]["mode"] == "tracefs"
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.communicate(timeout=60)
    counted = json.loads(xipfs("faults", trace, "--by", "file", "--json").stdout)
    assert counted, counted


def test_a_policy_moves_nothing_any_more_once_damage_was_met(
    live: Mounts, tmp_path: Path, touch: Path
) -> None:
    """Its plans are refused, which it hears; the log has the damage and nothing else."""
    path = tmp_path / "image"
    path.write_bytes(mutant("xip", "xattrs.crc", 1, fits=False))
    mount = live.mount(path, "observe=tracefs", "policy=fifo")
    mount.expected_log = [r"is damaged: the extended attributes of inode 2", r"nothing is changed"]
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.listxattr(mount / "first")

    def planned() -> int:
        subprocess.run([touch, "map", mount / "tall", "private", "r", "read", "0"], check=True)
        count: int = mount.cat_stats()["migration"]["planned"]
        return count

    # While a move is under way the same page is not planned again.
    wait_until("a plan after a refused one", lambda: planned() > 1)
    stats = mount.cat_stats()
    assert (stats["vmstat"]["pgpromote_success"], stats["migration"]["failure"]) == (0, "")
    assert mount.letters("tall").startswith("X")
