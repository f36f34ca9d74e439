"""A small medium that remembers what is durable, and images made on it without a file.

A store is durable once its line was flushed and a fence came after the flush. At a cut anything
stored but not yet durable may have reached the medium or not, each 8-byte word for itself, which is
what a processor's cache may do with it.
"""

from __future__ import annotations

import random
from pathlib import Path

from xipfs.clock import ManualClock
from xipfs.fs.build import make_image
from xipfs.fs.filesystem import Filesystem
from xipfs.image.superblock import geometry
from xipfs.memory.region import LINE_SIZE, Buffer, RegionStatistics
from xipfs.memory.wear import Wear
from xipfs.units import PAGE_SIZE

WORD = 8


class PowerCut(BaseException):
    """The power went away; nothing above may catch this as an ordinary failure."""


class RecordingMedium:
    """Bytes in memory as a ``Medium``; the fence number ``cut_at`` (from 1) never completes."""

    def __init__(
        self, content: bytes | bytearray, *, writable: bool = True, cut_at: int = 0
    ) -> None:
        self.now = bytearray(content)
        self.durable = bytearray(content)
        self._writable = writable
        self._cut_at = cut_at
        self._flushing: dict[int, bytes] = {}
        self._stored: set[int] = set()
        self.fences = 0
        self.stores = 0
        self.stored_bytes = 0
        self.flushed_lines = 0
        self.synced = 0
        self.wear = Wear(len(content))

    @property
    def size_bytes(self) -> int:
        return len(self.now)

    @property
    def writable(self) -> bool:
        return self._writable

    def load(self, offset: int, size: int) -> memoryview:
        assert 0 <= offset <= offset + size <= len(self.now), (offset, size)
        return memoryview(self.now).toreadonly()[offset : offset + size]

    def store(self, offset: int, data: Buffer) -> None:
        size = len(data)
        assert self._writable, "a store to a read-only medium"
        assert 0 <= offset <= offset + size <= len(self.now), (offset, size)
        self.now[offset : offset + size] = data
        self._stored.update(range(offset // LINE_SIZE, (offset + size - 1) // LINE_SIZE + 1))
        self.stores += 1
        self.stored_bytes += size

    def store_word(self, offset: int, value: int) -> None:
        assert offset % WORD == 0, offset
        self.store(offset, value.to_bytes(WORD, "little"))

    def flush(self, offset: int, size: int) -> None:
        self.wear.flushed(offset, size)
        for line in range(offset // LINE_SIZE, (offset + size - 1) // LINE_SIZE + 1):
            at = line * LINE_SIZE
            self._flushing[line] = bytes(self.now[at : at + LINE_SIZE])
            self.flushed_lines += 1

    def fence(self) -> None:
        self.fences += 1
        if self.fences == self._cut_at:
            raise PowerCut
        for line, content in self._flushing.items():
            at = line * LINE_SIZE
            self.durable[at : at + LINE_SIZE] = content
            if self.now[at : at + LINE_SIZE] == content:
                self._stored.discard(line)
        self._flushing.clear()

    def sync(self) -> None:
        self.synced += 1

    def close(self) -> None:
        pass

    def statistics(self) -> RegionStatistics:
        return RegionStatistics(self.stores, self.stored_bytes, self.flushed_lines, self.fences)

    def volatile_lines(self) -> set[int]:
        """Return the numbers of the lines whose last store is not durable."""
        return set(self._stored)

    def after_cut(self, chance: random.Random | None, share: float = 0.5) -> bytes:
        """Return what the medium holds after a cut now: of what was not durable, a ``share``."""
        image = bytearray(self.durable)
        for line in sorted(self._stored):
            for at in range(line * LINE_SIZE, (line + 1) * LINE_SIZE, WORD):
                if share == 1 or (chance is not None and chance.random() < share):
                    image[at : at + WORD] = self.now[at : at + WORD]
        return bytes(image)


def new_medium(blocks: int = 64, *, pagecache: bool = False) -> RecordingMedium:
    """Return an empty image of ``blocks`` blocks; the same bytes each time."""
    superblock = geometry(
        blocks * PAGE_SIZE,
        uuid=bytes(range(16)),
        hash_key=bytes(range(16, 32)),
        created_ns=1_000_000_000,
        default_pagecache=pagecache,
        label="medium",
    )
    medium = RecordingMedium(bytes(blocks * PAGE_SIZE))
    make_image(medium, superblock, ManualClock())
    return medium


def open_medium(
    medium: RecordingMedium, *, ram_pages: int = 16, clock: ManualClock | None = None
) -> Filesystem:
    """Open the image on ``medium`` as a mount does."""
    return Filesystem(
        medium,
        image_path=Path("medium"),
        ram_bytes=ram_pages * PAGE_SIZE,
        struct_page_bytes=64,
        clock=clock or ManualClock(),
        lock=None,
    )
