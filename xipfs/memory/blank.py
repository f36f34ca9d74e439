"""A medium that keeps nothing but what is not zero: for replays, which know no file's bytes.

A recording holds no contents, so a replay's programs write zeros. Zeros stored where nothing else
ever was cost no host memory, whatever the size of the image; the image's own structures are kept.
``setup`` brackets what prepares the image: it is in none of the figures.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np

from xipfs.memory.region import Buffer, RegionStatistics
from xipfs.memory.wear import Wear
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

#: From linux/mman.h: no swap is set aside for what may never be touched.
_MAP_NORESERVE: Final = 0x4000
_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class BlankMedium:
    """Anonymous memory of the host as a ``Medium``."""

    def __init__(self, size_bytes: int) -> None:
        assert size_bytes % PAGE_SIZE == 0, size_bytes
        self._map = mmap.mmap(-1, size_bytes, flags=_FLAGS)
        self._view = memoryview(self._map)
        self._words = np.frombuffer(self._map, np.uint64)
        self._used = np.zeros(size_bytes >> PAGE_SHIFT, np.bool_)
        self._zeros = bytes(PAGE_SIZE)
        self._wear = Wear()
        self._counting = True
        self._stores = self._stored_bytes = self._flushed_lines = self._fences = 0

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    @property
    def size_bytes(self) -> int:
        """How many bytes the medium holds."""
        return len(self._view)

    @property
    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def wear(self) -> Wear:
        """Line writes by block, without those of setup."""
        return self._wear

    def load(self, offset: int, size: int) -> memoryview:
        """Return a read-only view."""
        assert 0 <= offset <= offset + size <= len(self._view), (offset, size)
        return self._view[offset : offset + size].toreadonly()

    def reserve(self, offset: int, size: int) -> None:
        """There is room for all of it."""

    def store(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` to ``offset``; page by page, zeros over nothing are left out."""
        size = len(data)
        assert 0 <= offset <= offset + size <= len(self._view), (offset, size)
        view = memoryview(data)
        at = 0
        while at < size:
            page, inside = divmod(offset + at, PAGE_SIZE)
            part = view[at : at + PAGE_SIZE - inside]
            if self._used[page] or part != self._zeros[: len(part)]:
                self._used[page] = True
                self._view[offset + at : offset + at + len(part)] = part
            at += len(part)
        if self._counting:
            self._stores += 1
            self._stored_bytes += size

    def store_word(self, offset: int, value: int) -> None:
        """Store one aligned 8-byte word."""
        assert offset % 8 == 0, offset
        self._used[offset >> PAGE_SHIFT] = True
        self._words[offset >> 3] = value
        if self._counting:
            self._stores += 1
            self._stored_bytes += 8

    def flush(self, offset: int, size: int) -> None:
        """Count the lines of the range."""
        if self._counting:
            self._flushed_lines += self._wear.flushed(offset, size)

    def fence(self) -> None:
        """Count the fence."""
        self._fences += self._counting

    def sync(self) -> None:
        """Nothing lies beneath."""

    def close(self) -> None:
        """The memory goes with the object; views may outlive this call."""

    def statistics(self) -> RegionStatistics:
        """Return the figures, without those of setup."""
        return RegionStatistics(
            stores=self._stores,
            stored_bytes=self._stored_bytes,
            flushed_lines=self._flushed_lines,
            fences=self._fences,
        )
