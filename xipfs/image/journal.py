"""The redo journal: one slot, one transaction at a time, four fences.

A transaction is a list of (offset, bytes) records in whole lines. To commit it:

    1. store header (without mark) and records, flush, fence    they are durable, but not valid
    2. store the mark, one word, flush, fence                    from here on the transaction holds
    3. store every record at its place, flush, fence             may be cut and repeated
    4. clear the mark, flush, fence                              the slot may be overwritten

A cut before 2 leaves the image as it was; a cut after it is finished by ``recover``, which does 3
and 4 again. The checksum is not needed for that order; it tells damage from a cut. One slot is
enough because the core is synchronous: a second transaction begins after the first has ended.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Sequence
from typing import Final

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.superblock import Superblock
from xipfs.memory.region import LINE_SIZE, Medium

Record = tuple[int, bytes]
"""Offset in the image and the bytes that belong there, both in whole lines."""

#: Fences of one transaction: one a step.
FENCES: Final = 4


def flushed_lines(records: int, lines: int) -> int:
    """Return how many lines a transaction of so many records, together ``lines`` long, flushes.

    The header, the payload, the mark, each record at its place, the mark again.

    >>> flushed_lines(2, 2)
    8
    """
    payload_bytes = records * layout.JOURNAL_RECORD.size + lines * LINE_SIZE
    return 1 + -(-payload_bytes // LINE_SIZE) + 1 + lines + 1


class Journal:
    """The journal area of one image."""

    def __init__(self, medium: Medium, superblock: Superblock) -> None:
        self._medium = medium
        self._superblock = superblock
        self._start = superblock.journal_start << layout.BLOCK_SHIFT
        self.capacity_bytes = (superblock.journal_blocks << layout.BLOCK_SHIFT) - LINE_SIZE
        self._sequence = 0

    def commit(self, records: Sequence[Record]) -> None:
        """Make ``records`` durable, all or none.

        Raises FsError: ENOSPC if they do not fit the journal, what ``reserve`` raises if they do
        not fit the host's disk.
        """
        payload = b"".join(
            layout.JOURNAL_RECORD.pack(offset, len(data)) + data for offset, data in records
        )
        if len(payload) > self.capacity_bytes:
            raise FsError(
                errno.ENOSPC,
                f"a transaction of {len(payload)} bytes exceeds the journal's"
                f" {self.capacity_bytes}",
            )
        medium, start = self._medium, self._start
        self._reserve(len(payload), records)
        if self._is_marked():
            # An exception ended step 3 of the last commit: what it began holds.
            raise ImageError(
                f"journal at offset {start} holds an unfinished transaction",
                remedy="mount the image anew, which finishes it",
            )
        self._sequence += 1
        header = layout.JOURNAL_HEADER.pack(
            0, self._sequence, len(payload), self._checksum(self._sequence, payload), 0
        )
        medium.store(start + LINE_SIZE, payload)
        # The mark's word is left alone here: it is zero, and step 2 alone may change it.
        medium.store(start + 8, header[8:])
        medium.flush(start, LINE_SIZE + len(payload))
        medium.fence()
        medium.store_word(start, layout.JOURNAL_MARK)
        medium.flush(start, 8)
        medium.fence()
        self._apply(records)
        self._clear()

    def pending(self) -> list[Record]:
        """Return the records of a committed transaction that may not have reached their places."""
        header = bytes(self._medium.load(self._start, LINE_SIZE))
        mark, sequence, length, crc, _zero = layout.JOURNAL_HEADER.unpack_from(header)
        if mark == 0:
            return []
        where = f"journal at offset {self._start}"
        if mark != layout.JOURNAL_MARK or length > self.capacity_bytes:
            raise ImageError(f"{where} has a damaged header", remedy="run fsck.xipfs")
        payload = bytes(self._medium.load(self._start + LINE_SIZE, length))
        if crc != self._checksum(sequence, payload):
            raise ImageError(f"{where} fails its checksum", remedy="run fsck.xipfs")
        records = []
        position = 0
        while position < length:
            if position + layout.JOURNAL_RECORD.size > length:
                raise ImageError(f"{where} ends within a record", remedy="run fsck.xipfs")
            offset, size = layout.JOURNAL_RECORD.unpack_from(payload, position)
            position += layout.JOURNAL_RECORD.size
            data = payload[position : position + size]
            if not self._allowed(offset, size) or len(data) != size:
                raise ImageError(
                    f"{where} has a record for offset {offset}", remedy="run fsck.xipfs"
                )
            records.append((offset, data))
            position += size
        return records

    def recover(self) -> int:
        """Finish the pending transaction, if any; return its number of records."""
        records = self.pending()
        if self._is_marked():
            self._reserve(0, records)
            self._apply(records)
            self._clear()
        return len(records)

    def _reserve(self, payload_bytes: int, records: Sequence[Record]) -> None:
        """Raise FsError before the first store of a transaction that the host has no room for."""
        self._medium.reserve(self._start, LINE_SIZE + payload_bytes)
        for offset, data in records:
            self._medium.reserve(offset, len(data))

    def _is_marked(self) -> bool:
        return any(self._medium.load(self._start, 8))

    def _allowed(self, offset: int, size: int) -> bool:
        """Whether a record may go there: the state block, or after the journal, in one block."""
        block = offset >> layout.BLOCK_SHIFT
        within = block == layout.STATE_BLOCK or (
            self._superblock.bitmap_start <= block < self._superblock.data_end
        )
        aligned = offset % LINE_SIZE == 0 and size % LINE_SIZE == 0
        inside = 0 < size <= layout.BLOCK_SIZE - offset % layout.BLOCK_SIZE
        return within and aligned and inside

    def _apply(self, records: Sequence[Record]) -> None:
        for offset, data in records:
            self._medium.store(offset, data)
            self._medium.flush(offset, len(data))
        self._medium.fence()

    def _clear(self) -> None:
        self._medium.store_word(self._start, 0)
        self._medium.flush(self._start, 8)
        self._medium.fence()

    @staticmethod
    def _checksum(sequence: int, payload: bytes) -> int:
        return zlib.crc32(payload, zlib.crc32(b"%d %d" % (sequence, len(payload))))
