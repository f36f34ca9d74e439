"""Acting as one of three users: a process for each, that carries out calls in a directory.

And a directory of a filesystem of the kernel's own, where the same calls show what Linux does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import signal
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ALICE, BOB, SHARED_GROUP = 65532, 65533, 65531
USERS = {
    "root": (0, 0, []),
    "alice": (ALICE, ALICE, [SHARED_GROUP]),
    "bob": (BOB, BOB, [SHARED_GROUP]),
}
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_NOFOLLOW = -100, 0x100

Call = tuple[Any, ...]


# The calls, as a worker carries them out in the current directory


def libc(name: str, *arguments: Any) -> int:
    """Call a function of the C library; integers are passed as longs, which all of them take."""
    longs = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = getattr(LIBC, name)(*longs)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _open(name: str, flags: int, mode: int) -> None:
    os.close(os.open(name, flags | os.O_NONBLOCK, mode))


def _write(name: str, flags: int, data: bytes) -> int:
    descriptor = os.open(name, flags | os.O_WRONLY | os.O_NONBLOCK)
    try:
        return os.write(descriptor, data) if stat.S_ISREG(os.fstat(descriptor).st_mode) else -1
    finally:
        os.close(descriptor)


def _read(name: str) -> bytes | None:
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 1 << 16) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def utimensat(name: str, times: list[tuple[int, int]] | None, flags: int) -> None:
    packed = None if times is None else struct.pack("=qqqq", *times[0], *times[1])
    libc("utimensat", AT_FDCWD, os.fsencode(name), packed, flags)


def _renameat2(old: str, new: str, flags: int) -> None:
    libc("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def _truncate(name: str, size: int) -> None:
    libc("truncate", os.fsencode(name), size)


def _listdir(name: str) -> list[str]:
    return sorted(os.listdir(name))


def _listxattr(name: str) -> list[str]:
    return sorted(each for each in os.listxattr(name) if not each.startswith("security."))


_held: dict[int, int] = {}


def _hold(slot: int, name: str, flags: int) -> None:
    _held[slot] = os.open(name, flags | os.O_NONBLOCK, 0o644)


def _let_go(slot: int) -> None:
    os.close(_held.pop(slot))


def _with_held(slot: int, what: str, *arguments: Any) -> Any:
    descriptor = _held[slot]
    if what == "fstat":
        status = os.fstat(descriptor)
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        return status.st_mode, status.st_nlink, status.st_uid, status.st_gid, size
    if what in ("write", "lseek") and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return None
    return getattr(os, what)(descriptor, *arguments)


PLAIN = ["chmod", "chown", "lchown", "mkdir", "mkfifo", "rename", "rmdir", "symlink", "unlink"]
PLAIN += ["access", "readlink", "umask", "setxattr", "getxattr", "removexattr"]
CALLS: dict[str, Callable[..., Any]] = {
    "open": _open,
    "write": _write,
    "read": _read,
    "utimensat": utimensat,
    "renameat2": _renameat2,
    "truncate": _truncate,
    "listdir": _listdir,
    "listxattr": _listxattr,
    "hold": _hold,
    "let_go": _let_go,
    "with_held": _with_held,
    "link": lambda old, new, follow: os.link(old, new, follow_symlinks=follow),
    "mknod": os.mknod,
    **{name: getattr(os, name) for name in PLAIN},
}


def carry_out(call: Call) -> Any:
    """Return what the call returns, or the name of its errno."""
    name, *arguments = call
    try:
        return CALLS[name](*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ValueError:
        return "ValueError"


class Worker:
    """A process that is a user, in one directory; calls arrive on a pipe."""

    def __init__(
        self, directory: Path, user: str, carry_out: Callable[[Call], Any] = carry_out
    ) -> None:
        uid, gid, groups = USERS[user]
        self._pipe, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                os.chdir(directory)
                os.umask(0o022)
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
                while True:
                    theirs.send(carry_out(theirs.recv()))
            os._exit(0)
        theirs.close()

    def do(self, call: Call) -> Any:
        """Return the call's result."""
        self._pipe.send(call)
        return self._pipe.recv()

    def end(self) -> None:
        """End the process, which then holds nothing any more."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pipe.close()


def open_the_way(directory: Path) -> None:
    """Let every user reach ``directory``, which lies in pytest's temporary directory."""
    for above in (directory, *directory.parents[:4]):
        os.chmod(above, os.stat(above).st_mode | 0o055)


@contextlib.contextmanager
def reference(directory: Path) -> Iterator[Path]:
    """Yield ``directory``, made on the kernel's filesystem and mounted as FUSE mounts are.

    A mount of FUSE's serves no devices and honours no set-id bits; neither may what it is
    compared with.
    """
    directory.mkdir()
    open_the_way(directory)
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,nosuid,nodev", directory], check=True)
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
