"""The image's lock: one process writes, or any number read.

It is a flock on a descriptor of its own, so the kernel drops it with the process, however that
ends. Who holds it is read from /proc/locks, by device and inode of the image.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from xipfs.errors import ImageBusyError, ImageError


class ImageLock:
    """A held lock on ``path``: exclusive for writers, shared for readers."""

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"image {path} cannot be opened: {error.strerror}") from error
        try:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            fcntl.flock(self._descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            holders = holders_of(self._descriptor)
            os.close(self._descriptor)
            who = ", ".join(str(pid) for pid in holders) or "unknown"
            raise ImageBusyError(
                f"image {path} is in use by the process with pid {who}",
                expected="one read-write mount, or read-only ones alone",
                remedy="unmount it there, or wait for that process",
            ) from None

    def release(self) -> None:
        """Drop the lock."""
        os.close(self._descriptor)


def holders_of(descriptor: int) -> list[int]:
    """Return the pids that /proc/locks names for the open file's inode, lowest first."""
    status = os.fstat(descriptor)
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    pids: set[int] = set()
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        words = line.split()
        # A waiter's line has "->" after the number; only holders are of interest.
        if len(words) != 8 or words[1] != "FLOCK":
            continue
        major, minor, inode = words[5].split(":")
        if (int(major, 16), int(minor, 16), int(inode)) == wanted:
            pids.add(int(words[4]))
    return sorted(pids)
