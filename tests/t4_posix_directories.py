"""Directories while they change, what is removed while it is used, extended attributes: both sides.

What each test expects is written out, and holds on an xipfs mount and on the kernel's own
filesystem; the behaviours are those that xfstests' generic tests look at.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from acting import AT_FDCWD, LIBC, libc
from calltables import TYPES, make, wait_for_the_clock
from conftest import needs
from live import PAGE
from t4_posix import ALICE, as_user, result_of
from t4_posix_io import ends, opened, start

pytestmark = [needs("root", "fuse")]

#: struct dirent's name, after d_ino, d_off, d_reclen and d_type.
NAME_AT = 19
AT_SYMLINK_FOLLOW = 0x400
NAMES = [str(number) for number in range(200)]


class Stream:
    """A directory stream of the C library: opendir, readdir, telldir, seekdir."""

    def __init__(self, path: str) -> None:
        LIBC.opendir.restype = LIBC.readdir.restype = ctypes.c_void_p
        LIBC.telldir.restype = ctypes.c_long
        self._stream = ctypes.c_void_p(LIBC.opendir(os.fsencode(path)))
        assert self._stream

    def read(self) -> str | None:
        """Return the next name."""
        entry = LIBC.readdir(self._stream)
        return os.fsdecode(ctypes.string_at(entry + NAME_AT)) if entry else None

    def rest(self) -> list[str]:
        """Return all names from here on."""
        return list(iter(self.read, None))

    def tell(self) -> int:
        """Return where the stream is."""
        place: int = LIBC.telldir(self._stream)
        return place

    def seek(self, place: int) -> None:
        """Go to where ``tell`` said it was."""
        LIBC.seekdir(self._stream, ctypes.c_long(place))

    def rewind(self) -> None:
        """Go to the beginning and see what is there now."""
        LIBC.rewinddir(self._stream)

    def close(self) -> None:
        """Close it."""
        LIBC.closedir(self._stream)


@pytest.fixture
def stream(inside: Path) -> Iterator[Stream]:
    """A stream of ``d``, in which NAMES are."""
    os.mkdir("d")
    for name in NAMES:
        make("regular", f"d/{name}")
    made = Stream("d")
    yield made
    made.close()


# Reading directories


def test_every_place_in_a_directory_is_found_again(stream: Stream) -> None:
    places, names = [], []
    while True:
        place = stream.tell()
        name = stream.read()
        if name is None:
            break
        places.append(place)
        names.append(name)
    assert len(set(places)) == len(NAMES) + 2
    assert sorted(names) == sorted([".", "..", *NAMES])
    rng = random.Random(3)
    for number in rng.sample(range(len(names)), 50):
        stream.seek(places[number])
        assert stream.read() == names[number]
    # A place between names that are gone still lies where it lay.
    gone = {name for name in names if name.isdigit() and int(name) % 2}
    for name in gone:
        os.unlink(f"d/{name}")
    for number in (1, 50, 111, 180):
        stream.seek(places[number])
        found = set(stream.rest())
        assert found - gone == {name for name in names[number:] if name not in gone}
    stream.rewind()
    make("regular", "d/new")
    stream.rewind()
    assert sorted(stream.rest()) == sorted({*names, "new"} - gone)


def test_a_listing_ends_while_its_names_are_renamed(stream: Stream) -> None:
    seen = 0
    while (name := stream.read()) is not None:
        seen += 1
        assert seen < 4 * len(NAMES), "renamed names are listed again and again"
        if name.isdigit():
            os.rename(f"d/{name}", "d/moving")
            os.rename("d/moving", f"d/{name}")
    assert seen >= len(NAMES) + 2


def test_names_that_stay_are_listed_once_while_others_come_and_go(stream: Stream) -> None:
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_read, False)

    def churn() -> None:
        turn = 0
        while result_of(os.read, stop_read, 1) == "EAGAIN":
            turn += 1
            name = f"d/x{turn % 100}"
            if result_of(os.mknod, name) == "EEXIST":
                os.unlink(name)

    child = start(churn)
    for _ in range(12):
        listed = [name for name in os.listdir("d") if name.isdigit()]
        assert sorted(listed, key=int) == NAMES
    os.write(stop_write, b"x")
    assert ends(child) == 0


def test_directories_moved_across_each_other_keep_their_counts(inside: Path) -> None:
    expected = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL}

    def shuffle(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            old, new = (f"{rng.choice('abc')}/{rng.choice('123')}" for _ in range(2))
            try:
                rng.choice([os.mkdir, os.rmdir])(old)
                os.rename(old, rng.choice([new, f"{new}/{rng.choice('123')}"]))
            except OSError as error:
                if error.errno not in expected:
                    raise

    for name in "abc":
        os.mkdir(name)
    children = [start(functools.partial(shuffle, seed)) for seed in range(3)]
    assert [ends(child) for child in children] == [0] * 3
    for directory, below, _ in os.walk("."):
        assert os.stat(directory).st_nlink == 2 + len(below), directory
        for name in below:
            there = os.stat(f"{directory}/{name}/..").st_ino
            assert there == os.stat(directory).st_ino


def test_types_and_inode_numbers_of_entries_are_those_of_stat(inside: Path) -> None:
    for kind in TYPES:
        make(kind, kind)
    with opened(".", os.O_RDONLY) as descriptor:
        buffer = ctypes.create_string_buffer(PAGE)
        size = libc("getdents64", descriptor, buffer, PAGE)
        assert result_of(libc, "getdents64", descriptor, buffer, 10) in (0, "EINVAL")
        for odd in (1, 5, 12345, 1 << 31, 1 << 40, (1 << 63) - 1):
            if result_of(os.lseek, descriptor, odd, os.SEEK_SET) == odd:
                assert libc("getdents64", descriptor, buffer, 0 or PAGE) >= 0
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert libc("getdents64", descriptor, buffer, PAGE) == size
    place = 0
    found = {}
    while place < size:
        ino, _, length, kind = struct.unpack_from("<QqHB", buffer.raw, place)
        name = buffer.raw[place + NAME_AT : place + length].split(b"\0")[0].decode()
        assert ino == os.lstat(name).st_ino or name == ".."
        found[name] = kind
        place += length
    assert found == {name: mode >> 12 for name, mode in TYPES.items()} | {".": 4, "..": 4}


# Removed while it is used


def test_what_is_replaced_by_a_rename_has_no_links_left(inside: Path) -> None:
    for kind in ("regular", "dir"):
        os.mkdir(kind)
        os.chdir(kind)
        make(kind, "new")
        make(kind, "old")
        with opened("old", os.O_RDONLY) as descriptor:
            os.rename("new", "old")
            assert os.fstat(descriptor).st_nlink == 0
            os.fchmod(descriptor, 0o700)
            os.fchown(descriptor, ALICE, ALICE)
            os.utime(descriptor)
            os.fsync(descriptor)
            status = os.fstat(descriptor)
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, ALICE)
            if kind == "dir":
                assert os.listdir(descriptor) == []
                make("regular", "f")
                for call in (
                    lambda d=descriptor: os.mkdir("x", dir_fd=d),
                    lambda d=descriptor: os.symlink("t", "x", dir_fd=d),
                    lambda d=descriptor: os.mkfifo("x", dir_fd=d),
                    lambda d=descriptor: os.link("f", "x", dst_dir_fd=d),
                    lambda d=descriptor: os.rename("f", "x", dst_dir_fd=d),
                    lambda d=descriptor: os.open("x", os.O_CREAT, dir_fd=d),
                ):
                    assert result_of(call) == "ENOENT"
            else:
                again = f"/proc/self/fd/{descriptor}".encode()
                ways = AT_FDCWD, again, AT_FDCWD, b"x", AT_SYMLINK_FOLLOW
                assert result_of(libc, "linkat", *ways) == "ENOENT"
        assert os.stat("old").st_nlink == 1 + (kind == "dir")
        os.chdir("..")


def test_an_unlinked_file_does_all_that_a_file_does(inside: Path) -> None:
    with opened("f") as descriptor:
        os.unlink("f")
        os.write(descriptor, b"abc")
        os.ftruncate(descriptor, 5000)
        os.setxattr(descriptor, "user.a", b"1")
        os.fsync(descriptor)
        assert os.getxattr(descriptor, "user.a") == b"1"
        with opened(f"/proc/self/fd/{descriptor}", os.O_RDWR) as second:
            assert os.pread(second, 10_000, 0) == b"abc" + bytes(4997)
        status = os.fstat(descriptor)
        assert (status.st_nlink, status.st_size) == (0, 5000)


def test_a_working_directory_that_moves_and_goes(inside: Path) -> None:
    os.makedirs("a/b/c")
    os.chdir("a/b/c")
    os.rename("../../../a", "../../../z")
    assert os.getcwd() == str(inside / "z/b/c")
    os.rmdir("../c")
    assert result_of(os.getcwd) == "ENOENT"
    assert os.listdir(".") == []
    assert result_of(os.mkdir, "x") == "ENOENT"
    assert result_of(os.rmdir, "../b") == "ENOENT"


# Extended attributes


def test_capabilities_of_a_file_go_when_it_changes(inside: Path) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0)

    def write() -> None:
        with opened("f", os.O_WRONLY) as descriptor:
            os.write(descriptor, b"x")

    def empty() -> None:
        with opened("f", os.O_WRONLY | os.O_TRUNC):
            pass

    changes = (write, empty, lambda: os.truncate("f", 2), lambda: os.chown("f", ALICE, 1))
    for change in changes:
        with opened("f") as descriptor:
            os.fchmod(descriptor, 0o777)
            os.setxattr(descriptor, "security.capability", capability)
        change()
        assert result_of(os.getxattr, "f", "security.capability") == "ENODATA", change


def test_names_values_and_rights_of_attributes(inside: Path) -> None:
    make("regular", "f")
    for name in ("user.a/b", "user.\x01", "user.\xe9", "trusted.x", "security.x"):
        os.setxattr("f", name, name.encode())
        assert os.getxattr("f", name) == name.encode()
    for size in (1, 100, 2000, 3, 0):
        os.setxattr("f", "user.sized", b"z" * size)
        assert os.getxattr("f", "user.sized") == b"z" * size
    assert result_of(os.setxattr, "f", "", b"") == "ERANGE"
    assert result_of(os.setxattr, "f", "user", b"") == "ENOTSUP"
    assert result_of(libc, "setxattr", b"f", b"user.q", b"v", 1, 4) == "EINVAL"
    os.chmod("f", 0o644)
    assert as_user(ALICE, os.setxattr, "f", "user.b", b"") == "EACCES"
    assert as_user(ALICE, os.getxattr, "f", "user.sized") == b""
    os.chmod("f", 0)
    assert as_user(ALICE, os.getxattr, "f", "user.sized") == "EACCES"
    assert "user.sized" in as_user(ALICE, os.listxattr, "f")
    assert as_user(ALICE, os.setxattr, "f", "security.x", b"") == "EPERM"
    make("dir", "sticky", mode="01777")
    assert as_user(ALICE, os.setxattr, "sticky", "user.a", b"") == "EPERM"
    for kind in set(TYPES) - {"regular", "dir"}:
        make(kind, kind)
        wanted = "ENODATA"
        for call in (os.getxattr, os.removexattr):
            refused = result_of(call, kind, "user.a", follow_symlinks=False)
            assert refused == (wanted if call is os.getxattr else "EPERM")
        assert os.listxattr(kind, follow_symlinks=False) == []


# Times


def test_a_read_after_a_write_moves_the_access_time(inside: Path) -> None:
    (inside / "f").write_bytes(b"test")
    written = os.stat("f").st_atime_ns
    wait_for_the_clock(written)
    assert (inside / "f").read_bytes() == b"test"
    assert os.stat("f").st_atime_ns > written
