"""What a program does on the mount of a damaged image: reads everything it finds, then writes.

It runs in a process of its own, since a call may hang and a touch of a mapping may end in SIGBUS.
Each call is announced before it is made, so that whoever waits knows which one hangs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import multiprocessing
import os
import signal
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz_images import BLOCK, LONG_NAME, page_of
from fuzzing import EXPECTED_ERRNOS, NAMES_MAX, Contents, FuzzError

#: EIO: damage, which the daemon's log must name. ELOOP, ESTALE: the kernel's own answers to names
#: that lead in a circle, or to another file than they did.
ALLOWED = EXPECTED_ERRNOS | {errno.EIO, errno.ELOOP, errno.ESTALE}


@dataclass
class Visit:
    """What was read before the changes and after, and how calls and touches failed."""

    read: list[Contents] = field(default_factory=list)
    errnos: Counter[int] = field(default_factory=Counter)
    sigbus: int = 0
    read_only: bool = False
    damage: str = ""


class Visitor:
    """One program on the mount at ``directory``; ``step`` hears what it is about to do."""

    def __init__(self, directory: bytes, step: Callable[[str], None], *, record: bool) -> None:
        self._directory = directory
        self._step = step
        self._record = record
        self.visit = Visit()

    def run(self) -> Visit:
        """Read all, change some, read all again; with ``record`` while a recording runs."""
        if self._record:
            with self._may_fail("begin a recording"):
                (Path(os.fsdecode(self._directory)) / ".xipfs/items.1.json").read_bytes()
        self._walk()
        self._change()
        self._walk()
        self._state()
        return self.visit

    @contextlib.contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        self._step(what)
        try:
            yield
        except OSError as error:
            number = error.errno or 0
            if number not in ALLOWED:
                name = errno.errorcode.get(number, str(number))
                raise FuzzError(f"{what} failed with {name}") from error
            self.visit.errnos[number] += 1

    # Reading

    def _walk(self) -> None:
        found: Contents = {}
        self.visit.read.append(found)
        with self._may_fail("statvfs"):
            os.statvfs(self._directory)
        todo, seen = [self._directory], set[int]()
        while todo:
            path = todo.pop()
            with self._may_fail(f"lstat {path!r}"):
                status = os.lstat(path)
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
                read = found.setdefault(status.st_ino, {})
                self._attributes(path, read)
                if stat.S_ISDIR(status.st_mode):
                    todo += self._names(path)
                elif stat.S_ISREG(status.st_mode):
                    self._file(path, status, read)
                elif stat.S_ISLNK(status.st_mode):
                    with self._may_fail(f"readlink {path!r}"):
                        read["target"] = os.readlink(path)

    def _names(self, path: bytes) -> list[bytes]:
        below: list[bytes] = []
        with self._may_fail(f"readdir {path!r}"), os.scandir(path) as entries:
            for entry in entries:
                below.append(entry.path)
                if len(below) > NAMES_MAX:
                    raise FuzzError(f"directory {path!r} does not end")
        for name in (b"..", b"no such name"):
            with self._may_fail(f"lstat {name!r} in {path!r}"):
                os.lstat(path + b"/" + name)
        return below

    def _attributes(self, path: bytes, read: dict[str, bytes]) -> None:
        names: list[str] = []
        with self._may_fail(f"listxattr {path!r}"):
            names = os.listxattr(path, follow_symlinks=False)
        for name in names:
            with self._may_fail(f"getxattr {path!r} {name!r}"):
                read[f"attribute {name!r}"] = os.getxattr(path, name, follow_symlinks=False)

    def _file(self, path: bytes, status: os.stat_result, read: dict[str, bytes]) -> None:
        pages = {0, 1, 600, max(status.st_size - 1, 0) // BLOCK, 1 << 35}
        if status.st_blocks:
            with self._may_fail(f"read the pages of inode {status.st_ino}"):
                pages |= self._pages_with_bytes(status.st_ino)
        with self._may_fail(f"open {path!r}"):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                for page in sorted(pages):
                    with self._may_fail(f"read {path!r} page {page}"):
                        read[f"page {page}"] = os.pread(descriptor, BLOCK, page * BLOCK)
                inside = [page for page in sorted(pages) if page * BLOCK < status.st_size]
                self._mapped(path, descriptor, status.st_size, inside, read)
            finally:
                os.close(descriptor)

    def _pages_with_bytes(self, ino: int) -> set[int]:
        name = self._directory + b"/.xipfs/pages.%d.json" % ino
        with open(name, "rb") as file:
            runs = json.loads(file.read())["runs"]
        return {
            page
            for run in runs
            if run["letter"] != "."
            for page in range(run["first"], run["first"] + run["count"])
        }

    def _mapped(
        self, path: bytes, descriptor: int, size: int, pages: list[int], read: dict[str, bytes]
    ) -> None:
        """Touch each page in a mapping, in a child; one that ends in SIGBUS is followed by another.

        A page that read(2) gave and the mapping gives too must be the same.
        """
        left = list(pages)
        while left:
            self._step(f"touch a mapping of {path!r}, pages {left}")
            receiver, sender = multiprocessing.Pipe(duplex=False)
            child = os.fork()
            if child == 0:
                _touch(descriptor, size, left, sender)
            sender.close()
            with contextlib.suppress(EOFError):
                while left:
                    data = receiver.recv_bytes()
                    what = f"page {left.pop(0)}"
                    if read.get(what, data) != data:
                        raise FuzzError(f"{what} of {path!r}: read(2) and a mapping differ")
                    read[f"mapped {what}"] = data
            receiver.close()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if left and code == -signal.SIGBUS:
                self.visit.sigbus += 1
                del left[0]
            elif left or code:
                raise FuzzError(f"who touched {path!r}, page {left[:1]}, ended with {code}")

    # Changing

    def _change(self) -> None:
        """Do what programs do; each call may fail, as on a read-only mount all must."""
        at = self._directory + b"/"
        with self._may_fail("make a file, write and map it"):
            self._make(at + b"made")
        for name in (b"tall", b"first", b"one page"):
            with self._may_fail(f"change {name!r}"):
                self._write(at + name)
                os.removexattr(at + name, "user.colour")
            with self._may_fail(f"unlink {name!r}"):
                os.unlink(at + name)
        with self._may_fail("rename"):
            os.rename(at + b"link", at + b"renamed link")
        with self._may_fail("make a directory and move into it"):
            os.mkdir(at + b"new directory")
            os.symlink(b"somewhere", at + b"new directory/to")
            os.rename(at + b"fifo", at + b"new directory/fifo")
            os.rename(at + b"empty", at + b"new directory/empty")
        with self._may_fail("unlink many"):
            for number in range(20):
                os.unlink(at + b"directory/" + LONG_NAME % number)
        with self._may_fail("rmdir"):
            os.rmdir(at + b"empty")

    def _make(self, path: bytes) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            ino = os.fstat(descriptor).st_ino
            for page in (0, 1, 5):
                os.pwrite(descriptor, page_of(ino, page), page * BLOCK)
            self._step("fsync the new file")
            os.fsync(descriptor)
            with mmap.mmap(descriptor, BLOCK, offset=BLOCK) as mapping:
                mapping[:] = page_of(ino, 1)
                self._step("msync the new file")
                mapping.flush()
            os.setxattr(path, "user.made", b"yes")
        finally:
            os.close(descriptor)
        for to in ("pagecache", "xip"):
            self._step(f"migrate the new file to {to}")
            self._migrate(ino, to)

    def _write(self, path: bytes) -> None:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return  # what damage made a device is a real one, with a driver
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            ino = os.fstat(descriptor).st_ino
            os.pwrite(descriptor, page_of(ino, 2), 2 * BLOCK)
            os.ftruncate(descriptor, BLOCK + 1)
        finally:
            os.close(descriptor)
        self._step(f"migrate {path!r}")
        self._migrate(ino, "pagecache")

    def _migrate(self, ino: int, to: str) -> None:
        """Move all of a file's pages; raises OSError with the answer's errno."""
        answer: dict[str, Any] = {}
        with open(self._directory + b"/.xipfs/control", "r+b", buffering=0) as control:
            control.write(json.dumps({"op": "migrate", "ino": ino, "to": to}).encode())
            while line := control.read(1 << 16):
                answer = json.loads(line.splitlines()[-1])
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        if "result" not in answer:
            raise FuzzError(f"migrate was answered {answer}")

    def _state(self) -> None:
        with self._may_fail("read stats.json"):
            with open(self._directory + b"/.xipfs/stats.json", "rb") as file:
                told = json.loads(file.read())["mount"]
            self.visit.read_only, self.visit.damage = told["read_only"], told["damage"]


def _touch(descriptor: int, size: int, pages: list[int], sender: Connection) -> None:
    """In the child: send what each page holds. Never returns."""
    code = 1
    try:
        for page in pages:
            at = page * BLOCK
            length = min(BLOCK, size - at)
            with mmap.mmap(
                descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=at
            ) as mapping:
                sender.send_bytes(mapping[:])
        code = 0
    finally:
        os._exit(code)
