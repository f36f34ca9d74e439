"""Bytes: direct I/O, mappings, copies, sizes to 2^63-1, limits, and locks, on both sides.

What each test expects is written out, and holds on an xipfs mount and on the kernel's own
filesystem; the behaviours are those that xfstests' generic tests look at.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import functools
import mmap
import os
import resource
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE
from t4_posix import as_user, result_of

pytestmark = [needs("root", "fuse")]

LAST_OFFSET = (1 << 63) - 1
F_OFD_SETLK = 37


@contextlib.contextmanager
def opened(name: str, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    descriptor = os.open(name, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def aligned(data: bytes) -> mmap.mmap:
    """Return memory as direct I/O wants it, of pages."""
    memory = mmap.mmap(-1, -(-len(data) // PAGE) * PAGE)
    memory[: len(data)] = data
    return memory


def start(work: Callable[[], object]) -> int:
    """Do the work in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return child


def ends(child: int) -> int:
    """Return the exit code of a process that ``start`` made; negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Offsets and sizes


def test_offsets_up_to_the_last_one(inside: Path) -> None:
    with opened("f") as descriptor:
        for offset in (1 << 62, LAST_OFFSET - 1, LAST_OFFSET):
            assert result_of(os.pread, descriptor, 10, offset) in (b"", "EINVAL")
            assert result_of(os.pwrite, descriptor, b"abc", offset) in ("EFBIG", "EINVAL")
            assert result_of(os.ftruncate, descriptor, offset) in ("EFBIG", "EINVAL")
            assert result_of(os.lseek, descriptor, offset, os.SEEK_DATA) == "ENXIO"
        assert result_of(os.lseek, descriptor, -1, os.SEEK_SET) == "EINVAL"
        assert result_of(os.lseek, descriptor, -1, os.SEEK_END) == "EINVAL"
        assert result_of(os.lseek, descriptor, 0, 9) == "EINVAL"
        assert os.fstat(descriptor).st_size == 0


def test_data_and_holes_that_are_told_are_true(inside: Path) -> None:
    """A filesystem may call all of a file data; what it calls a hole must be zeros."""
    content = b"x" * 10 + bytes((1 << 20) - 10) + b"y"
    with opened("f") as descriptor:
        os.pwrite(descriptor, b"x" * 10, 0)
        os.pwrite(descriptor, b"y", 1 << 20)
        size = len(content)
        place = 0
        while place < size:
            data = os.lseek(descriptor, place, os.SEEK_DATA)
            assert not content[place:data].strip(b"\0"), "a hole with bytes in it"
            place = os.lseek(descriptor, data, os.SEEK_HOLE)
            assert data < place <= size
        for offset in (size, size + 1, -1):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert result_of(os.lseek, descriptor, offset, whence) == "ENXIO"


def test_the_limit_of_a_processs_file_size(inside: Path) -> None:
    def limited() -> list[object]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened("f") as descriptor:
            done = [result_of(os.pwrite, descriptor, b"y" * 100, o) for o in (4900, 4950, 5000)]
            done += [result_of(os.ftruncate, descriptor, size) for size in (5000, 5001)]
            return [*done, result_of(os.truncate, "f", 6000), os.fstat(descriptor).st_size]

    assert as_user(0, limited) == [100, 50, "EFBIG", None, "EFBIG", "EFBIG", 5000]


def test_a_file_is_filled_up_in_any_way(inside: Path) -> None:
    """posix_fallocate works everywhere: with the filesystem's help or by writing."""
    with opened("f") as descriptor:
        os.pwrite(descriptor, b"x" * 10_000, 0)
        os.posix_fallocate(descriptor, 5000, 20_000)
        assert os.fstat(descriptor).st_size == 25_000
        assert os.pread(descriptor, 30_000, 0) == b"x" * 10_000 + bytes(15_000)
        assert result_of(os.posix_fallocate, descriptor, 0, 0) == "EINVAL"
        assert result_of(os.posix_fallocate, descriptor, -1, 5) == "EINVAL"


# Copies


def test_copy_file_range(inside: Path) -> None:
    content = os.urandom(300_000)
    (inside / "a").write_bytes(content)
    copy = os.copy_file_range
    with opened("a", os.O_RDONLY) as a, opened("b") as b, opened("a", os.O_RDWR) as both:
        assert copy(a, b, 200_000, 0, 0) == 200_000
        assert copy(a, b, 300_000, 1000, 500_000) == 299_000
        assert os.pread(b, 900_000, 0) == content[:200_000] + bytes(300_000) + content[1000:]
        assert copy(a, b, 100, 400_000, 0) == 0
        assert copy(both, both, 1000, 0, 100_000) == 1000
        assert (inside / "a").read_bytes()[100_000:101_000] == content[:1000]
        assert result_of(copy, both, both, 100, 0, 50) == "EINVAL"
        assert result_of(copy, b, a, 100) == "EBADF"
        assert result_of(copy, a, b, 100, 0, LAST_OFFSET - 50) == "EFBIG"
        with opened("b", os.O_WRONLY | os.O_APPEND) as appending:
            assert result_of(copy, a, appending, 100) == "EBADF"
        with opened(".", os.O_RDONLY) as directory:
            assert result_of(copy, directory, b, 100) == "EISDIR"
        assert os.sendfile(b, a, 0, 5000) == 5000
    read_end, write_end = os.pipe()
    with opened("a") as a, opened("c") as c:
        while count := os.splice(a, write_end, 65_536):
            while count:
                count -= os.splice(read_end, c, count)
    assert (inside / "c").read_bytes() == (inside / "a").read_bytes()
    os.close(read_end)
    os.close(write_end)


def test_reads_and_writes_of_many_buffers(inside: Path) -> None:
    with opened("f") as descriptor:
        parts = [b"a" * 1000, b"", b"b" * 5000, b"c"]
        assert os.pwritev(descriptor, parts, 500) == 6001
        into = [bytearray(3), bytearray(10_000)]
        assert os.preadv(descriptor, into, 498) == 6003
        assert bytes(into[0]) == b"\0\0a"
        assert bytes(into[1][:6000]) == b"a" * 999 + b"b" * 5000 + b"c"
        assert os.writev(descriptor, [b"x"] * 1024) == 1024
        assert result_of(os.writev, descriptor, [b"x"] * 1025) == "EINVAL"


# Direct I/O beside the page cache


def test_direct_io_and_the_page_cache_see_each_other(inside: Path) -> None:
    content = os.urandom(16 * PAGE)
    memory, got = aligned(content), aligned(bytes(16 * PAGE))
    with opened("f", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as direct, opened("f") as cached:
        assert os.pwrite(direct, memory, 0) == 16 * PAGE
        assert os.pwrite(direct, memoryview(memory)[:PAGE], 32 * PAGE) == PAGE
        assert os.fstat(direct).st_size == 33 * PAGE
        assert os.preadv(direct, [got], 0) == 16 * PAGE
        assert got[:] == content
        assert os.preadv(direct, [got], 16 * PAGE) == 16 * PAGE
        assert got[:] == bytes(16 * PAGE)
        assert os.preadv(direct, [got], 40 * PAGE) == 0
        with mmap.mmap(cached, 16 * PAGE) as mapped:
            mapped[:4] = b"abcd"
            assert os.preadv(direct, [got], 0) == 16 * PAGE
            assert got[:4] == b"abcd"
            memory[:8] = b"directly"
            assert os.pwrite(direct, memoryview(memory)[:PAGE], 0) == PAGE
            assert mapped[:8] == b"directly"
        assert os.pread(cached, 8, 0) == b"directly"


@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
def test_io_from_and_into_a_mapping_of_the_same_file(inside: Path, direct: int) -> None:
    """The fault is served while the WRITE is put together, or that would wait for itself."""
    content = bytearray(os.urandom(16 * PAGE))
    (inside / "f").write_bytes(content)
    with opened("f", os.O_RDWR | direct) as descriptor, opened("f") as other:
        for source, target in ((0, 0), (0, PAGE), (PAGE, 2 * PAGE), (0, 16 * PAGE)):
            os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
            with (
                mmap.mmap(other, 16 * PAGE) as mapped,
                memoryview(mapped) as view,
                view[source : source + PAGE] as piece,
            ):
                assert os.pwrite(descriptor, piece, target) == PAGE
            content[target : target + PAGE] = content[source : source + PAGE]
        os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(other, 16 * PAGE) as mapped:
            with memoryview(mapped) as view, view[4 * PAGE : 5 * PAGE] as piece:
                assert os.preadv(descriptor, [piece], 0) == PAGE
            mapped.flush()
        content[4 * PAGE : 5 * PAGE] = content[:PAGE]
        assert (inside / "f").read_bytes() == content


def test_a_reader_never_sees_what_a_direct_writer_has_not_written(inside: Path) -> None:
    """Each read ends before the size that was seen, so there are no zeros in it."""
    piece = aligned(b"\xaa" * 4 * PAGE)
    ended = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        with opened("f") as descriptor:
            while not ended.is_set():
                size = os.fstat(descriptor).st_size
                seen.append(os.pread(descriptor, PAGE, max(size - PAGE, 0)).strip(b"\xaa"))

    reader = threading.Thread(target=read)
    with opened("f", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as descriptor:
        reader.start()
        for turn in range(60):
            os.pwrite(descriptor, piece, turn * 4 * PAGE)
        ended.set()
        reader.join()
    assert not any(seen)
    assert (inside / "f").read_bytes() == b"\xaa" * 240 * PAGE


# Mappings


@pytest.mark.parametrize("processes", [False, True])
def test_many_store_to_each_page_of_a_hole(inside: Path, processes: bool) -> None:
    pages, workers = 64, 8
    with opened("f") as descriptor:
        os.ftruncate(descriptor, pages * PAGE)
        mapped = mmap.mmap(descriptor, pages * PAGE)

        def store(number: int) -> None:
            for page in range(pages):
                struct.pack_into("<Q", mapped, page * PAGE + number * 8, number + 1)

        works = [functools.partial(store, number) for number in range(workers)]
        if processes:
            assert [ends(child) for child in [start(work) for work in works]] == [0] * workers
        else:
            threads = [threading.Thread(target=work) for work in works]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        mapped.flush()
        page = struct.pack("<8Q", *range(1, 9)).ljust(PAGE, b"\0")
        assert os.pread(descriptor, pages * PAGE, 0) == page * pages


def test_the_last_page_ends_in_zeros_and_what_is_behind_in_sigbus(inside: Path) -> None:
    (inside / "f").write_bytes(b"a" * 10_000)
    with opened("f") as descriptor:
        mapped = mmap.mmap(descriptor, 10_000)
        os.ftruncate(descriptor, 5000)
        assert mapped[:PAGE] == b"a" * PAGE
        assert mapped[PAGE : 2 * PAGE] == (b"a" * (5000 - PAGE)).ljust(PAGE, b"\0")
        os.ftruncate(descriptor, PAGE)

        def touch() -> None:
            faulthandler.disable()  # pytest's would print how the process ends
            mapped.find(b"x", PAGE)

        assert ends(start(touch)) == -signal.SIGBUS
        os.ftruncate(descriptor, 10_000)
        assert mapped[PAGE:10_000] == bytes(10_000 - PAGE)
        mapped.close()


def test_a_mapping_outlives_descriptor_and_name(inside: Path) -> None:
    with opened("f") as descriptor:
        os.write(descriptor, b"x" * 9000)
        os.unlink("f")
        os.fsync(descriptor)
        mapped = mmap.mmap(descriptor, 9000)
    mapped[5:8] = b"new"
    mapped.flush()
    assert mapped[:10] == b"xxxxxnewxx"
    mapped.close()


def test_appending_processes_lose_nothing(inside: Path) -> None:
    def append(number: int) -> None:
        with opened("f", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
            for turn in range(100):
                os.write(descriptor, struct.pack("<II", number, turn))

    children = [start(functools.partial(append, number)) for number in range(4)]
    assert [ends(child) for child in children] == [0] * 4
    records = struct.iter_unpack("<II", (inside / "f").read_bytes())
    by_writer: dict[int, list[int]] = {}
    for writer, turn in records:
        by_writer.setdefault(writer, []).append(turn)
    assert by_writer == {number: list(range(100)) for number in range(4)}


# Locks


def refused(call: Callable[[int], object]) -> bool:
    """Whether another process is refused the lock that ``call`` asks for."""

    def ask() -> bool:
        with opened("f", os.O_RDWR) as descriptor:
            return result_of(call, descriptor) in ("EAGAIN", "EACCES")

    answer = as_user(0, ask)
    assert isinstance(answer, bool), answer
    return answer


def test_locks_of_ranges_of_open_files_and_of_files(inside: Path) -> None:
    exclusive, common = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB

    def share(count: int, first: int, descriptor: int) -> None:
        fcntl.lockf(descriptor, common, count, first)

    one = os.open("f", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(one, exclusive, 30, 0)
    fcntl.lockf(one, fcntl.LOCK_UN, 10, 10)
    for first, count, wanted in ((10, 10, False), (9, 1, True), (20, 1, True), (30, 0, False)):
        assert refused(functools.partial(share, count, first)) == wanted
    inode = f":{os.fstat(one).st_ino} "
    assert inode in Path("/proc/locks").read_text()
    # Any close of the file by this process gives its record locks back.
    with opened("f"):
        pass
    assert not refused(lambda fd: fcntl.lockf(fd, exclusive))
    fcntl.flock(one, fcntl.LOCK_EX)
    assert refused(lambda fd: fcntl.flock(fd, common))
    fcntl.flock(one, fcntl.LOCK_SH)
    assert not refused(lambda fd: fcntl.flock(fd, common))
    fcntl.flock(one, fcntl.LOCK_UN)
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    fcntl.fcntl(one, F_OFD_SETLK, whole)
    with opened("f") as two:
        assert result_of(fcntl.fcntl, two, F_OFD_SETLK, whole) == "EAGAIN"
        os.close(os.dup(one))
        assert result_of(fcntl.fcntl, two, F_OFD_SETLK, whole) == "EAGAIN"
        os.close(one)
        assert result_of(fcntl.fcntl, two, F_OFD_SETLK, whole) == whole
    with opened("f", os.O_RDONLY) as reading:
        assert result_of(fcntl.lockf, reading, exclusive) == errno.errorcode[errno.EBADF]


def test_a_lock_is_waited_for(inside: Path) -> None:
    read_end, write_end = os.pipe()
    with opened("f") as descriptor:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)

        def wait() -> None:
            with opened("f") as theirs:
                os.write(write_end, b"s")
                fcntl.lockf(theirs, fcntl.LOCK_EX)
                os.write(write_end, b"l")

        child = start(wait)
        assert os.read(read_end, 1) == b"s"
        fcntl.lockf(descriptor, fcntl.LOCK_UN)
        assert os.read(read_end, 1) == b"l"
        assert ends(child) == 0
    os.close(read_end)
    os.close(write_end)
