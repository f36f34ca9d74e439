"""Which mapped pages the kernel is reading into or writing from right now, past its page cache.

A direct read or write (O_DIRECT) pins the pages of its buffer for as long as the device takes. If
that buffer is a shared mapping of a file and the file's page leaves the page cache meanwhile, what
the device delivers goes to a page that nobody will see again: an invalidation looks at no pins
(rule R10). The kernel's own migration sees them in the page's count and refuses. From outside they
cannot be seen in time: a thread that waits in the call can (/proc/PID/task/TID/syscall), but the
call may begin after the look, on a fast device thousands of times a second; and requests that no
thread waits for (io_uring, libaio) name their buffers nowhere.

So what counts is whether a process can have such a request: by a descriptor with O_DIRECT, by its
io_uring, or by libaio's ring among its mappings. All that it maps shared and writable is then
taken to be referred to. What is only written from keeps its bytes, in the cache or not, and a read
into a private mapping goes to a copy: of those the calls are looked at that threads wait in.

Not seen are a descriptor that is opened between this look and the invalidation that follows it,
and without the kernel's events a process that got the file over a socket, or by a parent that has
ended since.
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


def pages_in_flight(pids: Iterable[int], dev: int, ino: int, *, heirs: bool) -> set[int]:
    """Return the pages of ``ino`` on ``dev`` that direct I/O of these processes may refer to.

    ``heirs``: that of their descendants, too. ``dev`` as in ``proc.read_maps``. A thread id stands
    for its process.
    """
    found: set[int] = set()
    for pid in proc.heirs_of(pids) if heirs else pids:
        text = proc.read_maps_text(pid)
        shared = [each for each in proc.parse_maps(text, dev) if each.ino == ino and each.shared]
        if not shared:
            continue  # what a private mapping holds for I/O is its own copy
        buffers = [span for tid in proc.tids_of(pid) for span in _direct_buffers(pid, tid)]
        writable = any(mapping.prot & proc.PROT_WRITE for mapping in shared)
        at_any_time = writable and (_AIO_RING in text or _can_read_past_the_cache(pid))
        for mapping in shared:
            if at_any_time and mapping.prot & proc.PROT_WRITE:
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


def _can_read_past_the_cache(pid: int) -> bool:
    """Return whether the process has a descriptor with O_DIRECT, or one of an io_uring."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    return any(_is_direct(pid, name) or _points_to(pid, name, _IO_URING) for name in names)


def _points_to(pid: int, name: str, target: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}") == target
    except OSError:
        return False  # closed meanwhile


def _is_direct(pid: int, name: str) -> bool:
    try:
        info = _read(f"/proc/{pid}/fdinfo/{name}").splitlines()
    except OSError:
        return False  # closed meanwhile
    flags = next((line.split()[1] for line in info if line.startswith(b"flags:")), b"0")
    return bool(int(flags, 8) & os.O_DIRECT)


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
        if not _is_direct(pid, str(fd)):
            return []
        if not vector:
            return [(address, address + count)]
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            data = memory.read(min(count, _IOVECS_MAX) * _IOVEC.size)
        return [(base, base + size) for base, size in _IOVEC.iter_unpack(data) if size]
    except (OSError, ValueError, struct.error):
        return []  # it is gone, or the call is over
