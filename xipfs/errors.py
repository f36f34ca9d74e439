"""One error tree. Each error knows the errno a filesystem call answers and the command's exit code.

A message says what happened and to which object; ``expected`` and ``remedy`` are the other two
things a user needs: what would have been right, and what to do.
"""

from __future__ import annotations

import errno
import os
from typing import Final

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2


class XipfsError(Exception):
    """Base of every error that xipfs reports on purpose."""

    errno: int = errno.EIO
    exit_code: int = EXIT_FAILURE

    def __init__(self, what: str, *, expected: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        text = self.what
        if self.expected:
            text += f"; expected {self.expected}"
        if self.remedy:
            text += f"; {self.remedy}"
        return text


class UsageError(XipfsError):
    """The command line or an option is wrong; nothing was done."""

    errno = errno.EINVAL
    exit_code = EXIT_USAGE


class ImageError(XipfsError):
    """An image is missing, damaged, too small, or of another format."""


class ImageBusyError(ImageError):
    """Another process holds the image's lock in a conflicting way."""

    errno = errno.EBUSY


class MountError(XipfsError):
    """The mount could not be made, found or ended."""


class ObserverError(XipfsError):
    """Faults cannot be observed the way that was asked for."""


class FsError(XipfsError):
    """A filesystem call fails with this errno, as the system call's manual page says."""

    def __init__(self, errno_: int, what: str = "") -> None:
        super().__init__(what or os.strerror(errno_))
        self.errno = errno_


class NoBlocksError(FsError):
    """The image has no free block; removing files can help."""

    def __init__(self, what: str = "") -> None:
        super().__init__(errno.ENOSPC, what)


class OutOfFramesError(XipfsError):
    """No RAM frame is free and none could be evicted."""

    errno = errno.ENOMEM
