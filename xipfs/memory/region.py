"""The NVRAM region: an image file mapped as an array, written only by store, flush and fence.

Persistent memory gives no other promise than this: a store is durable once its line was flushed
and a fence came after the flush. Everything that must survive a power cut is therefore written
through the calls of ``Medium``, and the code above states its order with fences, not with
luck. ``Region`` is the medium of a live mount: the image file mapped shared, so that a read can be
answered with a view of the file's own pages. On a host file flush and fence order the stores and
count them; the host's disk is reached by ``sync``, or by every fence of a region opened so. Images
are sparse, and a store into a hole that the host's disk has no room for would be a SIGBUS: every
store sees to its room first, and ``reserve`` does so for stores that must not fail midway.
Another medium with the same calls can hold back unflushed lines and cut the power between any two
fences.

A load hands out read-only views. Writable views never leave this module, so none can be kept
across a fence.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from xipfs.errors import FsError, ImageError
from xipfs.memory.wear import LINE_SIZE as LINE_SIZE
from xipfs.memory.wear import Wear
from xipfs.units import PAGE_SIZE

log = logging.getLogger(__name__)

#: Room on the host's disk is asked for in pieces of this size, 64 KiB, each once.
_PIECE_SHIFT: Final = 16

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes: what can be stored."""


@dataclass(frozen=True)
class RegionStatistics:
    """What was stored so far; each figure only grows."""

    stores: int
    stored_bytes: int
    flushed_lines: int
    fences: int


class Medium(Protocol):
    """Byte-addressable persistent memory; offsets and sizes in bytes."""

    @property
    def size_bytes(self) -> int:
        """How many bytes the medium holds."""
        ...

    @property
    def writable(self) -> bool:
        """Whether store may be called."""
        ...

    @property
    def wear(self) -> Wear:
        """How often each block was written."""
        ...

    def load(self, offset: int, size: int) -> memoryview:
        """Return a read-only view of ``size`` bytes at ``offset``."""
        ...

    def reserve(self, offset: int, size: int) -> None:
        """See to it that stores to the range have room; raise FsError (ENOSPC, EDQUOT, EIO)."""
        ...

    def store(self, offset: int, data: Buffer) -> None:
        """Write ``data`` at ``offset``; durable only after flush and fence.

        Raises what ``reserve`` does, with nothing stored.
        """
        ...

    def store_word(self, offset: int, value: int) -> None:
        """Write 8 bytes at an 8-aligned ``offset`` with one store that is never torn."""
        ...

    def flush(self, offset: int, size: int) -> None:
        """Start writing the lines of the range back."""
        ...

    def fence(self) -> None:
        """Order: what was flushed before is durable before anything stored after."""
        ...

    def sync(self) -> None:
        """Bring everything stored to the host's disk."""
        ...

    def close(self) -> None:
        """Give the medium up; what was stored stays."""
        ...

    def statistics(self) -> RegionStatistics:
        """Return the figures since the medium was opened."""
        ...


class Region:
    """An image file of whole pages as a ``Medium``.

    Opened read-only the file is mapped read-only: a stray store raises, and nothing is written.
    With ``sync_fences`` a fence brings what was flushed to the host's disk before it returns, so a
    crash of the host leaves what a power cut of the medium may leave.
    """

    def __init__(self, path: Path, *, writable: bool, sync_fences: bool = False) -> None:
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"image {path} cannot be opened: {error.strerror}") from error
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            if size < PAGE_SIZE:
                raise ImageError(
                    f"{path} is {size} bytes long", expected="an image made by xipfs mkfs"
                )
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._mmap: mmap.mmap | None = mmap.mmap(
                descriptor, size - size % PAGE_SIZE, access=access
            )
        except OSError as error:
            os.close(descriptor)
            raise ImageError(f"image {path} cannot be mapped: {error}") from error
        except ImageError:
            os.close(descriptor)
            raise
        self._path: Final = path
        self._descriptor = descriptor
        #: By piece, 1: the host's disk has room for all of it. Zeros cost nothing until changed.
        self._reserved = bytearray((size >> _PIECE_SHIFT) + 1 if writable else 0)
        self._told_full = False
        self._writable: Final = writable
        self._sync_fences: Final = sync_fences
        #: First and last byte of what was flushed since the last fence; only with sync_fences.
        self._unsynced: tuple[int, int] | None = None
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._mmap, np.uint8)
        self._words = self._bytes.view(np.uint64)
        self._view = memoryview(self._mmap)
        self._readable = self._view.toreadonly()
        self._wear = Wear()
        if sync_fences:
            self._mmap.flush()  # what was stored through another mapping and not synced
        self._stores = self._stored_bytes = self._flushed_lines = self._fences = 0

    @property
    def size_bytes(self) -> int:
        """Length of the image in whole pages, in bytes."""
        return self._bytes.size

    @property
    def writable(self) -> bool:
        """Whether the file is mapped for writing."""
        return self._writable

    @property
    def wear(self) -> Wear:
        """Line writes by block since the region was opened."""
        return self._wear

    def load(self, offset: int, size: int) -> memoryview:
        """Return a read-only view of ``size`` bytes at ``offset``: no copy."""
        assert 0 <= offset <= offset + size <= self._bytes.size, (offset, size)
        return self._readable[offset : offset + size]

    def reserve(self, offset: int, size: int) -> None:
        """Take room for the range on the host's disk, where the file has holes."""
        if not self._writable:
            return  # the store itself raises
        for piece in range(offset >> _PIECE_SHIFT, ((offset + size - 1) >> _PIECE_SHIFT) + 1):
            if not self._reserved[piece]:
                self._reserve(piece, offset, offset + size)

    def _reserve(self, piece: int, begin: int, end: int) -> None:
        """Take room for a piece, or where that is too much for its pages of [begin, end)."""
        start = piece << _PIECE_SHIFT
        stop = min(start + (1 << _PIECE_SHIFT), self._bytes.size)
        try:
            os.posix_fallocate(self._descriptor, start, stop - start)
        except OSError:
            start = max(start, begin - begin % PAGE_SIZE)
            stop = min(stop, end + -end % PAGE_SIZE)
            try:
                os.posix_fallocate(self._descriptor, start, stop - start)
            except OSError as error:
                what = (
                    f"the host has no room for bytes {start} to {stop - 1} of image {self._path}:"
                    f" {error.strerror}"
                )
                if not self._told_full:
                    log.warning("%s; calls that need more will fail", what)
                    self._told_full = True
                raise FsError(error.errno or errno.EIO, what) from error
        else:
            self._reserved[piece] = True
            self._told_full = False

    def store(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` to ``offset``."""
        size = len(data)
        assert 0 <= offset <= offset + size <= self._bytes.size, (offset, size)
        self.reserve(offset, size)
        self._view[offset : offset + size] = data
        self._stores += 1
        self._stored_bytes += size

    def store_word(self, offset: int, value: int) -> None:
        """Store one aligned 8-byte word, little-endian, with a single store instruction."""
        assert offset % 8 == 0, offset
        self.reserve(offset, 8)
        self._words[offset >> 3] = value
        self._stores += 1
        self._stored_bytes += 8

    def flush(self, offset: int, size: int) -> None:
        """Count the lines of the range; a mapped file needs no more."""
        self._flushed_lines += self._wear.flushed(offset, size)
        if self._sync_fences and size:
            first, last = self._unsynced or (offset, offset)
            self._unsynced = min(first, offset), max(last, offset + size - 1)

    def fence(self) -> None:
        """Count the fence; stores to a mapped file reach other readers in program order."""
        self._fences += 1
        if self._unsynced is not None:
            assert self._mmap is not None, "the region is closed"
            first, last = self._unsynced
            start = first - first % PAGE_SIZE
            # One call, over what lies between too: what was not flushed may always arrive.
            self._mmap.flush(start, last + 1 - start)
            self._unsynced = None

    def sync(self) -> None:
        """Write the mapped file to the host's disk and wait for it (msync)."""
        assert self._mmap is not None, "the region is closed"
        if self._writable:
            self._mmap.flush()

    def close(self) -> None:
        """Drop the mapping. A view that a reply still holds keeps its pages until it is gone."""
        self._readable = self._view = memoryview(b"")
        self._bytes = np.zeros(0, np.uint8)
        self._words = np.zeros(0, np.uint64)
        if self._mmap is not None:
            os.close(self._descriptor)
        self._mmap = None

    def statistics(self) -> RegionStatistics:
        """Return how much was stored, flushed and fenced since the region was opened."""
        return RegionStatistics(
            stores=self._stores,
            stored_bytes=self._stored_bytes,
            flushed_lines=self._flushed_lines,
            fences=self._fences,
        )
