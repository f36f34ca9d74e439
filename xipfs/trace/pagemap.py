"""What the kernel has mapped, read from it: /proc/PID/pagemap, /proc/kpagecount, smaps.

pagemap has a 64-bit word a page (Documentation/admin-guide/mm/pagemap.rst, 6.18): bit 63 present,
62 swapped, 61 a page of a file or shared memory, 0 to 54 the pfn (root only, else 0). A page under
PROT_NONE is present there. kpagecount has a 64-bit word a pfn: how many PTEs map it.

All of this may wait for the process's mmap lock, which a fault that waits for our READ may hold
while somebody waits to write to it: call it from a thread that serves nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.units import PAGE_SHIFT

_PRESENT: Final = np.uint64(1 << 63)
_SWAPPED: Final = np.uint64(1 << 62)
_FILE: Final = np.uint64(1 << 61)
_PFN: Final = np.uint64((1 << 55) - 1)
_KPAGECOUNT: Final = Path("/proc/kpagecount")
_SMAPS_HEAD: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S{4} [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ")

Words = npt.NDArray[np.uint64]


def read_pagemap(pid: int, start: int, end: int) -> Words | None:
    """Return the words of the pages in [start, end) bytes; None for a process that is gone."""
    try:
        descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = (end - start >> PAGE_SHIFT) * 8
        data = b""
        while len(data) < size:
            # One read gives at most 4 KiB of words from some kernels.
            piece = os.pread(descriptor, size - len(data), (start >> PAGE_SHIFT) * 8 + len(data))
            if not piece:
                return None
            data += piece
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return np.frombuffer(data, np.uint64)


def is_file(words: Words) -> npt.NDArray[np.bool_]:
    """Return where a page of the file is mapped."""
    both = _PRESENT | _FILE
    file: npt.NDArray[np.bool_] = words & both == both
    return file


def is_private(words: Words) -> npt.NDArray[np.bool_]:
    """Return where the process has a copy of its own, swapped out or not."""
    private: npt.NDArray[np.bool_] = words & (_PRESENT | _FILE) == _PRESENT
    private |= words & _SWAPPED != 0
    return private


def pfns(words: Words) -> Words:
    """Return the frame numbers, 0 where they are hidden or nothing is mapped."""
    pfn: Words = np.where(words & _PRESENT != 0, words & _PFN, np.uint64(0))
    return pfn


def mapcounts(frames: Words) -> dict[int, int]:
    """Return how many PTEs map each frame; empty where the kernel does not tell (no root)."""
    try:
        with open(_KPAGECOUNT, "rb", buffering=0) as file:
            return {
                pfn: int.from_bytes(os.pread(file.fileno(), 8, pfn * 8), "little")
                for pfn in frames.tolist()
            }
    except OSError:
        return {}


def rss_bytes(pid: int, dev: int) -> int | None:
    """Return Rss of ``pid``'s mappings of files on kernel device ``dev``; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text(errors="replace")
    except OSError:
        return None
    total, ours = 0, False
    for line in text.splitlines():
        head = _SMAPS_HEAD.match(line)
        if head is not None:
            ours = (int(head[1], 16) << 20 | int(head[2], 16)) == dev
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total
