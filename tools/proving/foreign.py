"""What another process can do to a program's page tables: write to its memory, reclaim it."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

SYS_PROCESS_MADVISE = 440
MADV_PAGEOUT = 21

_libc = ctypes.CDLL(None, use_errno=True)


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def write_memory(pid: int, address: int) -> bool:
    """Write a byte with process_vm_writev; False where the page may not be written."""
    buffer = ctypes.create_string_buffer(b"z")
    local = Iovec(ctypes.cast(buffer, ctypes.c_void_p), 1)
    remote = Iovec(address, 1)
    done = _libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return bool(done == 1)


def page_out(pid: int, start: int, end: int) -> bool:
    """Reclaim the pages of [start, end); False where the kernel refuses."""
    descriptor = os.pidfd_open(pid)
    try:
        vector = Iovec(start, end - start)
        number, count = ctypes.c_long(SYS_PROCESS_MADVISE), ctypes.c_size_t(1)
        done = _libc.syscall(number, descriptor, ctypes.byref(vector), count, MADV_PAGEOUT, 0)
        return bool(done == end - start)
    finally:
        os.close(descriptor)


def ranges(pid: int, files: list[Path]) -> list[tuple[int, int]]:
    """Return [start, end) of the process's mappings of ``files``."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if any(line.endswith(str(file)) for file in files):
            start, _, end = line.split()[0].partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def disturb(rng: random.Random, pid: int, files: list[Path]) -> None:
    """Do one of these to a random mapping of ``files``, or nothing."""
    choice, where, byte = rng.random(), rng.random(), rng.random()
    mapped = ranges(pid, files)
    if not mapped:
        return
    start, end = mapped[int(where * len(mapped))]
    if choice < 0.3:
        write_memory(pid, start + int(byte * (end - start)))
    elif choice < 0.6:
        page_out(pid, start, end)
