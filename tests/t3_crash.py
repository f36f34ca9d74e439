"""Every power cut of every operation, and of a seeded part of all pairs, recovered and judged."""

from __future__ import annotations

import os
import random
import sys

import pytest
from explorer import Explorer, Operation, Watched
from media import new_medium, open_medium

from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

ROOT = 1
REG = 0o100644
PAGE = 4096
#: CRASH_SEED=N python -m pytest tests/t3_crash.py draws other pairs.
SEED = int(os.environ.get("CRASH_SEED", "1"))


def prepare() -> bytes:
    medium = new_medium(64)
    fs = open_medium(medium)
    a = fs.mknod(ROOT, b"a", REG, 0, 0, 0).ino
    fs.write(a, 0, b"a" * (PAGE + 100))
    b = fs.mknod(ROOT, b"b", REG, 0, 0, 0).ino
    fs.set_default_kind(b, PageKind.PAGECACHE)
    fs.write(b, 0, b"b" * PAGE)
    fs.setxattr(a, b"user.old", b"1")
    d = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    fs.mkdir(d, b"empty", 0o755, 0, 0)
    fs.mknod(d, b"e", REG, 0, 0, 0)
    fs.symlink(ROOT, b"s", b"a", 0, 0)
    fs.close()
    return bytes(medium.durable)


def ino(fs: Filesystem, *path: bytes) -> int:
    at = ROOT
    for name in path:
        at = fs.lookup(at, name).ino
    return at


def write_and_fsync(fs: Filesystem) -> None:
    fs.write(ino(fs, b"b"), 124, b"x" * 13)
    fs.fsync(ino(fs, b"b"))


OPERATIONS: dict[str, Operation] = {
    "create": lambda fs: fs.mknod(ROOT, b"new", REG, 0, 0, 0),
    "create below": lambda fs: fs.mknod(ino(fs, b"d", b"empty"), b"new", REG, 0, 0, 0),
    "mkdir": lambda fs: fs.mkdir(ROOT, b"new", 0o700, 0, 0),
    "link": lambda fs: fs.link(ino(fs, b"a"), ino(fs, b"d"), b"hard"),
    "symlink": lambda fs: fs.symlink(ROOT, b"new", b"to/b", 0, 0),
    "unlink a": lambda fs: fs.unlink(ROOT, b"a"),
    "unlink b": lambda fs: fs.unlink(ROOT, b"b"),
    "rmdir": lambda fs: fs.rmdir(ino(fs, b"d"), b"empty"),
    "rename": lambda fs: fs.rename(ROOT, b"a", ino(fs, b"d"), b"moved"),
    "rename over": lambda fs: fs.rename(ROOT, b"a", ROOT, b"b"),
    "exchange": lambda fs: fs.rename(ROOT, b"d", ROOT, b"a", 2),
    "truncate to 9": lambda fs: fs.setattr(ino(fs, b"a"), size_bytes=9),
    "truncate b to 9": lambda fs: fs.setattr(ino(fs, b"b"), size_bytes=9),
    "extend": lambda fs: fs.setattr(ino(fs, b"a"), size_bytes=3 * PAGE),
    "write aligned": lambda fs: fs.write(ino(fs, b"a"), 64, b"n" * 16),
    "write unaligned": lambda fs: fs.write(ino(fs, b"a"), 60, b"u" * 13),
    "append": lambda fs: fs.write(ino(fs, b"a"), PAGE + 100, b"p" * 30),
    "append a page": lambda fs: fs.write(ino(fs, b"e"), 0, b"e" * PAGE),
    "write to b": lambda fs: fs.write(ino(fs, b"b"), 120, b"m" * 16),
    "write to b and fsync": write_and_fsync,
    "setxattr": lambda fs: fs.setxattr(ino(fs, b"a"), b"user.new", b"2" * 70),
    "first setxattr": lambda fs: fs.setxattr(ino(fs, b"d"), b"user.new", b"2"),
    "removexattr": lambda fs: fs.removexattr(ino(fs, b"a"), b"user.old"),
    "promote": lambda fs: fs.promote(ino(fs, b"a"), 0),
    "demote": lambda fs: fs.demote(ino(fs, b"b"), 0),
}
BASE = prepare()


def judged(names: list[str], *, fsync_between: bool = False) -> Explorer:
    explorer = Explorer(BASE)
    explorer.explore(" + ".join(names), [OPERATIONS[name] for name in names], fsync_between)
    return explorer


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_cut_of_one_operation(name: str) -> None:
    explorer = judged([name])
    assert explorer.violations == []
    assert explorer.exhaustive_points == explorer.points >= 4
    assert explorer.states > explorer.points


def test_every_cut_of_a_pair() -> None:
    chance = random.Random(SEED)
    for _ in range(12):
        names = chance.choices(list(OPERATIONS), k=2)
        explorer = judged(names, fsync_between=chance.random() < 0.5)
        assert explorer.violations == [], f"CRASH_SEED={SEED}: {names}"
        assert explorer.exhaustive_points == explorer.points, names


@pytest.mark.parametrize("call", ["flush", "fence"])
@pytest.mark.parametrize("function", ["commit", "_apply", "_clear"])
def test_a_journal_without_its_flushes_or_fences_is_caught(
    monkeypatch: pytest.MonkeyPatch, function: str, call: str
) -> None:
    original = getattr(Watched, call)

    def left_out(medium: Watched, *range_: int) -> None:
        if sys._getframe(1).f_code.co_name != function:
            original(medium, *range_)

    monkeypatch.setattr(Watched, call, left_out)
    found = [judged(["create", "setxattr"]).violations, judged(["create"]).violations]
    assert any(found)
