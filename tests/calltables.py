"""Tables of calls. A line says who calls what, what comes of it, and which times that moves:

    alice  chmod f 0711     -> ok     f=c .=
    bob    chmod f 0777     -> EPERM  f=
    bob    attrs f mode uid -> 711 alice

Times are letters of "amc"; a name that ends in "=" keeps all three. Of results separated by "|"
any will do. The same table is run on an xipfs mount and on a filesystem of the kernel's own, which
proves that what it expects is what Linux does.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

from acting import (
    ALICE,
    AT_FDCWD,
    AT_SYMLINK_NOFOLLOW,
    BOB,
    SHARED_GROUP,
    UTIME_NOW,
    UTIME_OMIT,
    Call,
    Worker,
    libc,
    utimensat,
)

NAMES = {"root": 0, "alice": ALICE, "bob": BOB, "shared": SHARED_GROUP, "-": -1}
CLOCK_REALTIME_COARSE = 5  # the time module does not name it
IDS = {number: name for name, number in NAMES.items()}
#: What make can make, and what lstat calls it.
TYPES = {
    "regular": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "fifo": stat.S_IFIFO,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "socket": stat.S_IFSOCK,
    "symlink": stat.S_IFLNK,
}
NOT_DIRECTORIES = [name for name in TYPES if name != "dir"]
NOT_LINKS = [name for name in TYPES if name != "symlink"]
SPECIAL = ["fifo", "char", "block", "socket"]


def _flags(text: str) -> int:
    flags = 0
    for word in text.split(","):
        flags |= getattr(os, f"O_{word}")
    return flags


def make(kind: str, name: str, owner: str = "", mode: str = "") -> None:
    if kind == "regular":
        os.close(os.open(name, os.O_CREAT | os.O_EXCL, 0o644))
    elif kind == "dir":
        os.mkdir(name, 0o755)
    elif kind == "symlink":
        os.symlink("nowhere", name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    else:
        os.mknod(name, TYPES[kind] | 0o644, os.makedev(1, 2))
    if owner:
        os.lchown(name, NAMES[owner], NAMES[owner])
    if mode:
        os.chmod(name, int(mode, 8))


def _remove(name: str) -> None:
    if stat.S_ISDIR(os.lstat(name).st_mode):
        os.rmdir(name)
    else:
        os.unlink(name)


def _attrs(follow: bool, name: str, *wanted: str) -> str:
    status = os.stat(name, follow_symlinks=follow)
    kinds = {value: kind for kind, value in TYPES.items()}
    known: dict[str, Callable[[], object]] = {
        "type": lambda: kinds[stat.S_IFMT(status.st_mode)],
        "mode": lambda: f"{stat.S_IMODE(status.st_mode):o}",
        "nlink": lambda: status.st_nlink,
        "uid": lambda: IDS[status.st_uid],
        "gid": lambda: IDS[status.st_gid],
        "size": lambda: status.st_size,
        "rdev": lambda: f"{os.major(status.st_rdev)},{os.minor(status.st_rdev)}",
        "atime": lambda: status.st_atime_ns,
        "mtime": lambda: status.st_mtime_ns,
    }
    return " ".join(str(known[each]()) for each in wanted)


def _utimes(name: str, atime: str, mtime: str, how: str = "") -> None:
    times = []
    for text in (atime, mtime):
        special = {"now": (0, UTIME_NOW), "omit": (0, UTIME_OMIT)}
        times.append(special.get(text) or divmod(int(text), 10**9))
    utimensat(name, times, AT_SYMLINK_NOFOLLOW if how == "nofollow" else 0)


def _open(name: str, flags: str, mode: str = "0644", *then: str) -> str | None:
    """Open, and with the descriptor: ``write``, ``ftruncate SIZE``, ``read``, ``fmode``."""
    descriptor = os.open(name, _flags(flags), int(mode, 8))
    words, answer = list(then), None
    try:
        while words:
            match words.pop(0):
                case "write":
                    os.write(descriptor, b"x")
                case "ftruncate":
                    os.ftruncate(descriptor, int(words.pop(0)))
                case "read":
                    answer = os.read(descriptor, 100).decode()
                case "unlink":
                    os.unlink(name)
                case "fstat":
                    status = os.fstat(descriptor)
                    answer = f"{stat.S_IMODE(status.st_mode):o} {status.st_nlink} {status.st_size}"
                case other:
                    raise ValueError(other)
    finally:
        os.close(descriptor)
    return answer


def _bad_address(name: str, *arguments: str) -> None:
    """Call what takes a path with one that lies nowhere (``@``)."""
    libc(name, *(0xDEADBEEF if each == "@" else int(each, 8) for each in arguments))


CALLS: dict[str, Callable[..., object]] = {
    "make": make,
    "remove": _remove,
    "attrs": lambda *words: _attrs(False, *words),
    "sattrs": lambda *words: _attrs(True, *words),
    "same": lambda a, b: "yes" if os.lstat(a).st_ino == os.lstat(b).st_ino else "no",
    "chmod": lambda name, mode: os.chmod(name, int(mode, 8)),
    "chown": lambda name, uid, gid: os.chown(name, NAMES[uid], NAMES[gid]),
    "lchown": lambda name, uid, gid: os.lchown(name, NAMES[uid], NAMES[gid]),
    "mkdir": lambda name, mode="0755": os.mkdir(name, int(mode, 8)),
    "mkfifo": lambda name, mode="0644": os.mkfifo(name, int(mode, 8)),
    "mknod": lambda name, kind, mode="0644", device="1,2": os.mknod(
        name, TYPES[kind] | int(mode, 8), os.makedev(*map(int, device.split(",")))
    ),
    "truncate": lambda name, size: libc("truncate", os.fsencode(name), int(size)),
    "link": lambda old, new: os.link(old, new, follow_symlinks=False),
    "rename2": lambda old, new, flags: libc(
        "renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), int(flags)
    ),
    "umask": lambda mask: bool(os.umask(int(mask, 8))) and None,
    "list": lambda name: ",".join(sorted(os.listdir(name))),
    "utimes": _utimes,
    "open": _open,
    "setxattr": lambda name, key, value: os.setxattr(name, key, value.encode()),
    "getxattr": lambda name, key: os.getxattr(name, key).decode(),
    "nowhere": _bad_address,
    **{
        name: getattr(os, name)
        for name in ("rmdir", "unlink", "symlink", "rename", "readlink", "chdir")
    },
}


def carry_out(call: Call) -> str:
    """Return what a line's call comes to: ok, the value it returns, or its errno's name."""
    name, *words = call
    try:
        result = CALLS[name](*words)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except Exception as error:  # a line that is written wrong
        return repr(error)
    return "ok" if result is None or result == 0 else str(result)


def _times(directory: Path, name: str) -> tuple[int, int, int]:
    status = os.lstat(directory / name)
    return status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns


def wait_for_the_clock(newest_ns: int) -> None:
    """Wait until a time given by the kernel's coarse clock is later than ``newest_ns``."""
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= newest_ns:
        time.sleep(0.0005)


class Table:
    """Runs lines in one directory and collects those that come to something else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wrong: list[str] = []
        self._workers: dict[str, Worker] = {}

    def run(self, text: str) -> None:
        """Run the lines of ``text`` in order."""
        for line in text.splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                self._line(line)

    def _line(self, line: str) -> None:
        left, _, right = line.partition("->")
        user, *call = shlex.split(left)
        words = shlex.split(right)
        moves = [word for word in words if "=" in word]
        wanted = " ".join(word for word in words if "=" not in word) or "ok"
        names = {name: letters for name, _, letters in (each.rpartition("=") for each in moves)}
        before = {name: _times(self.directory, name) for name in names}
        if before:
            wait_for_the_clock(max(ctime_ns for _, _, ctime_ns in before.values()))
        if user not in self._workers:
            self._workers[user] = Worker(self.directory, user, carry_out)
        result = self._workers[user].do(tuple(call))
        if result not in wanted.split("|"):
            self.wrong.append(f"{line.strip()[-200:]}: {result}")
        for name, letters in names.items():
            after = zip("amc", before[name], _times(self.directory, name), strict=True)
            moved = "".join(letter for letter, old, new in after if old != new)
            if moved != letters:
                self.wrong.append(f"{line.strip()}: {name}={moved}")

    def end(self) -> None:
        """End the users' processes; raise AssertionError with the lines that were wrong."""
        for worker in self._workers.values():
            worker.end()
        assert not self.wrong, "\n" + "\n".join(self.wrong)
