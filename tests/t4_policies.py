"""Policies on a real mount: chosen at mount, changed while it lives, by name or by file."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs

pytestmark = [needs("root", "fuse")]

REQUESTS = ("observe=requests", "readahead=0")


def said(mount: LiveMount, *words: str, code: int = 0) -> str:
    done = xipfs("policy", "set", mount.directory, *words, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return (done.stdout or done.stderr).replace(str(mount.directory), "MNT")


def read(mount: LiveMount, name: str) -> None:
    """Read a file of 11 pages page by page; nothing of it is in the kernel's cache before."""
    assert (mount / name).read_bytes() == bytes(11 * PAGE)


def test_a_policy_changes_on_a_live_mount(live: Mounts, tmp_path: Path) -> None:
    mount = live.mount()
    for name in "abcde":
        (mount / name).write_bytes(bytes(11 * PAGE))
    mount = live.remount(mount, *REQUESTS, "policy=threshold,promote=2")
    assert mount.cat_stats()["migration"]["parameters"] == {
        "pages_per_s": 0,
        "stay_ms": 0,
        "promote": 2,
    }
    read(mount, "a")
    mount.vmstat()
    assert mount.letters("a") == "X" * 11, "one fault is not two"
    assert said(mount, "fifo") == "MNT: policy fifo, pages_per_s=0, stay_ms=0\n"
    read(mount, "b")
    wait_until("fifo promotes", lambda: "P" in mount.letters("b"))
    migration = mount.cat_stats()["migration"]
    assert (migration["policy"], migration["signals"]) == ("fifo", ["fault"])
    assert said(mount, "off") == "MNT: policy off, pages_per_s=0, stay_ms=0\n"
    read(mount, "c")
    mount.vmstat()
    assert mount.letters("c") == "X" * 11
    file = tmp_path / "mine.py"
    file.write_text("from xipfs.migrate.policies.fifo import Fifo as POLICY\n")
    answer = json.loads(said(mount, f"{file},pages_per_s=1000", "--json"))
    assert (answer["policy"], answer["parameters"]["pages_per_s"]) == (str(file), 1000)
    read(mount, "d")
    wait_until("the file's policy promotes", lambda: "P" in mount.letters("d"))
    assert said(mount, "clock", "--dry").endswith(", high=98, low=95, dry\n")
    read(mount, "e")
    mount.vmstat()
    assert mount.letters("e") == "X" * 11
    assert mount.cat_stats()["migration"]["would_move"][0]["reason"] == "first touch"


def test_a_wrong_policy_leaves_the_old_one(live: Mounts) -> None:
    mount = live.mount(None, "policy=fifo")
    for words, message in (
        ("lru", "policy=lru; expected one of off, fifo, threshold, clock, tpp"),
        ("tpp,high=1", "high=1 and low=90; expected percent, low below high"),
        ("tpp,high", "parameter high''; expected KEY=VALUE"),
        ("/absent.py", "cannot be loaded: FileNotFoundError"),
        ("profile,file=/absent", "the profile /absent cannot be read"),
    ):
        assert message in said(mount, words, code=2)
    assert mount.cat_stats()["migration"]["policy"] == "fifo"


def test_a_read_only_mount_only_counts(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(11 * PAGE))
    mount = live.remount(mount, "ro", "policy=fifo", *REQUESTS)
    read(mount, "file")
    migration = mount.cat_stats()["migration"]
    assert (migration["dry"], migration["would_move"][0]["to"]) == (True, "pagecache")
    assert "Read-only file system" in said(mount, "tpp", code=1)
