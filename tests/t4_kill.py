"""kill -9 of the daemon at random moments under load; ``tools/kill`` does the same for longer."""

from __future__ import annotations

import os
from pathlib import Path

import killpoints
import kills
import pytest
from conftest import needs
from live import Mounts

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse")]


@pytest.mark.parametrize("observe", ["off", pytest.param("tracefs", marks=needs("tracefs"))])
def test_what_was_promised_survives_the_daemon(tmp_path: Path, observe: str) -> None:
    seed = int(os.environ.get("XIPFS_SEED", "7"))
    print(f"replay (the moments differ): XIPFS_SEED={seed} pytest {__file__}")
    seen: list[int] = []
    options = [f"observe={observe}", "ram=128K"]
    outcome = kills.run(tmp_path, 10, seed, options, progress=seen.append)
    assert outcome.kills == len(seen) == 10
    assert outcome.operations > 20


@pytest.mark.parametrize("to", [PageKind.PAGECACHE, PageKind.XIP], ids=lambda to: str(to.value))
def test_a_kill_at_a_step_of_a_migration(tmp_path: Path, to: PageKind) -> None:
    """Every ninth step, and those that a dirty page's way home takes: there the mount got stuck.

    ``tools/kill`` goes through all of them.
    """
    seed = int(os.environ.get("XIPFS_SEED", "7"))
    print(f"replay: XIPFS_SEED={seed} pytest {__file__}")
    seen: list[killpoints.Point] = []
    steps = sorted({4, 5, 6} | set(range(1 + seed % 9, 300, 9)))
    killpoints.run(tmp_path, to, iter(steps), seen.append)
    assert seen[-1].what is None, "the migration has more steps than were looked at"
    assert len(seen) > 8, seen


def test_the_guard_ends_with_the_mount(live: Mounts) -> None:
    mnt = live.mount()
    children = Path(f"/proc/{mnt.pid}/task/{mnt.pid}/children").read_text().split()
    (guard,) = [pid for pid in children if "abort" in Path(f"/proc/{pid}/cmdline").read_text()]
    mnt.umount()
    assert not Path(f"/proc/{guard}").exists()


def test_the_judge_knows_what_was_not_promised() -> None:
    old = {"a": b"x" * 32, "b": b"keep"}
    write = ["write", "a", 8, 16, 1, "fsync"]
    new = bytes_after = kills.applied(old, write)["a"]
    assert kills.violation(old, old, write) == ""
    assert kills.violation({"a": new, "b": b"keep"}, old, write) == ""
    torn = {"a": old["a"][:16] + new[16:], "b": b"keep"}
    assert kills.violation(torn, old, write) == ""
    foreign = {"a": bytes_after[:8] + b"????????" + bytes_after[16:], "b": b"keep"}
    assert "foreign bytes at 8" in kills.violation(foreign, old, write)
    assert "b differs" in kills.violation({"a": old["a"], "b": b"lost"}, old, None)
    assert "names ['b']" in kills.violation({"b": b"keep"}, old, ["truncate", "a", 1])
    assert kills.violation({"c": old["a"], "b": b"keep"}, old, ["rename", "a", "c"]) == ""
    assert "beside the file" in kills.violation({"a": new, "b": b""}, old, write)
