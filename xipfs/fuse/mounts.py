"""Which xipfs mounts exist, who serves them, and how they end: /proc/self/mountinfo, fusermount3.

Nothing here asks the filesystem itself, so a dead or stuck mount can still be looked at and ended.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xipfs.errors import MountError
from xipfs.fs.imagelock import holders_of
from xipfs.trace.proc import kernel_dev

FSTYPE: Final = "fuse.xipfs"
#: Who reads ``.xipfs`` now and then (a recording, `xipfs stat DIR 1`), or looks at all mounts of
#: the machine, keeps one busy for a moment; a mount that is busy for longer is in use.
BUSY_S: Final = 1.0
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: device number, where, what image, with which of mount(8)'s options."""

    major: int
    minor: int
    mountpoint: Path
    source: str
    fstype: str
    options: frozenset[str]

    @property
    def dev(self) -> int:
        """The device number as tracepoints print it."""
        return kernel_dev(self.st_dev)

    @property
    def st_dev(self) -> int:
        """The device number as stat(2) tells it."""
        return os.makedev(self.major, self.minor)


def _unescape(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def mounts() -> list[Mount]:
    """Return every mount of this namespace, in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        major, minor = fields[2].split(b":")
        found.append(
            Mount(
                int(major),
                int(minor),
                Path(_unescape(fields[4])),
                _unescape(tail[1]),
                tail[0].decode(),
                frozenset(b",".join([fields[5], tail[2]]).decode().split(",")),
            )
        )
    return found


def mount_at(directory: Path) -> Mount:
    """Return the xipfs mount whose mount point ``directory`` is (the uppermost, if stacked)."""
    # Not Path.resolve: it would lstat the mount point and hang on a stuck daemon.
    parent = directory.absolute().parent.resolve()
    wanted = parent / directory.name if directory.name not in ("", "..") else directory.resolve()
    known = {mount.mountpoint: mount for mount in mounts()}
    if wanted not in known and wanted.is_symlink():
        wanted = wanted.resolve()
    if wanted in known:
        mount = known[wanted]
        if mount.fstype != FSTYPE:
            raise MountError(
                f"{directory} is a mount of type {mount.fstype}", expected=f"type {FSTYPE}"
            )
        return mount
    raise MountError(
        f"nothing is mounted at {directory}", expected="the mount point of an xipfs mount"
    )


def mount_of(path: Path) -> Mount:
    """Return the xipfs mount that the existing file or directory ``path`` lies in."""
    try:
        device = os.stat(path).st_dev
    except OSError as error:
        raise MountError(f"cannot look at {path}: {error.strerror}") from None
    return mount_on(device, path)


def mount_on(device: int, path: Path) -> Mount:
    """Return the xipfs mount with that ``st_dev``; of several (bind mounts) the one of ``path``."""
    known = [
        mount
        for mount in reversed(mounts())
        if os.makedev(mount.major, mount.minor) == device and mount.fstype == FSTYPE
    ]
    if not known:
        raise MountError(f"{path} is not on an xipfs mount", expected=f"a file on a {FSTYPE} mount")
    if len(known) == 1:
        return known[0]
    real = Path(os.path.realpath(path))
    above = {
        mount: len(mount.mountpoint.parts)
        for mount in known
        if real.is_relative_to(mount.mountpoint)
    }
    return max(above, key=above.__getitem__, default=known[0])


def unmount(mountpoint: Path, *, lazy: bool = False, timeout_s: float | None = None) -> None:
    """Unmount; raises MountError, with the mount as it was, if it is busy or ``timeout_s`` passes.

    Without a limit it takes as long as writing all dirty pages does.
    """
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    busy_until_s = time.monotonic() + BUSY_S
    try:
        while True:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=timeout_s
            )
            busy = done.returncode != 0 and done.stderr.rstrip().endswith("busy")
            if not busy or time.monotonic() > busy_until_s:
                break
            time.sleep(BUSY_S / 20)
    except subprocess.TimeoutExpired:
        raise MountError(f"{mountpoint} was not unmounted within {timeout_s} s") from None
    except FileNotFoundError:
        raise MountError("fusermount3 is not installed", remedy="install fuse3") from None
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition(": ")[2] or f"exit code {done.returncode}"
        raise MountError(
            f"{mountpoint} was not unmounted: {reason}",
            remedy="end the programs that use it (fuser -vm DIR shows them)",
        )


def is_dead(mountpoint: Path) -> bool:
    """Return whether nobody serves the mount there any more; waits while a daemon is stuck."""
    # statfs asks the daemon; stat could be answered from the kernel's cache.
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def serving_pid(mount: Mount) -> int | None:
    """Return the pid of the daemon behind ``mount``, None if it is gone.

    The daemon holds the image's lock and a /dev/fuse descriptor; where several read-only mounts
    share an image, the descriptor's fdinfo tells which connection is whose (the connection's
    number is the device's minor).
    """
    try:
        image = os.open(mount.source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    holders = holders_of(image)
    os.close(image)
    for pid in holders:
        if len(holders) == 1 or _connection_of(pid) == mount.minor:
            return pid
    return None


def closing_daemons(image: Path) -> list[int] | None:
    """Return the pids of daemons that hold the image's lock though no mount of it is there.

    These close it, or have not mounted it yet; none of them: it was closed just now. None if a
    mount is there, or something else (fsck) has the lock.
    """
    if any(mount.source == str(image) for mount in mounts()):
        return None
    with open(image, "rb") as file:
        holders = holders_of(file.fileno())
    return holders if all(_is_daemon(pid) for pid in holders) else None


def _is_daemon(pid: int) -> bool:
    """Return whether the process was started as `xipfs mount`, or is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return True
    # What is about to be gone has no command line any more.
    return words == [b""] or any(
        before.endswith(b"xipfs") and word == b"mount" for before, word in itertools.pairwise(words)
    )


def _connection_of(pid: int) -> int | None:
    for entry in sorted(Path(f"/proc/{pid}/fdinfo").glob("*")):
        try:
            match = re.search(r"^fuse_connection:\s*(\d+)$", entry.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match:
            return int(match[1])
    return None
