"""A medium in memory that knows what a power cut can leave, by the rules of persistent memory.

A line that was not flushed and fenced holds any prefix of its pending stores: a cache may evict it
at any time, and stores reach their line in program order. Lines are independent of each other.
Eight aligned bytes are never torn. A larger store is the sequence of its aligned 8-byte pieces in
ascending order, as a copy loop makes them. Other orders are left out: they would square the number
of states, and nothing above reads any part of a large store before a fence has come after all of
it, so none could be told from these.

What is durable changes at fences alone, and the pending stores of a line only grow in between. So
the states possible just before a fence contain those after every single store since the last one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xipfs.memory.region import LINE_SIZE, Buffer, RegionStatistics
from xipfs.memory.wear import Wear

WORD_SIZE: Final = 8
#: Up to so many states all are enumerated.
STATES_MAX: Final = 4096
_SAMPLES: Final = 256

Pending = dict[int, list[bytes]]
"""By line number the contents it may hold, oldest first: the durable one, then each store's."""


@dataclass(frozen=True)
class States:
    """Images that a cut can leave, each once; whether they are all there are."""

    images: list[bytes]
    exhaustive: bool


class EmulatedMedium:
    """Bytes in memory as a ``Medium``; ``now`` is what a program reads, ``durable`` is certain."""

    def __init__(self, content: bytes | bytearray, *, writable: bool = True) -> None:
        self.now = bytearray(content)
        self.durable = bytearray(content)
        self._writable = writable
        self._pending: Pending = {}
        self._flushed: dict[int, int] = {}
        self._wear = Wear()
        self.fences = self.stores = self.stored_bytes = self.flushed_lines = self.synced = 0

    @property
    def size_bytes(self) -> int:
        """How many bytes the medium holds."""
        return len(self.now)

    @property
    def writable(self) -> bool:
        """Whether store may be called."""
        return self._writable

    @property
    def wear(self) -> Wear:
        """Line writes by block since the medium was made."""
        return self._wear

    def load(self, offset: int, size: int) -> memoryview:
        """Return a read-only view of ``size`` bytes at ``offset``."""
        assert 0 <= offset <= offset + size <= len(self.now), (offset, size)
        return memoryview(self.now).toreadonly()[offset : offset + size]

    def reserve(self, offset: int, size: int) -> None:
        """There is room for all of it."""

    def store(self, offset: int, data: Buffer) -> None:
        """Store ``data`` in aligned pieces of 8 bytes; each is pending on its line."""
        size = len(data)
        assert self._writable, "a store to a read-only medium"
        assert 0 <= offset <= offset + size <= len(self.now), (offset, size)
        self.stores += 1
        self.stored_bytes += size
        end = offset + size
        if self.now[offset:end] == data:
            return  # no line's content can tell that it came
        for line in range(offset // LINE_SIZE, (end + LINE_SIZE - 1) // LINE_SIZE):
            start = line * LINE_SIZE
            at, stop = max(offset, start), min(end, start + LINE_SIZE)
            if self.now[at:stop] != data[at - offset : stop - offset]:
                self._store_words(line, at, data[at - offset : stop - offset])

    def _store_words(self, line: int, offset: int, data: Buffer) -> None:
        start, end = line * LINE_SIZE, offset + len(data)
        contents = self._pending.get(line)
        if contents is None:
            contents = self._pending[line] = [bytes(self.durable[start : start + LINE_SIZE])]
        at = offset
        while at < end:
            stop = min(at - at % WORD_SIZE + WORD_SIZE, end)
            word = data[at - offset : stop - offset]
            if self.now[at:stop] != word:
                self.now[at:stop] = word
                contents.append(bytes(self.now[start : start + LINE_SIZE]))
            at = stop

    def store_word(self, offset: int, value: int) -> None:
        """Store one aligned word."""
        assert offset % WORD_SIZE == 0, offset
        self.store(offset, value.to_bytes(WORD_SIZE, "little"))

    def flush(self, offset: int, size: int) -> None:
        """Note how many of each line's stores the next fence makes durable."""
        self.flushed_lines += self._wear.flushed(offset, size)
        for line in range(offset // LINE_SIZE, (offset + size - 1) // LINE_SIZE + 1):
            if line in self._pending:
                self._flushed[line] = len(self._pending[line]) - 1

    def fence(self) -> None:
        """Make durable what was flushed."""
        self.fences += 1
        for line, count in self._flushed.items():
            contents = self._pending[line][count:]
            self.durable[line * LINE_SIZE : (line + 1) * LINE_SIZE] = contents[0]
            if len(contents) > 1:
                self._pending[line] = contents
            else:
                del self._pending[line]
        self._flushed.clear()

    def sync(self) -> None:
        """Count the call; there is no disk below."""
        self.synced += 1

    def close(self) -> None:
        """Keep everything: whoever made the medium looks at it afterwards."""

    def statistics(self) -> RegionStatistics:
        """Return the figures since the medium was made."""
        return RegionStatistics(self.stores, self.stored_bytes, self.flushed_lines, self.fences)

    def pending(self) -> Pending:
        """Return a copy of the contents that each line not yet certain may hold."""
        return {line: list(contents) for line, contents in self._pending.items()}

    def states(self, seed: int = 0) -> States:
        """Return the images that a cut now can leave.

        All of them up to STATES_MAX. Above that those in which at most two stores arrived or at
        most two are missing, and samples drawn with ``seed``.
        """
        lines = sorted(self._pending)
        lengths = [len(self._pending[line]) for line in lines]
        count = 1
        for length in lengths:
            count = min(count * length, STATES_MAX + 1)
        exhaustive = count <= STATES_MAX
        choices: Iterator[tuple[int, ...]]
        if exhaustive:
            choices = itertools.product(*map(range, lengths))
        else:
            choices = choices_beyond(lengths, seed)
        images = dict.fromkeys(self._image(lines, choice) for choice in choices)
        return States(list(images), exhaustive)

    def _image(self, lines: list[int], choice: tuple[int, ...]) -> bytes:
        image = bytearray(self.durable)
        for line, stores in zip(lines, choice, strict=True):
            image[line * LINE_SIZE : (line + 1) * LINE_SIZE] = self._pending[line][stores]
        return bytes(image)


def choices_beyond(lengths: list[int], seed: int) -> Iterator[tuple[int, ...]]:
    """Yield what is taken of more than STATES_MAX states, as one content's place for each line.

    ``lengths`` says how many contents each line has. All in which at most two stores arrived, all
    in which at most two are missing, and samples drawn with ``seed``.
    """
    return itertools.chain(_near_ends(lengths), _samples(lengths, seed))


def _near_ends(lengths: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield the choices of which at most two stores arrived, and at most two are missing."""
    for weight in range(3):
        for picked in itertools.combinations_with_replacement(range(len(lengths)), weight):
            few = [picked.count(at) for at in range(len(lengths))]
            if all(n < length for n, length in zip(few, lengths, strict=True)):
                yield tuple(few)
                yield tuple(length - 1 - n for n, length in zip(few, lengths, strict=True))


def _samples(lengths: list[int], seed: int) -> Iterator[tuple[int, ...]]:
    chance = random.Random(seed)
    for _ in range(_SAMPLES):
        yield tuple(chance.randrange(length) for length in lengths)
