"""Moves of many files: what of them is gone, refused or interrupted costs no other a word."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs

from xipfs.cli import migrate, named_files
from xipfs.cli.client import request
from xipfs.errors import MountError

pytestmark = [needs("root", "fuse")]

GONE = {"moved": 0, "already": 0, "failed_errno": {"gone": "ENOENT"}}


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    return shared.mount(shared.image(size_bytes=128 << 20))


def asked(mount: LiveMount, files: list[Any], **more: Any) -> dict[str, Any]:
    """Return the result of a move of ``files``."""
    *_, last = request(mount.mount, "migrate", to="pagecache", files=files, **more)
    result: dict[str, Any] = last["result"]
    return result


def removed(mount: LiveMount) -> int:
    """Return the inode number of a file that is not there any more."""
    path = mount / "removed"
    path.write_bytes(bytes(PAGE))
    ino = path.stat().st_ino
    path.unlink()
    wait_until("the end of the inode", lambda: not has_inode(mount, ino))
    return ino


def has_inode(mount: LiveMount, ino: int) -> bool:
    try:
        (mount / ".xipfs" / f"pages.{ino}.json").read_bytes()
    except FileNotFoundError:
        return False
    return True


def test_a_file_that_is_gone_is_told_so_and_the_others_move(live: Mounts) -> None:
    mount = live.mount()
    (mount / "there").write_bytes(bytes(3 * PAGE))
    there, gone = (mount / "there").stat().st_ino, removed(mount)
    files = [{"ino": gone}, {"ino": there}]
    told = asked(mount, files, dry_run=True)
    assert (told["would_move"], told["failed"]) == (3, {"gone": 1})
    assert told["failed_errno"] == {"gone": "ENOENT"}
    assert asked(mount, files) == {
        "moved": 3,
        "already": 0,
        "failed": {"gone": 1},
        "failed_errno": {"gone": "ENOENT"},
        "files": [
            {"ino": gone, **GONE, "failed": {"gone": 1}},
            {"ino": there, "moved": 3, "already": 0, "failed": {}, "failed_errno": {}},
        ],
    }
    assert mount.letters("there") == "PPP"
    # As many as were asked for, but no more than the image has: 16 MiB.
    for ranges, pages in (([[0, 2], [5, 1]], 3), ([[0, 1 << 60]], 4096)):
        told = asked(mount, [{"ino": gone, "ranges": ranges}])
        assert told["failed"] == {"gone": pages}
    assert mount.stats()["migration"]["fail_reasons"] == {"gone": 1 + 3 + 4096}
    assert mount.vmstat()["pgmigrate_fail"] == 4100


def test_names_that_go_while_the_tree_is_walked(
    mnt: LiveMount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = mnt / "walked"
    tree.mkdir()
    for name in ("a", "b", "c"):
        (tree / name).write_bytes(bytes(2 * PAGE))
    walk = named_files._names_below

    def walk_slowly(path: Path) -> Iterator[Path]:
        for at, each in enumerate(walk(path)):
            if at == 1:
                (tree / "b").unlink()
            yield each

    monkeypatch.setattr(named_files, "_names_below", walk_slowly)
    assert tried("-r", tree, "--json") == 1
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["moved"], outcome["failed"]) == (4, {"gone": 1})
    assert [each["file"] for each in outcome["files"]] == [
        str(tree / "b"),
        str(tree / "a"),
        str(tree / "c"),
    ]


def tried(*words: str | Path) -> int:
    """Run the verb in this process."""
    parser = argparse.ArgumentParser()
    migrate.configure(parser)
    return migrate.run(parser.parse_args([*map(str, words), "--to", "pagecache"]))


def test_one_mount_that_is_read_only_ends_all_before_anything_moves(live: Mounts) -> None:
    writable, other = live.mount(), live.mount()
    (writable / "file").write_bytes(bytes(PAGE))
    (other / "file").write_bytes(bytes(PAGE))
    other = live.remount(other, "ro")
    words = (writable / "file", other / "file", "--to", "pagecache", "--json")
    done = xipfs("migrate", *words, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{other.directory} is mounted read-only: no page" in done.stderr
    assert writable.letters("file") == "X"


def test_a_bind_mount_that_is_read_only(mnt: LiveMount, tmp_path: Path) -> None:
    (mnt / "bound").write_bytes(bytes(PAGE))
    for command in (
        ["mount", "--bind", str(mnt.directory), str(tmp_path)],
        ["mount", "-o", "remount,bind,ro", str(tmp_path)],
    ):
        subprocess.run(command, check=True)
    try:
        done = xipfs("migrate", tmp_path / "bound", "--to", "pagecache", check=False)
        assert f"{tmp_path} is mounted read-only: no page can change its kind" in done.stderr
        # By its own mount's path it can.
        assert xipfs("migrate", mnt / "bound", "--to", "pagecache").returncode == 0
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_was_moved_is_told_beside_the_error(
    live: Mounts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = live.mount(), live.mount()
    for mount in (first, second):
        (mount / "file").write_bytes(bytes(3 * PAGE))

    def dies(mount: Any, op: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        if mount.mountpoint == second.directory:
            raise MountError("the daemon died")
        return request(mount, op, **arguments)

    monkeypatch.setattr(migrate, "request", dies)
    with pytest.raises(MountError, match="the daemon died"):
        tried(first / "file", second / "file", "--json")
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["moved"], outcome["stopped"]) == (3, "the daemon died")
    assert [each["file"] for each in outcome["files"]] == [str(first / "file")]
    with pytest.raises(MountError):
        tried(first / "file", second / "file")
    said = "1 files: stopped; at least 0 pages moved to pagecache, 3 already there, 0 refused\n"
    assert capsys.readouterr().out == said


def test_an_interrupted_move_tells_how_far_it_came(
    mnt: LiveMount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (mnt / "large").write_bytes(bytes(PAGE))

    def interrupted(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"progress": {"pages_done": 512, "pages_total": 9000, "pages_moved": 500}}
        raise KeyboardInterrupt

    monkeypatch.setattr(migrate, "request", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried(mnt / "large")
    said = "stopped; at least 500 pages moved to pagecache, 0 already there, 0 refused\n"
    assert capsys.readouterr().out == f"{mnt / 'large'}: {said}"


def test_page_ranges_are_merged_and_any_number_of_them_is_moved(mnt: LiveMount) -> None:
    (mnt / "comb").write_bytes(bytes(10_000 * PAGE))
    outcome = mnt.migrate("comb", "pagecache", "0-2,0-2,1")
    assert (outcome["moved"], outcome["already"]) == (3, 0)
    pages = ",".join(map(str, range(1, 10_000, 2)))
    outcome = mnt.migrate("comb", "pagecache", pages)
    assert (outcome["moved"], outcome["already"]) == (4999, 1)
    # Also where only the last of them lies outside, nothing moves.
    pages = ",".join(map(str, range(4, 10_002, 2)))
    words = ("migrate", mnt / "comb", "--to", "pagecache", "--pages")
    done = xipfs(*words, pages, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{mnt / 'comb'}: pages 10000-10000 reach outside the file" in done.stderr
    assert mnt.letters("comb")[:6] == "PPPPXP"
    done = xipfs(*words, "0-99999999999999999999999", check=False)
    assert done.returncode == 2
    assert "lies beyond any file" in done.stderr


def test_a_request_that_is_too_long_says_so(mnt: LiveMount) -> None:
    with open(mnt / "ranges", "wb") as file:
        file.truncate(40_000 * PAGE)
    pages = ",".join(map(str, range(0, 40_000, 2)))
    words = ("migrate", mnt / "ranges", "--to", "pagecache", "--dry-run", "--pages", pages)
    done = xipfs(*words, check=False)
    assert done.returncode == 2
    assert "too long; expected less than 128 KiB" in done.stderr


def test_a_dry_run_is_one_object(live: Mounts) -> None:
    first, second = live.mount(), live.mount()
    (first / "file").write_bytes(bytes(2 * PAGE))
    (second / "file").write_bytes(bytes(5 * PAGE))
    (first / "empty").mkdir()
    words = ("--to", "pagecache", "--dry-run", "--json")
    answer = json.loads(xipfs("migrate", first / "file", second / "file", *words).stdout)
    assert (answer["would_move"], answer["already"], answer["failed"]) == (7, 0, {})
    told = [(each["mount"], each["would_move"]) for each in answer["mounts"]]
    assert told == [(str(first.directory), 2), (str(second.directory), 5)]
    answer = json.loads(xipfs("migrate", "-r", first / "empty", *words).stdout)
    assert answer == {
        "dry_run": True,
        "to": "pagecache",
        "would_move": 0,
        "already": 0,
        "failed": {},
        "failed_errno": {},
        "mounts": [],
    }
