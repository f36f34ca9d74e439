"""What a metadata operation writes depends neither on the image's size nor on the directory's.

Counted are the lines flushed: the journal's and those at home. An operation that finds room in its
leaf and its map writes a few; one that splits a leaf or makes a node of the map writes new blocks
whole, and how many of these there can be is what may grow with the logarithm of the directory.
"""

from __future__ import annotations

import functools
import math
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from xipfs.clock import ManualClock
from xipfs.fs.build import make_empty
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

ROOT = 1
REG = stat.S_IFREG | 0o644
PAGE = 4096
RENAME_EXCHANGE = 2
#: Lines of an operation that needs no new block and frees none.
FEW_LINES = 32
#: Lines of one block made: zeroed, in the journal with its header, at home.
LINES_PER_NEW_BLOCK = 64 + 66 + 64
#: What needs a block: the first attribute, a target, a page, a directory's first name.
WRITES_BLOCKS = {"first name", "setxattr", "symlink", "write"}


def new_filesystem(directory: Path, size_bytes: int) -> Filesystem:
    """Make and open an image file; sparse, so its size costs nothing."""
    image = directory / f"{size_bytes}.img"
    clock = ManualClock()
    make_empty(image, size_bytes=size_bytes, label="", pagecache=False, clock=clock)
    return Filesystem.open(image, ram_bytes=1 << 20, clock=clock)


def operations(fs: Filesystem, at: int) -> dict[str, Callable[[], object]]:
    """Return the operations, to be done in this order, in directory ``at`` and in new ones."""
    file = fs.mknod(at, b"file", REG, 0, 0, 0).ino
    other = fs.mkdir(ROOT, b"other", 0o755, 0, 0).ino
    fs.hold(file)
    return {
        "create": lambda: fs.mknod(at, b"new", REG, 0, 0, 0),
        "fifo": lambda: fs.mknod(at, b"fifo", stat.S_IFIFO | 0o600, 0, 0, 0),
        "mkdir": lambda: fs.mkdir(at, b"sub", 0o755, 0, 0),
        "symlink": lambda: fs.symlink(at, b"soft", b"target", 0, 0),
        "link": lambda: fs.link(file, at, b"link"),
        "first name": lambda: fs.link(file, other, b"link"),
        "chmod": lambda: fs.setattr(file, mode=0o600),
        "chown": lambda: fs.setattr(file, uid=7, gid=8),
        "utimens": lambda: fs.setattr(file, atime_ns=-1, mtime_ns=1 << 33),
        "setxattr": lambda: fs.setxattr(file, b"user.a", b"1"),
        "setxattr again": lambda: fs.setxattr(file, b"user.a", b"2"),
        "removexattr": lambda: fs.removexattr(file, b"user.a"),
        "kind of new pages": lambda: fs.set_default_kind(file, PageKind.PAGECACHE),
        "kind and back": lambda: fs.set_default_kind(file, PageKind.XIP),
        "write": lambda: fs.write(file, 0, b"data"),
        "promote": lambda: fs.promote(file, 0),
        "demote": lambda: fs.demote(file, 0),
        "truncate up": lambda: fs.setattr(file, size_bytes=1 << 40),
        "truncate down": lambda: fs.setattr(file, size_bytes=0),
        "rename": lambda: fs.rename(at, b"new", at, b"newer"),
        "rename over": lambda: fs.rename(at, b"newer", at, b"fifo"),
        "rename away": lambda: fs.rename(at, b"sub", other, b"sub"),
        "exchange": lambda: fs.rename(at, b"file", other, b"sub", RENAME_EXCHANGE),
        "unlink a name": lambda: fs.unlink(at, b"link"),
        "unlink a symlink": lambda: fs.unlink(at, b"soft"),
        "rmdir": lambda: fs.rmdir(at, b"file"),
        "unlink another": lambda: fs.unlink(other, b"link"),
        "unlink the last": lambda: fs.unlink(other, b"sub"),
        "last close": lambda: fs.drop(file),
    }


def flushed_by(fs: Filesystem, operation: Callable[[], object]) -> int:
    before = fs.medium.statistics().flushed_lines
    operation()
    return fs.medium.statistics().flushed_lines - before


def lines_of_operations(directory: Path, size_bytes: int, names: int) -> dict[str, int]:
    """Return the lines that each operation flushes, in a directory of so many names."""
    fs = new_filesystem(directory, size_bytes)
    at = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    for number in range(names):
        fs.mknod(at, b"n%06d" % number, REG, 0, 0, 0)
    lines = {what: flushed_by(fs, each) for what, each in operations(fs, at).items()}
    fs.close()
    return lines


def test_lines_do_not_depend_on_the_images_size(tmp_path: Path) -> None:
    small = lines_of_operations(tmp_path, 1 << 20, 5)
    assert lines_of_operations(tmp_path, 64 << 20, 5) == small
    assert lines_of_operations(tmp_path, 64 << 30, 5) == small


@pytest.mark.parametrize("names", [5, 100, 3000])
def test_lines_are_bounded_in_a_directory_of_any_size(tmp_path: Path, names: int) -> None:
    lines = lines_of_operations(tmp_path, 16 << 20, names)
    print(names, lines)
    for what, count in lines.items():
        assert count <= FEW_LINES + (LINES_PER_NEW_BLOCK if what in WRITES_BLOCKS else 0), what


def test_the_worst_name_of_a_directory_costs_its_logarithm_at_most(tmp_path: Path) -> None:
    """Each name of 6,000 made and removed: splits, merges and the map's nodes included."""
    fs = new_filesystem(tmp_path, 64 << 20)
    at = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    names = [b"n%06d" % number for number in range(6000)]
    worst = 0
    for count, name in enumerate(names, 2):
        lines = flushed_by(fs, functools.partial(fs.mknod, at, name, REG, 0, 0, 0))
        worst = max(worst, lines)
        # Two halves of a leaf, a node for each on a path of the map, a block of inodes.
        assert lines <= FEW_LINES + LINES_PER_NEW_BLOCK * (2 + math.log2(count) / 3), count
    print("made:", worst)
    for count, name in enumerate(names):
        lines = flushed_by(fs, functools.partial(fs.unlink, at, name))
        assert lines <= 2 * FEW_LINES + 16 * math.log2(len(names) - count + 1), count
    assert fs.getattr(at).blocks_512 == 0
    fs.close()
