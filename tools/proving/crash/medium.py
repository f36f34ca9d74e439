"""The states that a cut can leave, and a medium that decides between them only when it must.

A ``Point`` is what is known of the medium at a cut: bytes that are certain, and lines that hold one
of several contents. ``Undecided`` is a medium in such a state: a line's content is chosen when it
is first read, so two states that differ only in lines that nobody reads are one run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xipfs.memory.emulated import WORD_SIZE, EmulatedMedium
from xipfs.memory.region import LINE_SIZE, Buffer

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

Unknown = dict[int, tuple[bytes, ...]]
"""By line number the contents, each once, that the line may hold."""


def keep_memory() -> None:
    """Have glibc keep what is freed: an image's worth is taken and given back with every run."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


@dataclass(frozen=True)
class Point:
    """A cut: what is certain, and the lines that are not."""

    durable: bytes
    unknown: Unknown

    @classmethod
    def of(cls, medium: EmulatedMedium, older: Unknown | None = None) -> Point:
        """Cut ``medium`` now; ``older`` lines are uncertain since an earlier cut."""
        unknown = dict(older or {})
        for line, contents in medium.pending().items():
            unknown[line] = tuple(dict.fromkeys(contents))
        return cls(bytes(medium.durable), unknown)

    @property
    def states(self) -> int:
        """How many images the cut can leave."""
        count = 1
        for contents in self.unknown.values():
            count *= len(contents)
        return count

    def key(self) -> int:
        """Return a number that is the same for equal points."""
        return hash((self.durable, tuple(sorted(self.unknown.items()))))


class Settled(EmulatedMedium):
    """A medium that is never cut: every store is durable at once, which costs less to emulate."""

    def store(self, offset: int, data: Buffer) -> None:
        """Store, durably."""
        self.now[offset : offset + len(data)] = data

    def flush(self, offset: int, size: int) -> None:
        """Do nothing."""

    def fence(self) -> None:
        """Do nothing."""


class Watched(EmulatedMedium):
    """The emulated medium; calls ``at_fence`` before each fence takes effect."""

    at_fence: Callable[[], None] | None = None

    def fence(self) -> None:
        """Cut, then go on."""
        if self.at_fence is not None:
            self.at_fence()
        super().fence()


class Undecided(Watched):
    """What a cut left; each uncertain line takes the next of ``choices`` when it is first read."""

    def __init__(self, point: Point, choices: list[int]) -> None:
        super().__init__(point.durable)
        self.unknown = dict(point.unknown)
        self._choices = choices
        #: Of each line decided so far: how many contents it could have had.
        self.counts: list[int] = []

    def cut(self) -> Point:
        """Cut the power again."""
        return Point.of(self, self.unknown)

    def possible(self, line: int) -> tuple[bytes, ...]:
        """Return the contents that a line may hold, deciding nothing."""
        known = bytes(self.now[line * LINE_SIZE : (line + 1) * LINE_SIZE])
        return self.unknown.get(line, (known,))

    def load(self, offset: int, size: int) -> memoryview:
        """Decide the range's lines and return a view of it."""
        if self.unknown and size:
            self._decide(offset // LINE_SIZE, (offset + size - 1) // LINE_SIZE)
        return super().load(offset, size)

    def store(self, offset: int, data: Buffer) -> None:
        """Store; a line that is overwritten whole is not decided for that."""
        end = offset + len(data)
        first, last = offset // LINE_SIZE, (end - 1) // LINE_SIZE
        for line in [line for line in self.unknown if first <= line <= last]:
            start = line * LINE_SIZE
            if start < offset or start + LINE_SIZE > end:
                self._decide(line, line)
            else:
                self._overwrite(line, bytes(data[start - offset : start - offset + LINE_SIZE]))
        super().store(offset, data)

    def _overwrite(self, line: int, new: bytes) -> None:
        """Note every content the line may have until ``new`` is certain: some words new or none."""
        contents: dict[bytes, None] = {}
        for old in self.unknown.pop(line):
            for words in range(0, LINE_SIZE, WORD_SIZE):
                contents[new[:words] + old[words:]] = None
        contents.pop(new, None)
        self._pending[line] = [*contents, new]
        self.now[line * LINE_SIZE : (line + 1) * LINE_SIZE] = new

    def _decide(self, first: int, last: int) -> None:
        for line in [line for line in self.unknown if first <= line <= last]:
            contents = self.unknown.pop(line)
            if len(self.counts) == len(self._choices):
                self._choices.append(0)
            content = contents[self._choices[len(self.counts)]]
            self.counts.append(len(contents))
            for bytes_ in (self.now, self.durable):
                bytes_[line * LINE_SIZE : (line + 1) * LINE_SIZE] = content


def next_choices(choices: list[int], counts: list[int]) -> bool:
    """Step to the choices that follow, of lines with ``counts`` contents; False at the end."""
    while choices and choices[-1] + 1 == counts[len(choices) - 1]:
        choices.pop()
    if choices:
        choices[-1] += 1
    return bool(choices)
