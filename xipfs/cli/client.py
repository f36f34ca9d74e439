"""The client's side of a mount's control directory (the daemon's is fuse/control.py)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import Any

from xipfs.errors import EXIT_FAILURE, MountError, UsageError, XipfsError
from xipfs.fuse.mounts import Mount

Json = dict[str, Any]


class RequestError(XipfsError):
    """The daemon refused a request; the message and exit code are its own."""

    def __init__(self, answer: Json) -> None:
        super().__init__(answer["error"])
        self.errno = int(answer["errno"])
        self.exit_code = int(answer.get("exit_code", EXIT_FAILURE))


def _open(mount: Mount, name: str, flags: int) -> int:
    path = mount.mountpoint / ".xipfs" / name
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except PermissionError:
        raise MountError(
            f"{path} is closed to uid {os.geteuid()}", expected="root or the mount's owner"
        ) from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise MountError(
                f"{mount.mountpoint} is mounted read-only, so it takes no request",
                remedy="mount it read-write",
            ) from None
        raise MountError(
            f"{path} cannot be opened: {error.strerror}",
            remedy="if the daemon is gone, run: xipfs umount " + str(mount.mountpoint),
        ) from None


@contextlib.contextmanager
def _talking(mount: Mount, name: str) -> Iterator[None]:
    """Say what failed if the daemon ends, or ended, at this moment: also an fstat asks it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise UsageError(
                "the request to the daemon is too long",
                expected="less than 128 KiB: some 5000 files or page ranges",
                remedy="ask for fewer at once",
            ) from None
        raise MountError(
            f"{mount.mountpoint / '.xipfs' / name} cannot be used: {error.strerror}",
            remedy="see the daemon's log",
        ) from None


def ask(mount: Mount, name: str) -> Json:
    """Return the answer in the control file ``name``, fresh: ``stats.json`` or a question."""
    answer: Json = json.loads(ask_text(mount, name))
    return answer


def ask_text(mount: Mount, name: str) -> str:
    """Return the control file ``name`` as it is."""
    descriptor = _open(mount, name, os.O_RDONLY)
    with _talking(mount, name), open(descriptor, "rb") as file:
        return file.read().decode()


def request(mount: Mount, op: str, **arguments: Any) -> Iterator[Json]:
    """Run one request; yields progress objects and, last, the object with the result."""
    descriptor, pending = _open(mount, "control", os.O_RDWR), b""
    try:
        with _talking(mount, "control"):
            os.write(descriptor, json.dumps({"op": op, **arguments}).encode())
        while chunk := _read(mount, descriptor):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                answer: Json = json.loads(line)
                if "error" in answer:
                    raise RequestError(answer)
                yield answer
    finally:
        with contextlib.suppress(OSError):  # the FLUSH of a dead daemon
            os.close(descriptor)
    if pending:
        raise MountError(f"the daemon's answer to {op!r} broke off", remedy="see the daemon's log")


def _read(mount: Mount, descriptor: int) -> bytes:
    with _talking(mount, "control"):
        return os.read(descriptor, 1 << 16)
