"""Which mapped pages the kernel is reading into or writing from right now, past its page cache.

A direct read or write (O_DIRECT) pins the pages of its buffer for as long as the device takes. If
that buffer is a shared mapping of a file and the file's page leaves the page cache meanwhile, what
the device delivers can go to a page that nobody will see again: an invalidation looks at no pins
(rule R10). The kernel's own migration sees them in the page's count and refuses; from outside, the
call itself can be seen: /proc/PID/task/TID/syscall names it, with its buffer, for every thread
that waits inside one.

Requests that no thread waits for (io_uring, libaio) name their buffers nowhere. Whether a process
can have such is seen, though: by its io_uring descriptor, or libaio's ring among its mappings. All
that it maps shared and writable is then taken to be referred to. (A read into a private mapping
goes to a copy, and what is only written from keeps its bytes, in the cache or not.)

Not seen is a request that begins between this look and the invalidation that follows it.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterable
from typing import Final

from xipfs.trace import proc
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

#: System calls with (fd, buffer, bytes) and with (fd, struct iovec *, how many), by machine.
_BUFFER_CALLS: Final = {"x86_64": (0, 1, 17, 18), "aarch64": (63, 64, 67, 68)}
_VECTOR_CALLS: Final = {"x86_64": (19, 20, 295, 296, 327, 328), "aarch64": (65, 66, 69, 70, 286)}
_BUFFERS: Final = _BUFFER_CALLS.get(platform.machine(), ())
_VECTORS: Final = _VECTOR_CALLS.get(platform.machine(), ())
_IOVEC: Final = struct.Struct("=QQ")
_IOVECS_MAX: Final = 1024  # UIO_MAXIOV
#: What io_setup(2) maps, as /proc/PID/maps tells it; where an io_uring's descriptor leads.
_AIO_RING: Final = " /[aio]"
_IO_URING: Final = "anon_inode:[io_uring]"


def pages_in_flight(pids: Iterable[int], dev: int, ino: int) -> set[int]:
    """Return the pages of ``ino`` on ``dev`` that direct I/O of these processes refers to.

    ``dev`` as in ``proc.read_maps``. A thread id stands for its process.
    """
    found: set[int] = set()
    for pid in pids:
        text = proc.read_maps_text(pid)
        shared = [each for each in proc.parse_maps(text, dev) if each.ino == ino and each.shared]
        if not shared:
            continue  # what a private mapping holds for I/O is its own copy
        buffers = [span for tid in proc.tids_of(pid) for span in _direct_buffers(pid, tid)]
        asynchronous = _AIO_RING in text or _has_io_uring(pid)
        for mapping in shared:
            if asynchronous and mapping.prot & proc.PROT_WRITE:
                pages = mapping.end - mapping.start >> PAGE_SHIFT
                found.update(range(mapping.pgoff, mapping.pgoff + pages))
                continue
            for start, end in buffers:
                first = max(start, mapping.start) - mapping.start >> PAGE_SHIFT
                stop = min(end, mapping.end) - mapping.start + PAGE_SIZE - 1 >> PAGE_SHIFT
                found.update(range(mapping.pgoff + first, mapping.pgoff + stop))
    return found


def _read(path: str) -> bytes:
    """Return a short file's bytes: a third of the time that pathlib takes, for every thread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _has_io_uring(pid: int) -> bool:
    """Return whether the process has a descriptor of an io_uring."""
    try:
        directory = f"/proc/{pid}/fd/"
        return any(_points_to(directory + name, _IO_URING) for name in os.listdir(directory))
    except OSError:
        return False


def _points_to(link: str, target: str) -> bool:
    try:
        return os.readlink(link) == target
    except OSError:
        return False  # closed meanwhile


def _direct_buffers(pid: int, tid: int) -> list[tuple[int, int]]:
    """Return [start, end) of the memory that a thread's direct I/O refers to."""
    try:
        words = _read(f"/proc/{pid}/task/{tid}/syscall").split()
        if len(words) < 4:
            return []  # it runs, or waits outside of any call
        number, fd, address, count = int(words[0]), *(int(word, 16) for word in words[1:4])
        vector = number in _VECTORS
        if not vector and number not in _BUFFERS:
            return []
        info = _read(f"/proc/{pid}/fdinfo/{fd}").splitlines()
        flags = next(line for line in info if line.startswith(b"flags:"))
        if not int(flags.split()[1], 8) & os.O_DIRECT:
            return []
        if not vector:
            return [(address, address + count)]
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            data = memory.read(min(count, _IOVECS_MAX) * _IOVEC.size)
        return [(base, base + size) for base, size in _IOVEC.iter_unpack(data) if size]
    except (OSError, ValueError, StopIteration, struct.error):
        return []  # it is gone, or the call is over
