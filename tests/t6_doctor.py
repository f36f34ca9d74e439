"""``xipfs doctor``: what is there is said to be there, what is missing is named with its remedy."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from conftest import needs
from live import INSTANCES, Mounts, is_mounted, xipfs

from xipfs.cli.doctor import as_text, clean, examine
from xipfs.trace.session import mount_tracefs


@needs("root", "fuse", "tracefs")
def test_this_machine_is_exact() -> None:
    lines = xipfs("doctor").stdout.splitlines()
    assert lines[0] == "ok      /dev/fuse: usable"
    assert "ok      root: uid 0" in lines
    assert any(line.startswith("ok      tracefs: ") for line in lines)
    assert lines[-1] == "exact: every fault is seen"
    answer = json.loads(xipfs("doctor", "--json").stdout)
    assert answer["exact"] is True
    assert answer["removed"] == []


def test_without_tracefs_it_says_what_is_lost_and_how_to_get_it(tmp_path: Path) -> None:
    found = {need.name: need for need in examine(tmp_path / "none")}
    tracefs = found["tracefs"]
    assert (tracefs.there, tracefs.needed) == (False, True)
    assert tracefs.found == f"tracefs is not mounted ({tmp_path}/none)"
    assert tracefs.lost == "faults are estimated from READ requests"
    assert tracefs.get == f"as root: mount -t tracefs nodev {tmp_path}/none"
    text = as_text(list(found.values()), ["dead mount /mnt"], exact=False)
    assert text.startswith("removed dead mount /mnt\n")
    assert "MISSING tracefs: tracefs is not mounted" in text
    assert text.endswith("not exact: see what is MISSING")


@needs("root", "fuse", "tracefs")
def test_what_a_killed_daemon_left_is_removed(live: Mounts) -> None:
    mount = live.mount(None, "observe=tracefs")
    mount.kill()
    left = list(INSTANCES.glob(f"xipfs-{mount.pid}-*"))
    assert len(left) == 2
    assert is_mounted(mount.directory)
    answer = json.loads(xipfs("doctor", "--clean", "--json").stdout)
    assert f"dead mount {mount.directory}" in answer["removed"]
    assert {f"tracefs instance {path.name}" for path in left} <= set(answer["removed"])
    assert not is_mounted(mount.directory)
    assert not any(path.exists() for path in left)


def test_cleaning_where_there_is_no_tracefs_is_no_error(tmp_path: Path) -> None:
    assert not any(name.startswith("tracefs") for name in clean(tmp_path / "none"))


def test_tracefs_is_mounted_only_over_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "instances").mkdir()
    assert mount_tracefs(tmp_path) is False
    assert mount_tracefs(tmp_path / "none") is False
    assert not os.path.ismount(tmp_path)


@needs("root", "tracefs")
def test_tracefs_is_mounted_where_nobody_did(tmp_path: Path) -> None:
    try:
        assert mount_tracefs(tmp_path) is True
        assert (tmp_path / "instances").is_dir()
        assert mount_tracefs(tmp_path) is False
    finally:
        subprocess.run(["umount", tmp_path], check=True)
