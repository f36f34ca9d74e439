"""What POSIX and Linux promise of names, modes, owners, times and sizes, call by call, on a mount.

Root and other users act: a child process takes on a user's identity for each call, on a mount that
lets others in. What a call must do is written out from the manual pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import pickle
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from acting import libc
from conftest import needs
from live import PAGE, LiveMount, Mounts

pytestmark = [needs("root", "fuse")]

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
ALICE, BOB = 65533, 65534
FORMAT_LIMIT = 1 << 48


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    mount = shared.mount(shared.image(size_bytes=64 << 20), "allow_other")
    for path in (mount.directory.parent, *mount.directory.parent.parents[:2]):
        os.chmod(path, os.stat(path).st_mode | 0o055)
    os.chmod(mount.directory, 0o755)
    return mount


@pytest.fixture
def at(mnt: LiveMount, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of the test's own, open to all; the working directory meanwhile."""
    directory = mnt / f"{abs(hash(request.node.name)):x}"
    directory.mkdir()
    os.chmod(directory, 0o777)
    before, mask = os.getcwd(), os.umask(0o022)
    os.chdir(directory)
    yield directory
    os.umask(mask)
    os.chdir(before)


def result_of(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Return what the call returns, or the name of the errno that it fails with."""
    try:
        return call(*arguments, **more)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def as_user(uid: int, call: Callable[..., Any], *arguments: Any, gid: int = 0, **more: Any) -> Any:
    """Do the same as ``result_of`` as another user of groups ``gid`` (default: the uid's own)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid or uid)
            os.setuid(uid)
            os.write(write_end, pickle.dumps(result_of(call, *arguments, **more)))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(answer)


def renameat2(old: str, new: str, flags: int) -> None:
    if LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def touch(name: str, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    os.chown(name, uid, gid)
    os.chmod(name, mode)


def mode_of(name: str) -> int:
    return stat.S_IMODE(os.lstat(name).st_mode)


@dataclass(frozen=True)
class Times:
    """The three times of a file, to tell which of them an operation moved."""

    atime: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, name: str) -> Times:
        status = os.lstat(name)
        return cls(status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)


@contextlib.contextmanager
def moves(**wanted: str) -> Iterator[None]:
    """Check which times move inside: file name (``_`` for ``.``) = letters of "amc"."""
    names = {name: "." if name == "_" else name for name in wanted}
    before = {name: Times.of(path) for name, path in names.items()}
    time.sleep(0.002)
    yield
    for name, path in names.items():
        after = Times.of(path)
        moved = "".join(
            letter
            for letter, field in (("a", "atime"), ("m", "mtime"), ("c", "ctime"))
            if getattr(after, field) != getattr(before[name], field)
        )
        assert moved == wanted[name], (name, before[name], after)


def make_all_types() -> dict[str, str]:
    """Make one entry of each type; returns type: name."""
    touch("file")
    os.mkdir("dir")
    os.symlink("nowhere", "symlink")
    os.mkfifo("fifo")
    os.mknod("char", stat.S_IFCHR | 0o644, os.makedev(1, 3))
    os.mknod("block", stat.S_IFBLK | 0o644, os.makedev(7, 250))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    return {name: name for name in ("file", "dir", "symlink", "fifo", "char", "block", "socket")}


# Making and removing


def test_every_type_is_made_with_its_mode_owner_and_times(at: Path) -> None:
    os.umask(0o027)
    makers: dict[str, Callable[[str], None]] = {
        "file": lambda name: os.close(os.open(name, os.O_CREAT, 0o666)),
        "dir": lambda name: os.mkdir(name, 0o777),
        "fifo": lambda name: os.mkfifo(name, 0o666),
        "symlink": lambda name: os.symlink("x", name),
    }
    masked = {"file": 0o640, "dir": 0o750, "fifo": 0o640, "symlink": 0o777}
    for kind, make in makers.items():
        with moves(_="mc"):
            assert as_user(ALICE, make, kind) is None
        status = os.lstat(kind)
        assert (status.st_uid, status.st_gid) == (ALICE, ALICE)
        assert stat.S_IMODE(status.st_mode) == masked[kind]
        assert status.st_atime_ns == status.st_mtime_ns == status.st_ctime_ns
        assert status.st_ctime_ns == os.stat(".").st_ctime_ns
    assert as_user(ALICE, os.mknod, "device", stat.S_IFCHR, os.makedev(1, 3)) == "EPERM"
    os.mknod("device", stat.S_IFBLK | 0o600, os.makedev(259, 1 << 19))
    assert os.stat("device").st_rdev == os.makedev(259, 1 << 19)


def test_what_is_there_already_is_not_made_again(at: Path) -> None:
    touch("source")
    for name in make_all_types().values():
        assert result_of(os.mkdir, name) == "EEXIST"
        assert result_of(os.mkfifo, name) == "EEXIST"
        assert result_of(os.symlink, "x", name) == "EEXIST"
        assert result_of(os.link, "source", name) == "EEXIST"
        assert result_of(os.open, name, os.O_CREAT | os.O_EXCL) == "EEXIST"
        assert result_of(renameat2, "source", name, NOREPLACE) == "EEXIST"
    assert os.stat("source").st_nlink == 1


def test_unlink_and_rmdir_by_type_and_what_they_move(at: Path) -> None:
    names = make_all_types()
    assert result_of(os.rmdir, "file") == "ENOTDIR"
    assert result_of(os.unlink, "dir") == "EISDIR"
    os.link("file", "file2")
    with moves(_="mc", file2="c"):
        os.unlink("file")
    assert os.stat("file2").st_nlink == 1
    for name in set(names) - {"file", "dir"}:
        with moves(_="mc"):
            os.unlink(name)
        assert result_of(os.lstat, name) == "ENOENT"
    os.mkdir("dir/sub")
    assert result_of(os.rmdir, "dir") == "ENOTEMPTY"
    assert result_of(os.rmdir, "dir/.") == "EINVAL"
    assert result_of(os.rmdir, "dir/sub/..") == "ENOTEMPTY"
    os.rmdir("dir/sub")
    with moves(_="mc"):
        os.rmdir("dir")
    assert result_of(os.unlink, "file2/x") == "ENOTDIR"
    assert result_of(os.unlink, "dir/x") == "ENOENT"


def test_a_removed_directory_that_is_still_used(at: Path) -> None:
    os.mkdir("gone")
    descriptor = os.open("gone", os.O_RDONLY)
    os.rmdir("gone")
    assert os.fstat(descriptor).st_nlink == 0
    assert os.listdir(descriptor) == []
    assert result_of(os.mkdir, "x", dir_fd=descriptor) == "ENOENT"
    assert result_of(os.open, "x", os.O_CREAT, dir_fd=descriptor) == "ENOENT"
    os.fsync(descriptor)
    os.close(descriptor)


def test_link_counts_of_directories(at: Path) -> None:
    assert os.stat(".").st_nlink == 2
    os.mkdir("a")
    os.mkdir("b")
    os.mkdir("a/sub")
    assert [os.stat(name).st_nlink for name in (".", "a", "b", "a/sub")] == [4, 3, 2, 2]
    os.rename("a/sub", "b/sub")
    assert [os.stat(name).st_nlink for name in (".", "a", "b", "b/sub")] == [4, 2, 3, 2]
    os.mkdir("a/sub")
    os.rename("b/sub", "a/sub")
    assert [os.stat(name).st_nlink for name in (".", "a", "b", "a/sub")] == [4, 3, 2, 2]
    touch("b/file")
    renameat2("a/sub", "b/file", EXCHANGE)
    assert [os.stat(name).st_nlink for name in (".", "a", "b", "b/file")] == [4, 2, 3, 2]
    os.rename("b", "c")
    assert os.stat(".").st_nlink == 4
    assert os.stat("c/file/..").st_ino == os.stat("c").st_ino


def test_hard_links(at: Path) -> None:
    for name in set(make_all_types()) - {"dir"}:
        with moves(**{"_": "mc", name: "c"}):
            os.link(name, f"{name}-2", follow_symlinks=False)
        assert os.lstat(name).st_ino == os.lstat(f"{name}-2").st_ino
        assert os.lstat(name).st_nlink == 2
    assert result_of(os.link, "dir", "dir-2") == "EPERM"
    assert result_of(os.link, "absent", "x") == "ENOENT"
    assert result_of(os.link, "file", "dir/absent/x") == "ENOENT"
    assert result_of(os.link, "file", "file/x") == "ENOTDIR"


# Names and paths


def test_the_longest_names_and_paths(at: Path) -> None:
    longest = "n" * 255
    os.mkdir(longest)
    touch(f"{longest}/{longest}")
    too_long = "n" * 256
    for call in (os.stat, os.mkdir, os.mkfifo, os.unlink, os.rmdir, os.readlink, os.listdir):
        assert result_of(call, too_long) == "ENAMETOOLONG", call
    touch("file")
    for make in (os.rename, os.link, os.symlink):
        assert result_of(make, "file", too_long) == "ENAMETOOLONG", make
    assert result_of(os.rename, too_long, "x") == "ENAMETOOLONG"
    # PATH_MAX counts the final NUL: 4095 bytes are a path, 4096 are not.
    part = "/".join(["p" * 199] * 4)
    deep = "./" + "/".join([part] * 5)
    os.makedirs(deep)
    path = deep + "/" + "x" * (4095 - len(deep) - 1)
    assert len(path) == 4095
    touch(path)
    assert result_of(os.stat, path + "x") == "ENAMETOOLONG"
    os.unlink(path)
    assert result_of(os.stat, "x/" * 2048) == "ENAMETOOLONG"
    assert result_of(os.stat, "./" * 2047 + "f") == "ENOENT"


@pytest.mark.parametrize("size", [1, 255, 4095])
def test_a_symbolic_link_of_any_length(at: Path, size: int) -> None:
    target = ("t" * 199 + "/") * 21
    os.symlink(target[:size], "link")
    assert os.readlink("link") == target[:size]
    assert os.lstat("link").st_size == size
    assert result_of(os.symlink, "t" * 4096, "other") == "ENAMETOOLONG"
    assert result_of(os.symlink, "", "other") == "ENOENT"


def test_loops_of_symbolic_links(at: Path) -> None:
    os.symlink("b", "a")
    os.symlink("a", "b")
    for call in (os.stat, os.listdir, os.chdir):
        assert result_of(call, "a") == "ELOOP"
    assert result_of(os.open, "a", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
    assert result_of(os.chmod, "a/x", 0o600) == "ELOOP"
    assert result_of(os.truncate, "a", 0) == "ELOOP"


# Modes, owners and who may change them


def test_chmod_by_owner_and_others(at: Path) -> None:
    touch("file", 0o644, ALICE, ALICE)
    with moves(file="c"):
        assert as_user(ALICE, os.chmod, "file", 0o4711) is None
    assert mode_of("file") == 0o4711
    assert as_user(BOB, os.chmod, "file", 0o777) == "EPERM"
    assert mode_of("file") == 0o4711
    os.unlink("file")
    for name in set(make_all_types()) - {"symlink"}:
        os.chmod(name, 0o111)
        assert mode_of(name) == 0o111
    # The set-group-id bit of a group that the owner is not in does not stick.
    touch("foreign", 0o755, ALICE, BOB)
    assert as_user(ALICE, os.chmod, "foreign", 0o2755) is None
    assert mode_of("foreign") == 0o755
    os.chmod("foreign", 0o2755)
    assert mode_of("foreign") == 0o2755


def test_chown_and_the_set_id_bits(at: Path) -> None:
    touch("file", 0o6755, ALICE, ALICE)
    with moves(file="c"):
        os.chown("file", BOB, -1)
    assert (os.stat("file").st_uid, mode_of("file")) == (BOB, 0o755)
    os.chmod("file", 0o6745)
    os.chown("file", -1, ALICE)
    # Without group execution the bit means something else and stays.
    assert (os.stat("file").st_gid, mode_of("file")) == (ALICE, 0o2745)
    os.mkdir("dir")
    os.chmod("dir", 0o6755)
    os.chown("dir", ALICE, ALICE)
    assert mode_of("dir") == 0o6755
    assert as_user(ALICE, os.chown, "file", ALICE, -1) == "EPERM"
    assert as_user(BOB, os.chown, "file", -1, BOB) is None
    assert as_user(BOB, os.chown, "file", -1, ALICE) == "EPERM"
    os.symlink("file", "link")
    with moves(link="c", file=""):
        os.lchown("link", ALICE, BOB)
    assert (os.lstat("link").st_uid, os.lstat("link").st_gid) == (ALICE, BOB)
    touch("kept", 0o6755, ALICE, ALICE)
    assert as_user(ALICE, os.chown, "kept", -1, -1) is None
    assert mode_of("kept") == 0o755


def _write_to(name: str) -> None:
    with open(name, "r+b", buffering=0) as file:
        file.write(b"x")


def _truncate_open(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))


def _ftruncate(name: str) -> None:
    with open(name, "r+b", buffering=0) as file:
        os.ftruncate(file.fileno(), 3)


@pytest.mark.parametrize(
    "change", [_write_to, _truncate_open, _ftruncate, lambda name: os.truncate(name, 9)]
)
def test_a_change_of_the_bytes_takes_the_set_id_bits_unless_root_makes_it(
    at: Path, change: Callable[[str], None]
) -> None:
    touch("theirs", 0o6777, ALICE, ALICE)
    touch("roots", 0o6777, ALICE, ALICE)
    touch("locking", 0o6767, ALICE, ALICE)
    for name in ("theirs", "roots", "locking"):
        os.truncate(name, 5)
        os.chmod(name, 0o6767 if name == "locking" else 0o6777)
    assert as_user(BOB, change, "theirs") is None
    assert mode_of("theirs") == 0o777
    assert as_user(BOB, change, "locking") is None
    assert mode_of("locking") in (0o2767, 0o767)
    change("roots")
    assert mode_of("roots") == 0o6777


def test_a_directory_with_the_set_group_id_bit_gives_its_group(at: Path) -> None:
    os.mkdir("shared")
    os.chown("shared", ALICE, BOB)
    os.chmod("shared", 0o2777)
    assert as_user(ALICE, os.mkdir, "shared/sub", 0o700) is None
    assert as_user(ALICE, os.mkfifo, "shared/fifo", 0o600) is None
    assert os.stat("shared/sub").st_gid == BOB
    assert mode_of("shared/sub") == 0o2700
    assert os.stat("shared/fifo").st_gid == BOB
    opened = as_user(ALICE, os.open, "shared/file", os.O_CREAT | os.O_RDWR, 0o2775)
    assert isinstance(opened, int)
    # ALICE is not in the group, so no program that runs as that group is made.
    assert mode_of("shared/file") == 0o755


def test_a_sticky_directory_keeps_others_files(at: Path) -> None:
    os.mkdir("tmp")
    os.chown("tmp", 1, 1)
    os.chmod("tmp", 0o1777)
    os.mkdir("tmp/alices")
    os.chown("tmp/alices", ALICE, ALICE)
    touch("tmp/file", 0o666, ALICE, ALICE)
    touch("tmp/bobs", 0o666, BOB, BOB)
    assert as_user(BOB, os.unlink, "tmp/file") == "EPERM"
    assert as_user(BOB, os.rmdir, "tmp/alices") == "EPERM"
    assert as_user(BOB, os.rename, "tmp/file", "tmp/x") == "EPERM"
    assert as_user(BOB, os.rename, "tmp/bobs", "tmp/file") == "EPERM"
    assert as_user(ALICE, os.rename, "tmp/file", "tmp/x") is None
    assert as_user(ALICE, os.unlink, "tmp/x") is None
    assert as_user(BOB, os.unlink, "tmp/bobs") is None


def test_permissions_of_directories_and_files(at: Path) -> None:
    os.mkdir("closed")
    touch("closed/file", 0o666)
    os.chmod("closed", 0o600)
    assert as_user(ALICE, os.stat, "closed/file") == "EACCES"
    os.chmod("closed", 0o755)
    assert as_user(ALICE, _write_to, "closed/file") is None
    assert as_user(ALICE, os.unlink, "closed/file") == "EACCES"
    assert as_user(ALICE, os.mkdir, "closed/x") == "EACCES"
    assert as_user(ALICE, os.rename, "closed/file", "x") == "EACCES"
    touch("secret", 0o600)
    assert as_user(ALICE, os.open, "secret", os.O_RDONLY) == "EACCES"
    assert as_user(ALICE, os.truncate, "secret", 0) == "EACCES"
    assert as_user(ALICE, os.utime, "secret") == "EACCES"
    assert as_user(ALICE, os.utime, "secret", (1, 1)) == "EPERM"
    touch("open", 0o666)
    assert as_user(ALICE, os.utime, "open") is None
    assert as_user(ALICE, os.utime, "open", (1, 1)) == "EPERM"
    assert as_user(ALICE, os.access, "secret", os.R_OK) is False


# Renaming


def test_what_rename_moves_and_replaces(at: Path) -> None:
    os.mkdir("one")
    os.mkdir("two")
    for name in make_all_types().values():
        with moves(one="mc"):
            os.rename(name, f"one/{name}")
        before = os.lstat(f"one/{name}").st_ctime_ns
        time.sleep(0.001)
        with moves(one="mc", two="mc"):
            os.rename(f"one/{name}", f"two/{name}")
        assert os.lstat(f"two/{name}").st_ctime_ns > before
    os.chdir("two")
    assert result_of(os.rename, "file", "dir") == "EISDIR"
    assert result_of(os.rename, "dir", "file") == "ENOTDIR"
    os.mkdir("full")
    touch("full/x")
    assert result_of(os.rename, "dir", "full") in ("ENOTEMPTY", "EEXIST")
    os.rename("full", "dir")
    assert os.listdir("dir") == ["x"]
    assert result_of(os.rename, "dir", "dir/x/y") == "ENOTDIR"
    assert result_of(os.rename, "dir", "dir/new") == "EINVAL"
    assert result_of(os.rename, "dir/.", "other") == "EBUSY"
    os.link("file", "file2")
    before = os.stat("file").st_ctime_ns
    os.rename("file", "file2")
    assert (os.stat("file").st_nlink, os.stat("file2").st_ctime_ns) == (2, before)
    os.unlink("file2")
    for name in ("symlink", "fifo", "char", "block", "socket"):
        touch("over")
        os.rename("over", name)
        assert stat.S_ISREG(os.lstat(name).st_mode)


def test_the_flags_of_renameat2(at: Path) -> None:
    touch("file")
    os.mkdir("dir")
    touch("dir/inner")
    assert result_of(renameat2, "file", "dir", NOREPLACE) == "EEXIST"
    assert result_of(renameat2, "file", "absent", EXCHANGE) == "ENOENT"
    assert result_of(renameat2, "file", "x", WHITEOUT) == "EINVAL"
    assert result_of(renameat2, "file", "x", NOREPLACE | EXCHANGE) == "EINVAL"
    assert result_of(renameat2, "dir", "dir/inner", EXCHANGE) == "EINVAL"
    assert result_of(renameat2, "dir/inner", "dir", EXCHANGE) == "EINVAL"
    with moves(_="mc"):
        renameat2("file", "dir", EXCHANGE)
    assert os.path.isdir("file")
    assert os.listdir("file") == ["inner"]
    assert os.path.isfile("dir")
    renameat2("dir", "free", NOREPLACE)
    assert sorted(os.listdir(".")) == ["file", "free"]


# Times


def test_utimensat(at: Path) -> None:
    touch("file")
    for atime, mtime in (
        (0, 0),
        (1, 999_999_999),
        (-1, -1_500_000_001),
        ((1 << 32) * 10**9 + 7, (1 << 31) * 10**9 + 3),
        (9_223_372_036_854_775_807, -9_223_372_036_854_775_807),
    ):
        os.utime("file", ns=(atime, mtime))
        assert (os.stat("file").st_atime_ns, os.stat("file").st_mtime_ns) == (atime, mtime)
    omit, now = (1 << 30) - 2, (1 << 30) - 1

    def utimensat(name: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        times = (ctypes.c_long * 4)(*atime, *mtime)
        assert LIBC.utimensat(AT_FDCWD, os.fsencode(name), times, 0x100) == 0

    os.utime("file", ns=(5, 6))
    with moves(file="c"):
        os.utime("file", ns=(5, 6))
    utimensat("file", (0, omit), (77, 88))
    assert (os.stat("file").st_atime_ns, os.stat("file").st_mtime_ns) == (5, 77_000_000_088)
    with moves(file=""):
        utimensat("file", (0, omit), (0, omit))
    before = time.time_ns()
    utimensat("file", (0, now), (0, omit))
    assert before - 10**7 <= os.stat("file").st_atime_ns <= time.time_ns()
    assert os.stat("file").st_mtime_ns == 77_000_000_088
    os.symlink("file", "link")
    with moves(file="", link="amc"):
        utimensat("link", (1, 2), (3, 4))


def test_which_times_a_file_operation_moves(at: Path) -> None:
    touch("file")
    with moves(file="mc", _=""):
        _write_to("file")
    with moves(file="mc"):
        os.truncate("file", 1)
    with moves(file="mc"):
        os.truncate("file", 10_000)
    with moves(file="mc"):
        _truncate_open("file")
    with moves(file="mc"):
        _truncate_open("file")
    with moves(file="c"):
        os.setxattr("file", "user.x", b"1")
    with moves(file="c"):
        os.removexattr("file", "user.x")
    with moves(file=""), open("file", "r+b", buffering=0) as file:
        file.write(b"")
    with moves(_=""), contextlib.suppress(OSError):
        os.rmdir("absent")


def test_the_mtime_of_bytes_stored_through_a_mapping(at: Path) -> None:
    touch("file")
    os.truncate("file", 2 * PAGE)
    with (
        moves(file="amc"),  # the page is read first
        open("file", "r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapped,
    ):
        mapped[5] = 1
        mapped.flush()


def test_atime_is_kept_as_relatime_does(at: Path) -> None:
    touch("file")
    os.truncate("file", 10)

    def read() -> None:
        descriptor = os.open("file", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert len(os.read(descriptor, 10)) == 10
        os.close(descriptor)

    def read_noatime() -> None:
        descriptor = os.open("file", os.O_RDONLY | os.O_NOATIME)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert len(os.read(descriptor, 10)) == 10
        os.close(descriptor)

    with moves(file=""):
        read_noatime()
    # Modified since it was last read: the read counts, the next one does not.
    with moves(file="a"):
        read()
    with moves(file=""):
        read()
    os.utime("file", ns=(time.time_ns() - 25 * 3600 * 10**9, 5))
    os.utime("file", ns=(time.time_ns() - 25 * 3600 * 10**9, 5))
    with moves(file="a"):
        read()
    os.mkdir("dir")
    touch("dir/x")
    with moves(dir="a"):
        os.listdir("dir")
    with moves(dir=""):
        os.listdir("dir")
    os.symlink("x", "link")
    os.utime("link", ns=(1, 2), follow_symlinks=False)
    with moves(link="a"):
        os.readlink("link")


# Sizes


def test_sizes_up_to_the_formats_limit_and_beyond(at: Path) -> None:
    touch("file")
    os.truncate("file", FORMAT_LIMIT)
    assert os.stat("file").st_size == FORMAT_LIMIT
    for size in (FORMAT_LIMIT + 1, 1 << 62, (1 << 63) - 1):
        assert result_of(os.truncate, "file", size) == "EFBIG"
    descriptor = os.open("file", os.O_RDWR)
    for offset in (FORMAT_LIMIT, FORMAT_LIMIT + 1, 1 << 62, (1 << 63) - 2):
        assert result_of(os.pwrite, descriptor, b"x", offset) == "EFBIG"
        assert os.pread(descriptor, 1, offset) == b""
    assert os.pwrite(descriptor, b"xyz", FORMAT_LIMIT - 2) == 2
    assert os.pread(descriptor, 10, FORMAT_LIMIT - 3) == b"\0xy"
    assert os.stat("file").st_size == FORMAT_LIMIT
    assert result_of(os.ftruncate, descriptor, -1) == "EINVAL"
    assert os.stat("file").st_blocks * 512 <= 64 << 10
    os.ftruncate(descriptor, 0)
    assert os.stat("file").st_blocks == 0
    os.close(descriptor)
    assert result_of(os.truncate, ".", 0) == "EISDIR"
    os.mkfifo("fifo")
    assert result_of(os.truncate, "fifo", 0) == "EINVAL"


def test_holes_cost_nothing_and_read_as_zeros(at: Path) -> None:
    free = os.statvfs(".").f_bfree
    touch("sparse")
    os.truncate("sparse", 1 << 40)
    assert os.stat("sparse").st_blocks == 0
    with open("sparse", "rb") as file:
        for offset in (0, 12345, (1 << 40) - 10):
            file.seek(offset)
            assert file.read(10) == bytes(10)
    with open("sparse", "r+b") as both, mmap.mmap(both.fileno(), 1 << 20) as mapped:
        assert mapped[:] == bytes(1 << 20)
    assert os.stat("sparse").st_blocks == 0
    os.unlink("sparse")
    assert os.statvfs(".").f_bfree >= free - 1


def test_statfs_is_true_to_the_page(at: Path) -> None:
    touch("file")
    (at / "file").write_bytes(b"x")
    before = os.statvfs(".")
    with open("file", "ab") as file:
        file.write(bytes(100 * PAGE - 1))
    after = os.statvfs(".")
    # 100 pages in all, one was there; a map node of 512 entries comes with the second page.
    assert before.f_bfree - after.f_bfree == 99 + 1
    assert os.stat("file").st_blocks == 8 * 101
    assert after.f_bavail == after.f_bfree
    os.truncate("file", 0)
    assert os.statvfs(".").f_bfree == before.f_bfree + 1
    assert (after.f_bsize, after.f_frsize, after.f_namemax) == (PAGE, PAGE, 255)
    touch("more")
    assert os.statvfs(".").f_files - os.statvfs(".").f_ffree > 0


def test_appending_descriptors_never_overwrite(at: Path) -> None:
    one = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    two = os.open("log", os.O_WRONLY | os.O_APPEND)
    for turn in range(20):
        os.write(one if turn % 2 else two, b"%02d" % turn)
    os.close(one)
    os.close(two)
    assert Path("log").read_bytes() == b"".join(b"%02d" % turn for turn in range(20))


def test_a_running_program_cannot_be_written(at: Path) -> None:
    program = Path("/bin/sleep").read_bytes()
    Path("sleep").write_bytes(program)
    os.chmod("sleep", 0o755)
    running = subprocess.Popen(["./sleep", "60"])
    try:
        assert result_of(os.open, "sleep", os.O_WRONLY) == "ETXTBSY"
        assert result_of(os.truncate, "sleep", 0) == "ETXTBSY"
    finally:
        running.kill()
        running.wait()
    with open("sleep", "r+b"):
        assert result_of(os.execv, "./sleep", ["sleep"]) == "ETXTBSY"


def test_what_no_handler_serves_is_refused_cleanly(at: Path) -> None:
    tmpfile = 0o20000000 | os.O_DIRECTORY
    assert result_of(os.open, ".", os.O_RDWR | tmpfile, 0o600) == "ENOTSUP"
    touch("file")
    descriptor = os.open("file", os.O_RDWR)
    os.posix_fallocate(descriptor, 0, 10_000)  # the C library writes instead
    assert os.fstat(descriptor).st_size == 10_000
    before = os.fstat(descriptor)
    for mode in (0, 1, 3, 8, 0x10, 0x11, 0x20, 0x41):
        assert result_of(libc, "fallocate", descriptor, mode, 0, PAGE) == "ENOTSUP", mode
    assert os.fstat(descriptor) == before
    assert os.lseek(descriptor, 0, os.SEEK_DATA) == 0
    os.close(descriptor)


# Extended attributes


def test_extended_attributes_and_their_limits(at: Path) -> None:
    touch("file", 0o666)
    for name in ("user.a", "trusted.b", "security.c"):
        os.setxattr("file", name, b"value\0" + name.encode())
        assert os.getxattr("file", name) == b"value\0" + name.encode()
    assert sorted(os.listxattr("file")) == ["security.c", "trusted.b", "user.a"]
    assert sorted(as_user(ALICE, os.listxattr, "file")) == ["security.c", "user.a"]
    assert as_user(ALICE, os.getxattr, "file", "trusted.b") == "ENODATA"
    assert as_user(ALICE, os.setxattr, "file", "trusted.d", b"") == "EPERM"
    assert as_user(ALICE, os.setxattr, "file", "user.d", b"") is None
    assert os.getxattr("file", "user.d") == b""
    assert result_of(os.setxattr, "file", "user.a", b"", os.XATTR_CREATE) == "EEXIST"
    assert result_of(os.setxattr, "file", "user.z", b"", os.XATTR_REPLACE) == "ENODATA"
    assert result_of(os.removexattr, "file", "user.z") == "ENODATA"
    assert result_of(os.setxattr, "file", "user." + "n" * 251, b"") == "ERANGE"
    os.setxattr("file", "user." + "n" * 250, b"longest")
    assert result_of(os.setxattr, "file", "user.big", bytes(65536)) == "ENOSPC"
    assert result_of(os.setxattr, "file", "user.big", bytes(65537)) == "E2BIG"
    assert result_of(os.setxattr, "file", "user.", b"") == "EINVAL"
    assert result_of(os.setxattr, "file", "nonsense.x", b"") == "ENOTSUP"
    small = ctypes.create_string_buffer(3)
    assert LIBC.getxattr(b"file", b"user.a", small, 3) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert LIBC.listxattr(b"file", small, 3) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_posix_acls_are_not_supported(at: Path) -> None:
    touch("file")
    os.mkdir("dir")
    entry = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000400ffffffff")
    for name, kind in (("file", "access"), ("dir", "access"), ("dir", "default")):
        attribute = f"system.posix_acl_{kind}"
        assert result_of(os.setxattr, name, attribute, entry) == "ENOTSUP"
        assert result_of(os.getxattr, name, attribute) == "ENOTSUP"
        assert result_of(os.removexattr, name, attribute) == "ENOTSUP"
    assert mode_of("file") == 0o644


def test_user_attributes_are_for_files_and_directories(at: Path) -> None:
    for name in make_all_types().values():
        if name in ("file", "dir"):
            continue
        assert result_of(os.setxattr, name, "user.x", b"", follow_symlinks=False) == "EPERM"
        os.setxattr(name, "trusted.x", b"1", follow_symlinks=False)
        assert os.getxattr(name, "trusted.x", follow_symlinks=False) == b"1"


# Directories


def test_a_listing_is_stable_while_names_come_and_go(at: Path) -> None:
    for number in range(600):
        touch(f"stay-{number:03}")
        touch(f"go-{number:03}")
    seen = []
    with os.scandir(".") as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count % 2 == 0 and count < 1200:
                touch(f"new-{count:04}")
                if os.path.exists(gone := f"go-{count // 2:03}"):
                    os.unlink(gone)
    stayed = [name for name in seen if name.startswith("stay")]
    assert sorted(stayed) == [f"stay-{number:03}" for number in range(600)]
    assert len(seen) == len(set(seen))


def test_a_directory_is_read_again_after_rewinding(at: Path) -> None:
    for number in range(300):
        touch(f"{number}")
    descriptor = os.open(".", os.O_RDONLY)
    first = sorted(os.listdir(descriptor))
    touch("more")
    os.lseek(descriptor, 0, os.SEEK_SET)
    assert sorted(os.listdir(descriptor)) == sorted([*first, "more"])
    assert result_of(os.read, descriptor, 10) == "EISDIR"
    assert result_of(os.open, ".", os.O_RDWR) == "EISDIR"
    os.close(descriptor)


# Full


def _write_at(path: Path, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, b"x", offset)
    finally:
        os.close(descriptor)


def test_a_full_image_reports_and_damages_nothing(live: Mounts) -> None:
    mount = live.mount(live.image(size_bytes=4 << 20))
    (mount / "kept").write_bytes(b"k" * 10_000)
    with open(mount / "hole", "wb") as file:
        file.truncate(64 * PAGE)
    os.mkdir(mount / "dir")
    with pytest.raises(OSError, match="No space"):
        (mount / "big").write_bytes(bytes(8 << 20))
    deadline = time.monotonic() + 60
    while os.statvfs(mount.directory).f_bfree:
        # A name for which a leaf of the directory is parted may need more blocks than are left.
        with contextlib.suppress(OSError):
            os.symlink("x", mount / "dir" / os.urandom(100).hex())
        assert time.monotonic() < deadline
    for call in (
        lambda: os.symlink("x", mount / "link"),
        lambda: _write_at(mount / "kept", 5 * PAGE),
        lambda: os.setxattr(mount / "kept", "user.x", b"1"),
    ):
        assert result_of(call) == "ENOSPC"
    # Bytes stored into a hole through a mapping: told at msync and at fsync.
    with open(mount / "hole", "r+b") as file:
        with mmap.mmap(file.fileno(), 0) as mapped:
            for page in range(64):
                mapped[page * PAGE] = 7
            assert result_of(mapped.flush) == "ENOSPC"
        assert result_of(os.fsync, file.fileno()) in (None, "ENOSPC")
    assert (mount / "kept").read_bytes() == b"k" * 10_000
    os.unlink(mount / "big")
    (mount / "after").write_bytes(b"a" * 100_000)
    after = live.remount(mount, "ro")
    assert (after / "kept").read_bytes() == b"k" * 10_000
    assert (after / "after").read_bytes() == b"a" * 100_000
    assert set(os.listdir(after.directory)) == {"kept", "hole", "dir", "after"}


def test_others_are_let_in_only_when_asked(live: Mounts) -> None:
    mount = live.mount()
    for path in (mount.directory.parent, *mount.directory.parent.parents[:2]):
        os.chmod(path, os.stat(path).st_mode | 0o055)
    assert as_user(ALICE, os.stat, mount.directory) == "EACCES"
    line = next(
        line
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if line.split()[1] == str(mount.directory)
    )
    assert "default_permissions" in line
    assert "allow_other" not in line
