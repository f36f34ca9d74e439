"""An image file: locked, remounted, recovered; what is there after each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from imagecheck import check

from xipfs.clock import ManualClock
from xipfs.errors import ImageBusyError, ImageError, UsageError
from xipfs.fs.build import make_empty
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

ROOT = 1
PAGE = 4096
RAM = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    make_empty(path, size_bytes=4 << 20, label="a label", pagecache=False, clock=ManualClock())
    return path


def mount(image: Path, *, read_only: bool = False) -> Filesystem:
    return Filesystem.open(image, ram_bytes=RAM, read_only=read_only, clock=ManualClock())


def test_an_empty_image(image: Path) -> None:
    assert image.stat().st_size == 4 << 20
    # Both ends were written; what never was costs the host nothing.
    assert image.stat().st_blocks * 512 <= 2 * (64 << 10)
    fs = mount(image)
    assert fs.label == "a label"
    assert list(fs.readdir(ROOT, 0)) == []
    root = fs.getattr(ROOT)
    assert (root.mode, root.nlink) == (0o040755, 2)
    fs.close()
    check(image.read_bytes())


def test_bytes_and_kinds_survive_a_remount(image: Path) -> None:
    fs = mount(image)
    ino = fs.mknod(ROOT, b"file", 0o100640, 0, 1, 2).ino
    fs.write(ino, 0, b"a" * PAGE + b"b" * PAGE + b"c" * 100)
    fs.promote(ino, 1)
    fs.write(ino, PAGE, b"B" * 10)
    fs.setxattr(ino, b"user.k", b"v")
    attr = fs.getattr(ino)
    fs.close()
    for read_only in (True, False):
        fs = mount(image, read_only=read_only)
        assert fs.lookup(ROOT, b"file") == attr
        assert bytes(fs.read(ino, 0, 1 << 20)) == (
            b"a" * PAGE + b"B" * 10 + b"b" * (PAGE - 10) + b"c" * 100
        )
        kinds = [fs.page(ino, i).kind for i in range(3)]
        assert kinds == [PageKind.XIP, PageKind.PAGECACHE, PageKind.XIP]
        assert fs.getxattr(ino, b"user.k") == b"v"
        fs.close()
    check(image.read_bytes())


def test_what_a_crash_leaves(image: Path) -> None:
    """Names, XIP bytes and what was synced are there; what only a frame held is not."""
    fs = mount(image)
    xip = fs.mknod(ROOT, b"xip", 0o100644, 0, 0, 0).ino
    fs.write(xip, 0, b"in place")
    cached = fs.mknod(ROOT, b"cached", 0o100644, 0, 0, 0).ino
    fs.set_default_kind(cached, PageKind.PAGECACHE)
    fs.write(cached, 0, b"synced")
    fs.fsync(cached)
    fs.write(cached, 0, b"LOST")
    orphan = fs.mknod(ROOT, b"orphan", 0o100644, 0, 0, 0).ino
    fs.write(orphan, 0, bytes(100 * PAGE))
    fs.hold(orphan)
    fs.unlink(ROOT, b"orphan")
    free = fs.statfs().blocks_free
    fs.abandon()
    before = image.read_bytes()
    fs = mount(image, read_only=True)
    assert bytes(fs.read(cached, 0, 10)) == b"synced"
    fs.close()
    assert image.read_bytes() == before
    fs = mount(image)
    assert bytes(fs.read(xip, 0, 10)) == b"in place"
    assert sorted(name for name, _, _ in fs.readdir(ROOT, 0)) == [b"cached", b"xip"]
    assert fs.statfs().blocks_free == free + 101  # the orphan's pages and its map's node
    fs.close()
    check(image.read_bytes())


def test_orphans_that_are_still_held_end_with_the_mount(image: Path) -> None:
    fs = mount(image)
    ino = fs.mknod(ROOT, b"a", 0o100644, 0, 0, 0).ino
    fs.hold(ino)
    fs.unlink(ROOT, b"a")
    fs.close()
    assert list(check(image.read_bytes())) == [ROOT]


HOLDER = """
import sys
from pathlib import Path
from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem
fs = Filesystem.open(Path(sys.argv[1]), ram_bytes=4096, read_only=sys.argv[2] == "ro",
                     clock=SystemClock())
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("held", "wanted", "refused"),
    [("rw", "rw", True), ("rw", "ro", True), ("ro", "rw", True), ("ro", "ro", False)],
)
def test_the_lock_is_refused_with_the_holder_s_pid(
    image: Path, held: str, wanted: str, refused: bool
) -> None:
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(image), held],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        try:
            if refused:
                with pytest.raises(
                    ImageBusyError, match=rf"in use by the process with pid {holder.pid};"
                ):
                    mount(image, read_only=wanted == "ro")
            else:
                mount(image, read_only=True).close()
        finally:
            holder.kill()
    # The kernel drops a killed process's lock.
    mount(image).close()


def test_a_failed_open_leaves_no_lock(image: Path) -> None:
    image.write_bytes(bytes(1 << 20))
    for _ in range(2):
        with pytest.raises(ImageError, match="is not a usable xipfs image"):
            mount(image)


def test_a_size_or_ram_that_is_none(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RAM of 0 pages"):
        Filesystem.open(image, ram_bytes=4095, clock=ManualClock())
    mount(image).close()
    with pytest.raises(UsageError, match="an image of 100 bytes is not possible"):
        make_empty(tmp_path / "x", size_bytes=100, label="", pagecache=False, clock=ManualClock())
    assert not (tmp_path / "x").exists()


def test_closing_twice_is_closing_once(image: Path) -> None:
    fs = mount(image)
    fs.close()
    fs.close()
    fs.abandon()
    mount(image).close()
