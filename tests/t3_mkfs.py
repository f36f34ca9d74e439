"""mkfs: a real tree copied and compared entry by entry; refusals; nothing left after a failure."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from imagecheck import check

from xipfs.clock import ManualClock, SystemClock
from xipfs.errors import ImageBusyError, ImageError, UsageError, XipfsError
from xipfs.fs import build
from xipfs.fs import tree as tree_module
from xipfs.fs.build import Build, Made, replace_image
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.tree import scan
from xipfs.fs.types import PageKind

PAGE = 4096
SOURCE = Path(__file__).resolve().parents[1]


def mkfs(image: Path, tree: Path | None = None, *, size: int = 8 << 20, **more: bool) -> Made:
    wanted = Build(size_bytes=size, label="L", **more)
    scanned = None if tree is None else scan(tree)
    return replace_image(image, wanted, scanned, SystemClock(), lambda _size: None)


def mount(image: Path) -> Filesystem:
    return Filesystem.open(image, ram_bytes=1 << 20, read_only=True, clock=ManualClock())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything."""
    top = tmp_path / "tree"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty-dir").mkdir(mode=0o700)
    (top / "file").write_bytes(os.urandom(3 * PAGE + 17))
    (top / "empty").touch()
    (top / "program").write_bytes(b"#!/bin/sh\n")
    (top / "program").chmod(0o4755)
    os.link(top / "file", top / "sub" / "hard")
    os.link(top / "file", top / "sub" / "deep" / "hard2")
    (top / "link").symlink_to("sub/deep")
    (top / "dangling").symlink_to("/no/such/place")
    with (top / "sparse").open("wb") as file:
        os.pwrite(file.fileno(), b"start", 0)
        os.pwrite(file.fileno(), b"far", 3 << 20)
        os.pwrite(file.fileno(), b"farther", 5 << 30)
        file.truncate((6 << 30) + 1)
    os.mkfifo(top / "fifo", 0o620)
    if os.geteuid() == 0:
        os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.chown(top / "file", 1234, 5678)
        os.chown(top / "link", 11, 22, follow_symlinks=False)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(top)
        server.bind("socket")
        os.chdir(here)
    (top / ("n" * 255)).write_bytes(b"long name")
    for name, value in ((b"user.one", b"1"), (b"user.two", bytes(range(256)))):
        os.setxattr(top / "file", name, value)
        os.setxattr(top / "sub", name, value)
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        times = (10**18 + number, 10**17 + 1000 * number + 1)
        os.utime(path, ns=times, follow_symlinks=False)
    os.utime(top, ns=(5, -7 * 10**9))
    return top


def same(fs: Filesystem, ino: int, path: Path) -> None:
    """Compare one entry with the original; directories with all that is in them."""
    want, attr = path.lstat(), fs.getattr(ino)
    facts = (want.st_mode, want.st_uid, want.st_gid, want.st_mtime_ns)
    assert (attr.mode, attr.uid, attr.gid, attr.mtime_ns) == facts, path
    assert attr.rdev == want.st_rdev, path
    names = os.listxattr(path, follow_symlinks=False)
    assert sorted(fs.listxattr(ino)) == sorted(map(os.fsencode, names)), path
    for name in names:
        assert fs.getxattr(ino, os.fsencode(name)) == os.getxattr(path, name, follow_symlinks=False)
    if stat.S_ISDIR(want.st_mode):
        entries = {name: entry.ino for name, entry, _ in fs.readdir(ino, 0)}
        assert set(entries) == {os.fsencode(child.name) for child in path.iterdir()}
        for child in path.iterdir():
            same(fs, entries[os.fsencode(child.name)], child)
        return
    assert (attr.nlink, attr.size_bytes) == (want.st_nlink, want.st_size), path
    if stat.S_ISLNK(want.st_mode):
        assert fs.readlink(ino) == os.fsencode(os.readlink(path))
    if stat.S_ISREG(want.st_mode):
        assert attr.blocks_512 <= want.st_blocks + 8 * 10, f"{path} lost its holes"
        with path.open("rb") as file:
            at = 0
            while at < want.st_size:
                size = min(1 << 20, want.st_size - at)
                assert bytes(fs.read(ino, at, size)) == os.pread(file.fileno(), size, at)
                # The sparse file has data far out; between, every 512 MiB will do.
                at += size if at < 8 << 20 else (1 << 29) - at % (1 << 29)


@pytest.mark.parametrize("pagecache", [False, True])
def test_a_tree_is_copied_entry_by_entry(tmp_path: Path, tree: Path, pagecache: bool) -> None:
    image = tmp_path / "image"
    made = mkfs(image, tree, pagecache=pagecache)
    copied = made.copied
    assert (copied.files, copied.directories, copied.symlinks) == (5, 3, 2)
    assert copied.hard_links == 2
    assert copied.special_files == (3 if os.geteuid() == 0 else 2)
    assert copied.skipped_xattrs == 0
    fs = mount(image)
    same(fs, 1, tree)
    file = fs.lookup(1, b"file").ino
    sub = fs.lookup(1, b"sub").ino
    assert fs.lookup(sub, b"hard").ino == fs.lookup(fs.lookup(sub, b"deep").ino, b"hard2").ino
    assert fs.lookup(sub, b"hard").ino == file
    kind = PageKind.PAGECACHE if pagecache else PageKind.XIP
    assert [run.kind for run in fs.runs(file)] == [kind]
    sparse = fs.lookup(1, b"sparse").ino
    holes = [(run.first, run.count) for run in fs.runs(sparse) if run.kind is PageKind.HOLE]
    assert holes[0] == (1, (3 << 20) // PAGE - 1)
    assert fs.statfs().blocks_free * PAGE == made.free_bytes
    fs.close()
    check(image.read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "tree"]


def test_a_root_named_by_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("text")
    (tmp_path / "alias").symlink_to("real")
    assert mkfs(tmp_path / "image", tmp_path / "alias").copied.files == 1


def test_a_contiguous_file_is_one_run_of_blocks(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(os.urandom(3 << 20))
    mkfs(tmp_path / "image", tmp_path / "tree")
    fs = mount(tmp_path / "image")
    ino = fs.lookup(1, b"big").ino
    pfns = [fs.page(ino, index).pfn for index in range(768)]
    breaks = sum(b != (a or 0) + 1 for a, b in pairwise(pfns))
    assert breaks <= 6  # one at most for each transaction of 128 pages
    fs.close()


def test_a_tree_that_does_not_fit_says_by_how_much_before_writing(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(bytes(1 << 20))
    with pytest.raises(ImageError) as caught:
        mkfs(tmp_path / "image", tmp_path / "tree", size=1 << 20)
    # 1 MiB has 256 blocks: 11 before the data, one superblock behind it, one for the root's inode.
    # The file needs 256 pages, a node of the map, a block of inodes.
    assert str(caught.value) == (
        "the tree needs at least 1.008 MiB and the image has room for 972 KiB: 60 KiB short;"
        " give a larger --size"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]


def test_the_estimate_is_close(tmp_path: Path) -> None:
    """A tree is refused beforehand or fits: the estimate is less than 2 % short."""
    # A copy: Python and numba write into the package's own directories meanwhile.
    tree = shutil.copytree(
        SOURCE / "xipfs", tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__")
    )
    mkfs(tmp_path / "image", tree, size=16 << 20)
    fs = mount(tmp_path / "image")
    used = fs.statfs().blocks_total - fs.statfs().blocks_free
    fs.close()
    needed = scan(tree).needed_blocks
    assert needed <= used <= needed * 1.02 + 8


@pytest.mark.parametrize("where", ["root", "below"])
def test_the_control_directory_s_name_is_reserved_at_the_root(tmp_path: Path, where: str) -> None:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "sub" / ".xipfs").touch()
    if where == "root":
        (top / ".xipfs").mkdir()
        with pytest.raises(UsageError, match=r"has an entry \.xipfs, the control directory's name"):
            mkfs(tmp_path / "image", top)
        assert not (tmp_path / "image").exists()
    else:
        assert mkfs(tmp_path / "image", top).copied.files == 1


def test_an_image_in_use_is_not_replaced(tmp_path: Path) -> None:
    image = tmp_path / "image"
    mkfs(image)
    before = image.read_bytes()
    fs = mount(image)
    with pytest.raises(ImageBusyError, match=f"pid {os.getpid()}"):
        mkfs(image)
    fs.close()
    assert image.read_bytes() == before
    with pytest.raises(UsageError, match="is not a regular file"):
        mkfs(tmp_path)


def test_a_failure_on_the_way_leaves_the_old_image(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    mkfs(image)
    before = image.read_bytes()

    def fail(*_arguments: object, **_named: object) -> None:
        raise KeyboardInterrupt

    for place, name in (
        (tree_module.Copy, "_copy_data"),
        (build, "check_fits"),
        (build, "make_empty"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(KeyboardInterrupt):
                mkfs(image, tree)
        assert image.read_bytes() == before, name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "tree"]
    mount(image).close()


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "xipfs", "mkfs", *map(str, words)]


def test_the_command_refuses_and_says_why(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"precious")

    def error_of(*words: str | Path) -> tuple[int, str]:
        done = subprocess.run(
            command(*words), cwd=SOURCE, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    assert error_of(image) == (2, f"xipfs mkfs: {image} exists; use -f to replace it\n")
    assert error_of(tmp_path / "no" / "x")[0] == 2
    code, text = error_of(tmp_path / "x", "--size", "100")
    assert code == 2
    assert text.startswith("xipfs mkfs: an image of 100 bytes is not possible; expected")
    assert error_of(tmp_path / "x", "--root-dir", tmp_path / "no") == (
        2,
        f"xipfs mkfs: {tmp_path / 'no'} is not a directory; expected the tree to copy\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert image.read_bytes() == b"precious"
    subprocess.run(command(image, "-f", "--size", "1M"), cwd=SOURCE, timeout=60, check=True)
    assert image.stat().st_size == 1 << 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(tmp_path: Path, number: int) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    for name in range(40):
        (top / str(name)).write_bytes(os.urandom(4 << 20))
    image = tmp_path / "image"
    with subprocess.Popen(
        command(image, "--root-dir", top, "--size", "256M"),
        cwd=SOURCE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob(".image.*.new")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "xipfs mkfs: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_an_unreadable_tree_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "tree"
    (top / "closed").mkdir(parents=True)

    def listdir(path: bytes) -> list[bytes]:
        if path.endswith(b"closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return [b"closed"]

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(XipfsError, match="closed cannot be read: Permission denied"):
        scan(top)
