"""Where a mount of pyfuse3's cannot do what the kernel's own filesystems do: what it does instead.

DESIGN.md ("What FUSE and pyfuse3 cannot express") says why. Each line is shown on both sides.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from acting import libc
from calltables import make
from conftest import needs
from t4_posix import BOB, NOREPLACE, WHITEOUT, as_user, renameat2, result_of
from t4_posix_io import opened

pytestmark = [needs("root", "fuse")]

RWF_NOWAIT = 8
XATTR_CREATE_AND_REPLACE = 3
#: FS_IOC_GETFLAGS (lsattr) and FS_IOC_FIEMAP (filefrag).
GETFLAGS, FIEMAP = 0x80086601, 0xC020660B
#: The year 2286, later than signed 64 bits of nanoseconds.
LATE_S = 10_000_000_000


def _chown_to_nobody_by_another() -> object:
    os.chmod("f", 0o2644)
    return as_user(BOB, os.chown, "f", -1, -1)


def _late() -> object:
    os.utime("f", (0, LATE_S))
    return os.stat("f").st_mtime_ns


def _ioctl(number: int) -> Callable[[], object]:
    def ask() -> object:
        with opened("f") as descriptor:
            asked = struct.pack("<QQQQ", 0, 1 << 40, 0, 0)  # of FIEMAP: how much, and no extents
            return type(fcntl.ioctl(descriptor, number, asked)).__name__

    return ask


def _no_wait() -> object:
    with opened("f") as descriptor:
        os.write(descriptor, b"there")
        return result_of(os.preadv, descriptor, [bytearray(3)], 0, RWF_NOWAIT)


def _set_both() -> int:
    return libc("setxattr", b"f", b"user.q", b"v", 1, XATTR_CREATE_AND_REPLACE)


#: What is asked: what Linux answers, what xipfs.
LIMITS: dict[str, tuple[Callable[[], object], set[object], object]] = {
    "chown of nothing": (_chown_to_nobody_by_another, {"EPERM"}, None),
    "whiteout": (lambda: renameat2("f", "g", WHITEOUT), {None}, "EINVAL"),
    "whiteout without replacing": (
        lambda: renameat2("f", "g", WHITEOUT | NOREPLACE),
        {None},
        "EINVAL",
    ),
    "nameless file": (
        lambda: os.close(os.open(".", os.O_TMPFILE | os.O_RDWR)),
        {None},
        "ENOTSUP",
    ),
    "times after 2262": (_late, {LATE_S * 10**9}, (1 << 63) - 1),
    "flags of setxattr": (
        lambda: tuple(result_of(_set_both) for _ in range(2)),
        {("ENODATA", "ENODATA")},
        (0, "EEXIST"),
    ),
    "attributes of lsattr": (_ioctl(GETFLAGS), {"bytes", "ENOTTY"}, "ENOTTY"),
    "extents": (_ioctl(FIEMAP), {"bytes", "ENOTSUP"}, "ENOTSUP"),
    "read without waiting": (_no_wait, {3, "EAGAIN"}, "ENOTSUP"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_what_is_answered_otherwise(inside: Path, side: Path, what: str) -> None:
    make("regular", "f")
    call, of_linux, of_xipfs = LIMITS[what]
    on_xipfs = (side / ".xipfs").is_dir()
    assert result_of(call) in ({of_xipfs} if on_xipfs else of_linux)
    if on_xipfs:
        assert sorted(os.listdir(".")) == ["f"], "what is refused changes nothing"
