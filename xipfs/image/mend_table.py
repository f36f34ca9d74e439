"""Repairing the inode table, and finding what no map leads to any more.

A record's checksum starts with its number, so a page of the table is told from its records alone;
a leaf of a directory says whose it is. Both are looked for among the blocks that nobody owns,
before any of these is given out again.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Final

import numpy as np

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.directory import DirectoryEntry
from xipfs.image.mend_maps import MapMending, salvaged
from xipfs.image.mending import FREE, STRUCTURE, map_height
from xipfs.image.record import Inode, pack_inode, unpack_inode
from xipfs.image.records import Records, plain_table
from xipfs.image.sound import read_leaf

_BLOCK: Final = layout.BLOCK_SIZE
_TABLE: Final = layout.STATE_BLOCK * _BLOCK + layout.TABLE_INODE_OFFSET
_SIZE: Final = layout.INODE_SIZE
_SLOTS: Final = layout.INODES_PER_BLOCK
#: Pages of the table that are looked for at most: their 2^17 numbers take some 15 MB.
_LOST_MAX: Final = 4096


class TableMending(MapMending):
    """Repairs the table first, completes it when it is known what is free."""

    inode_limit: int
    #: Whether the map that the table has leads to all its pages.
    table_whole: bool
    #: The table's blocks by page; those that could not be found are missing.
    table_pages: dict[int, int]
    #: Names of directories' leaves that no map leads to, by directory.
    lost_names: dict[int, list[DirectoryEntry]]

    def mend_table(self) -> None:
        """Repair the table's map; find its pages that the map has lost."""
        raw = bytes(self.block(layout.STATE_BLOCK)[layout.TABLE_INODE_OFFSET :][:_SIZE])
        try:
            table = unpack_inode(layout.TABLE_INO, bytearray(raw), 0, 0)
        except ImageError:
            table = salvaged(layout.TABLE_INO, raw, _TABLE)
        table.record_offset, table.mode = _TABLE, 0
        table.height = self.height_of(table) or 0
        self.mend_map(table)
        self.table_pages = dict(self.pages(table))
        wanted = min(-(-self.inode_limit // _SLOTS), self.superblock.block_count)
        lost = [page for page in range(max(wanted, 1)) if page not in self.table_pages]
        found = self.find_table_pages(lost[:_LOST_MAX]) if lost else {}
        for page, number in found.items():
            self.used[number] = STRUCTURE
            self.did("map", number * _BLOCK, f"page {page} of the inode table found again", 0)
        self.table_pages |= found
        self.table = table
        count = max(self.table_pages, default=0) + 1
        self.table_whole = len(self.table_pages) == count and not found
        if self.table_whole:
            self.put_table(raw, count)
        self.settle_limit(count)

    def put_table(self, raw: bytes, count: int) -> None:
        """Write the table's inode if it is not as it must be."""
        self.table.size_bytes = count * _BLOCK
        self.table = dataclasses.replace(plain_table(self.table), record_offset=_TABLE)
        if pack_inode(self.table) != raw:
            self.put(self.table)
            self.did("inode", _TABLE, "the table's fields put right", layout.TABLE_INO)

    def find_table_pages(self, lost: list[int]) -> dict[int, int]:
        """Return (page: block) of pages of the table found among blocks that the table has not."""
        zeros = bytes(_SIZE - 4)
        base = zlib.crc32(zeros)
        # crc32(body, start) is crc32(body) xor what the start alone gives: a record tells its own.
        starts = {
            zlib.crc32(zeros, zlib.crc32(ino.to_bytes(8, "little"))) ^ base: ino
            for page in lost
            for ino in range(page * _SLOTS, (page + 1) * _SLOTS)
        }
        found: dict[int, int] = {}
        for number in np.flatnonzero(self.used == FREE).tolist():
            raw = self.block(number)
            for slot in range(_SLOTS):
                record = raw[slot * _SIZE : (slot + 1) * _SIZE]
                crc = int.from_bytes(record[:4], "little")
                ino = starts.get(zlib.crc32(record[4:]) ^ crc) if crc else None
                if ino is not None and ino % _SLOTS == slot:
                    found.setdefault(ino // _SLOTS, number)
                    break
        return found

    def settle_limit(self, count: int) -> None:
        """Believe the counters' limit of inode numbers if it fits the table and loses nothing."""
        highest = count * _SLOTS
        lowest = highest - _SLOTS + 1
        last = self.table_pages.get(count - 1)
        for slot in range(_SLOTS if last is not None else 0):
            ino = highest - _SLOTS + slot
            try:
                if unpack_inode(ino, self.block(last or 0), last or 0, slot * _SIZE).mode:
                    lowest = ino + 1
            except ImageError:
                continue
        if not max(lowest, layout.ROOT_INO + 1) <= self.inode_limit <= highest:
            self.inode_limit = highest
        self.records = Records(self.inode_limit)

    def complete_table(self) -> None:
        """Give the table pages for those that are gone, and a map of all of them.

        Raise NoRoomError if that needs more blocks than are free.
        """
        if self.table_whole:
            return
        count = max(self.table_pages, default=0) + 1
        raw = bytes(self.block(layout.STATE_BLOCK)[layout.TABLE_INODE_OFFSET :][:_SIZE])
        missing = [page for page in range(count) if page not in self.table_pages]
        nodes_by_place = {
            (level, at): number for level, at, number in self.tree(self.table) if level
        }
        for page in missing:
            records = bytearray(_BLOCK)
            for slot in range(_SLOTS):
                ino = page * _SLOTS + slot
                if 0 < ino < self.inode_limit:
                    records[slot * _SIZE : (slot + 1) * _SIZE] = pack_inode(Inode(ino))
            number = self.table_pages[page] = self.take(bytes(records), STRUCTURE)
            for slot in range(_SLOTS):
                ino = page * _SLOTS + slot
                if 0 < ino < self.inode_limit:
                    self.records.places[ino] = number * _BLOCK + slot * _SIZE
            what = f"inodes {page * _SLOTS} to {page * _SLOTS + _SLOTS - 1} are gone"
            self.did("map", _TABLE, what, layout.TABLE_INO)
        # On a full image there is no block for a second map.
        same_height = self.table.height == map_height(self.table_pages)
        kept = nodes_by_place if same_height else {}
        root, height, nodes = self.build_map(layout.TABLE_INO, self.table_pages, kept)
        self.table.root, self.table.height = root, height
        self.table.blocks = len(self.table_pages) + len(nodes)
        self.put_table(raw, count)
        self.untake([number for number in nodes_by_place.values() if number not in nodes])

    def find_lost_names(self) -> None:
        """Look for leaves in blocks that the bitmap calls used and that nobody owns."""
        for index in range(self.superblock.bitmap_blocks):
            number = self.superblock.bitmap_start + index
            bits = np.unpackbits(np.frombuffer(self.block(number), np.uint8), bitorder="little")
            first = index * layout.BITS_PER_BLOCK
            part = self.used[first : first + layout.BITS_PER_BLOCK]
            for at in np.flatnonzero((part == FREE) & (bits[: part.size] != 0)).tolist():
                raw = self.block(first + at)
                _crc, _count, _used, owner, page, _zero = layout.LEAF_HEADER.unpack_from(raw)
                names = read_leaf(self.superblock, raw, owner, page)
                if names:
                    self.lost_names.setdefault(owner, []).extend(names)
