"""One process of the soak: changes its own words of shared files in every way, checks all words.

Each 8-byte word carries who wrote it last (8 bits), that writer's sequence number for this line
(24) and its position: file (8) and word (24). Lines of 64 bytes belong to the workers in turn, so
within every page all of them write, and each knows exactly what its own lines must hold. Of the
others' words a worker knows that writer and position fit and that sequences never go back.

Behind the shared part each file has a tail that is cut and written anew by one worker alone.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

PAGE = 4096
WORKERS = 4
FILES = 4
SHARED_PAGES = 64
TAIL_PAGES = 24
SHARED_BYTES = SHARED_PAGES * PAGE
LINES = SHARED_BYTES // 64
Words = npt.NDArray[np.uint64]


class SoakError(Exception):
    """A word was lost, torn or stale."""


def line_words(file: int, line: int, sequence: int) -> Words:
    """Return the eight words of a line whose owner has written it ``sequence`` times."""
    head = (line % WORKERS) << 56 | sequence << 32 | file << 24
    return np.arange(8, dtype=np.uint64) + np.uint64(head | line * 8)


def file_words(file: int, sequences: Words) -> Words:
    """Return a shared part's words when its lines have these sequence numbers."""
    lines = np.arange(LINES, dtype=np.uint64)
    owners: Words = (lines % np.uint64(WORKERS)) << np.uint64(56)
    heads = owners | sequences << np.uint64(32) | np.uint64(file << 24) | lines * np.uint64(8)
    words: Words = (heads[:, None] + np.arange(8, dtype=np.uint64)).reshape(-1)
    return words


@dataclass
class Worker:
    """Worker ``number`` of a soak over the files of ``directory``."""

    number: int
    directory: Path
    seed: int
    operations: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed * WORKERS + self.number)
        self.fds = [os.open(self.directory / f"{file}", os.O_RDWR) for file in range(FILES)]
        self.maps = [mmap.mmap(fd, SHARED_BYTES) for fd in self.fds]
        self.views = [np.frombuffer(each, np.uint64) for each in self.maps]
        #: The last sequence known of every line; exact for this worker's own.
        self.known = [np.zeros(LINES, np.uint64) for _ in range(FILES)]
        self.own = np.arange(LINES) % WORKERS == self.number
        self.tail = b""
        private = mmap.mmap(self.fds[0], SHARED_BYTES, access=mmap.ACCESS_COPY)
        self.private = private
        for page in range(self.number, SHARED_PAGES, 7):
            private[page * PAGE : page * PAGE + 8] = self._mark(page)

    def _mark(self, page: int) -> bytes:
        return b"COW%05d" % (self.number * 1000 + page)

    def run(self, deadline: float, alive: Callable[[], None]) -> None:
        """Do random operations until ``deadline`` (time.monotonic), then check everything.

        ``alive`` is called after each of them.
        """
        choices = (self.store, self.store, self.write, self.check, self.check, self.cut, self.fork)
        while time.monotonic() < deadline:
            operation = self.chance.choice(choices)
            operation()
            name = operation.__name__
            self.operations[name] = self.operations.get(name, 0) + 1
            alive()
        self.check_all()

    def _own_lines(self) -> tuple[int, list[int]]:
        file = self.chance.randrange(FILES)
        count = self.chance.randint(1, 40)
        first = self.chance.randrange(LINES // WORKERS - count)
        return file, [(first + i) * WORKERS + self.number for i in range(count)]

    def store(self) -> None:
        """Write lines through the shared mapping; every other time msync their pages."""
        file, lines = self._own_lines()
        for line in lines:
            self.known[file][line] += np.uint64(1)
            sequence = int(self.known[file][line])
            self.views[file][line * 8 : line * 8 + 8] = line_words(file, line, sequence)
        if self.chance.random() < 0.5:
            start = lines[0] * 64 // PAGE * PAGE
            self.maps[file].flush(start, lines[-1] * 64 + 64 - start)

    def write(self) -> None:
        """Write lines with write(2)."""
        file, lines = self._own_lines()
        for line in lines[:8]:
            self.known[file][line] += np.uint64(1)
            words = line_words(file, line, int(self.known[file][line]))
            os.pwrite(self.fds[file], words.tobytes(), line * 64)
        if self.chance.random() < 0.2:
            os.fsync(self.fds[file])

    def cut(self) -> None:
        """Cut the tail of this worker's file anywhere, extend it, write into it; compare."""
        fd = self.fds[self.number]
        size = self.chance.randrange(TAIL_PAGES * PAGE)
        os.ftruncate(fd, SHARED_BYTES + size)
        tail = self.tail[:size].ljust(size, b"\0")
        at = self.chance.randrange(TAIL_PAGES * PAGE)
        data = self.chance.randbytes(self.chance.randint(1, 3 * PAGE))
        os.pwrite(fd, data, SHARED_BYTES + at)
        tail = tail.ljust(at, b"\0")
        self.tail = tail[:at] + data + tail[at + len(data) :]
        self._check_tail()

    def _check_tail(self) -> None:
        found = os.pread(self.fds[self.number], len(self.tail) + PAGE, SHARED_BYTES)
        if found != self.tail:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, self.tail, strict=False)) if a != b), -1
            )
            raise SoakError(
                f"worker {self.number}: tail of file {self.number} differs at byte {at} "
                f"(sizes {len(found)}, expected {len(self.tail)})"
            )

    def fork(self) -> None:
        """Have a child check what it inherits, mappings and private copies, and store a line."""
        file, lines = self._own_lines()
        line = lines[0]
        self.known[file][line] += np.uint64(1)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                words = line_words(file, line, int(self.known[file][line]))
                self.views[file][line * 8 : line * 8 + 8] = words
                self.check_private()
                self.check()
                code = 0
            except SoakError as error:
                os.write(2, f"{error} (in a forked child)\n".encode())
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            raise SoakError(f"worker {self.number}: its child found something (status {status})")

    def check_private(self) -> None:
        """The private copies hold what this process put there."""
        for page in range(self.number, SHARED_PAGES, 7):
            found = self.private[page * PAGE : page * PAGE + 8]
            if found != self._mark(page):
                raise SoakError(f"worker {self.number}: private page {page} holds {found!r}")

    def check(self) -> None:
        """Check a random range of a random file, through the mapping or with read(2)."""
        file = self.chance.randrange(FILES)
        count = self.chance.randint(1, LINES // 4)
        first = self.chance.randrange(LINES - count)
        if self.chance.random() < 0.5:
            words = self.views[file][first * 8 : (first + count) * 8].copy()
        else:
            data = os.pread(self.fds[file], count * 64, first * 64)
            words = np.frombuffer(data, np.uint64)
        self._check_words(file, first, words)

    def check_all(self) -> None:
        """Check all words of all files both ways, the tail and the private copies."""
        for file in range(FILES):
            self._check_words(file, 0, self.views[file].copy())
            data = os.pread(self.fds[file], SHARED_BYTES, 0)
            self._check_words(file, 0, np.frombuffer(data, np.uint64))
        self._check_tail()
        self.check_private()

    def _check_words(self, file: int, first: int, words: Words) -> None:
        lines = slice(first, first + words.size // 8)
        sequences = words >> 32 & np.uint64(0xFFFFFF)
        places = np.uint64(file << 24) | np.arange(first * 8, first * 8 + words.size, dtype="u8")
        writers = places // 8 % WORKERS & np.uint64(0xFF)
        torn = (words & np.uint64(0xFFFFFFFF) != places) | (words >> 56 != writers)
        known = np.repeat(self.known[file][lines], 8)
        stale = sequences < known
        ahead = (sequences > known) & np.repeat(self.own[lines], 8)
        for what, wrong in (("torn", torn), ("lost or stale", stale), ("invented", ahead)):
            if wrong.any():
                at = int(np.argmax(wrong))
                raise SoakError(
                    f"worker {self.number}: {int(wrong.sum())} words {what} in file {file}, first "
                    f"{words[at]:#018x} at word {first * 8 + at} (page {(first * 8 + at) // 512}); "
                    f"known sequence {known[at]}, time {time.monotonic():.6f}"
                )
        oldest = sequences.reshape(-1, 8).min(axis=1)
        self.known[file][lines] = np.maximum(self.known[file][lines], oldest)
