"""Whether this kernel can switch fault-around off for one mapping, as exact mode needs.

It is off in mappings registered with userfaultfd for asynchronous write protection (6.7 and later;
mm/memory.c, should_fault_around). The registering itself is done in the program, by
``preload/register.c``; this asks the same of the kernel with the same flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import struct
from typing import Final

_NUMBERS: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_USER_MODE_ONLY: Final = 1
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_WP_ASYNC: Final = 1 << 15


def unusable() -> str:
    """Return why mappings cannot be registered here; empty if they can."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        return f"not known on {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY)
    if descriptor < 0:
        return f"userfaultfd(2): {os.strerror(ctypes.get_errno())}"
    with contextlib.closing(os.fdopen(descriptor, "rb", buffering=0)):
        try:
            fcntl.ioctl(descriptor, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, _WP_ASYNC, 0))
        except OSError as error:
            return f"userfaultfd's WP_ASYNC: {error.strerror}"
    return ""
