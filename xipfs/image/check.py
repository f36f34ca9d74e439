"""Every structure of an image judged against SPEC.md; nothing is written.

A pending transaction is laid over the medium in memory and its result is judged, as a mount would
see it. Damage never ends the walk: what cannot be read is a finding and is left out, and a block
is entered once only, so that maps that run in a circle end too. Memory: one byte a block, 51 bytes
an inode number (`Records`), the names of one directory at a time, and the findings themselves.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.check_maps import Finding, MapCheck, Pages
from xipfs.image.counters import Counters
from xipfs.image.journal import Journal
from xipfs.image.record import Inode, unpack_inode
from xipfs.image.records import DAMAGED, Records, is_plain, plain_table
from xipfs.image.sound import leaf_place, read_leaf
from xipfs.image.superblock import decode, load
from xipfs.memory.overlaid import Overlaid
from xipfs.memory.region import Medium

#: What a finding's name says; README.md has the same table.
FINDINGS: Final = {
    "superblock": "a copy of the superblock is damaged or differs from the other",
    "mount-flag": "the mount flag is none of its words, or a repair was interrupted",
    "journal": "the journal's pending transaction is damaged",
    "counters": "the counters fail their checksum, or do not match what they count",
    "reserved": "bytes that must be zero are not",
    "inode": "an inode fails its checksum, or has a field that its type cannot have",
    "map": "a map entry fails its check, leaves the data area, or its node is empty",
    "shared-block": "a block has two owners",
    "bitmap": "a block is in use but marked free, or marked in use by nobody",
    "list": "the list of free inodes or of orphans is broken",
    "directory": "a leaf is damaged or misplaced, or a name is wrong or names nothing",
    "links": "a link count or a directory's parent is wrong",
    "unreachable": "an inode in use has no way from the root",
    "symlink": "a symbolic link's target is missing, of an impossible length or holds a zero",
    "xattrs": "a block of extended attributes is damaged",
}
_BLOCK: Final = layout.BLOCK_SIZE
_STATE: Final = layout.STATE_BLOCK * _BLOCK
_STATE_USED: Final = layout.TABLE_INODE_OFFSET + layout.INODE_SIZE

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is: inodes, once to read and once to judge."""


def check(medium: Medium, name: str, progress: Progress | None = None) -> list[Finding]:
    """Return all that is wrong with the image; raise ImageError if it has no superblock."""
    return _Check(medium, name, progress).run()


class _Check(MapCheck):
    """The walk over one image."""

    def __init__(self, medium: Medium, name: str, progress: Progress | None) -> None:
        super().__init__(medium, load(medium, name))
        self.progress = progress
        self.nr_pages = [0, 0]

    def run(self) -> list[Finding]:
        self.check_head()
        state = self.block(layout.STATE_BLOCK)
        counters = None
        try:
            counters = Counters.load(state)
        except ImageError as error:
            self.found("counters", _STATE + layout.COUNTERS_OFFSET, error.what)
        if any(state[8 : layout.COUNTERS_OFFSET]) or any(state[_STATE_USED:]):
            self.found("reserved", _STATE, "bytes of the state block that no field uses")
        table = self.read_table(state, counters)
        self.check_inodes(table)
        self.check_links()
        if counters is not None:
            self.check_lists(counters)
            self.check_counters(counters)
        self.check_bitmap()
        self.tell(2 * self.records.limit)
        return self.findings

    def check_head(self) -> None:
        """Judge both superblocks, the mount flag and the journal; lay its records over."""
        for number in (layout.SUPERBLOCK_A, self.superblock.data_end):
            raw = bytes(self.block(number))
            try:
                if decode(raw) != self.superblock:
                    self.found("superblock", number * _BLOCK, "differs from the other copy")
                elif any(raw[layout.SUPERBLOCK.size :]) or any(
                    raw[layout.SUPERBLOCK.size - 64 + raw[113] : layout.SUPERBLOCK.size]
                ):
                    self.found("reserved", number * _BLOCK, "superblock: bytes behind its fields")
            except ImageError as error:
                self.found("superblock", number * _BLOCK, str(error))
        flag = int.from_bytes(self.block(layout.STATE_BLOCK)[:8], "little")
        if flag == layout.STATE_REPAIR:
            self.found("mount-flag", _STATE, "a repair was interrupted")
        elif flag not in (layout.STATE_CLEAN, layout.STATE_MOUNTED):
            self.found("mount-flag", _STATE, f"{flag:#x}")
        try:
            records = Journal(self.medium, self.superblock).pending()
        except ImageError as error:
            self.found("journal", layout.JOURNAL_START * _BLOCK, error.what)
            return
        if records:
            self.medium = Overlaid(self.medium, records)

    def read_table(
        self, state: bytearray | memoryview, counters: Counters | None
    ) -> list[tuple[int, int]]:
        """Read all inode records; return (page, block) of the table."""
        at = layout.TABLE_INODE_OFFSET
        try:
            table = unpack_inode(layout.TABLE_INO, state, layout.STATE_BLOCK, at)
        except ImageError as error:
            self.found("inode", _STATE + at, error.what, 0)
            return []
        if table != plain_table(table):
            self.found("inode", _STATE + at, "the table's inode has fields it cannot have", 0)
        pages = [
            (int(page), int(block))
            for part in self.walk(table)
            for page, block in zip(part.numbers, part.blocks, strict=True)
        ]
        limit = (pages[-1][0] + 1 if pages else 0) * layout.INODES_PER_BLOCK
        if counters is not None:
            wanted = -(-counters.inode_limit // layout.INODES_PER_BLOCK)
            if len(pages) != wanted or table.size_bytes != wanted * _BLOCK:
                what = f"the inode table has {len(pages)} pages and {table.size_bytes} bytes for"
                what += f" inode numbers below {counters.inode_limit}"
                self.found("map", _STATE + at, what, 0)
            limit = min(limit, counters.inode_limit)
        self.records = Records(limit)
        for page, block in pages:
            self.tell(page * layout.INODES_PER_BLOCK)
            self.read_records(page, block, zero_is_free=counters is None)
        return pages

    def tell(self, done: int) -> None:
        """Tell how far the check is, in inodes."""
        if self.progress is not None:
            self.progress(done, 2 * self.records.limit)

    def read_records(self, page: int, block: int, *, zero_is_free: bool) -> None:
        raw = self.block(block)
        for slot in range(layout.INODES_PER_BLOCK):
            ino, at = page * layout.INODES_PER_BLOCK + slot, slot * layout.INODE_SIZE
            used = 0 < ino < self.records.limit
            if not used or (zero_is_free and not any(raw[at : at + layout.INODE_SIZE])):
                if any(raw[at : at + layout.INODE_SIZE]) and not used:
                    self.found("reserved", block * _BLOCK + at, f"inode {ino} was never used")
                continue
            try:
                self.records.note(unpack_inode(ino, raw, block, at))
            except ImageError as error:
                self.records.note_damaged(ino, block * _BLOCK + at)
                self.found("inode", block * _BLOCK + at, error.what, ino)

    def check_inodes(self, table: list[tuple[int, int]]) -> None:
        records = self.records
        for page, block in table:
            self.tell(records.limit + page * layout.INODES_PER_BLOCK)
            first = page * layout.INODES_PER_BLOCK
            for slot in range(layout.INODES_PER_BLOCK):
                ino, at = first + slot, slot * layout.INODE_SIZE
                known = 0 < ino < records.limit and records.places[ino]
                if known and records.kinds[ino] != DAMAGED:
                    self.check_inode(unpack_inode(ino, self.block(block), block, at))

    def check_inode(self, inode: Inode) -> None:
        if not is_plain(inode):
            self.found("inode", 0, "a field that an inode of its type cannot have", inode.ino)
        if inode.mode == 0:
            return
        pages = self.walk(inode)
        if stat.S_ISDIR(inode.mode):
            self.check_directory(inode, pages)
        elif stat.S_ISREG(inode.mode):
            end = -(-inode.size_bytes // _BLOCK)
            for part in pages:
                cached = int(np.count_nonzero(part.pagecache))
                self.nr_pages[1] += cached
                self.nr_pages[0] += part.numbers.size - cached
                behind = np.flatnonzero(part.numbers >= end)
                if behind.size and not inode.orphan:
                    at, page = int(part.blocks[behind[0]]), int(part.numbers[behind[0]])
                    self.found("map", at * _BLOCK, f"page {page} is behind the end", inode.ino)
        else:
            self.check_special(inode, pages)

    def check_special(self, inode: Inode, pages: Iterator[Pages]) -> None:
        """Judge a symbolic link, or what must not have pages at all."""
        blocks = [int(block) for part in pages for block in part.blocks]
        if stat.S_ISLNK(inode.mode):
            size = inode.size_bytes
            if len(blocks) != 1 or inode.height or not 1 <= size <= layout.SYMLINK_MAX:
                self.found("symlink", 0, f"{len(blocks)} pages, {size} bytes", inode.ino)
                return
            raw = bytes(self.block(blocks[0]))
            if b"\0" in raw[:size] or any(raw[size:]):
                what = "a zero within the target, or bytes behind it"
                self.found("symlink", blocks[0] * _BLOCK, what, inode.ino)
        elif blocks:
            self.found("inode", 0, "pages of an inode that cannot have any", inode.ino)

    def check_directory(self, inode: Inode, pages: Iterator[Pages]) -> None:
        names: set[bytes] = set()
        spans = []
        for part in pages:
            for page, block in zip(part.numbers.tolist(), part.blocks.tolist(), strict=True):
                depth, prefix = leaf_place(page)
                width = max(layout.HASH_BITS - depth, 0)
                spans.append((prefix << width, 1 << width))
                if not self.check_leaf(inode.ino, page, block, names):
                    self.found("directory", block * _BLOCK, f"leaf {page} is damaged", inode.ino)
        reached = 0
        for start, size in sorted(spans):
            if start != reached:
                self.found("directory", 0, "leaves overlap or leave a gap", inode.ino)
            reached = start + size
        if spans and reached != 1 << layout.HASH_BITS:
            self.found("directory", 0, "leaves end early", inode.ino)
        if inode.entries != len(names) or (spans and not names):
            what = f"{inode.entries} entries in the inode, {len(names)} names"
            self.found("directory", 0, what, inode.ino)

    def check_leaf(self, ino: int, page: int, block: int, names: set[bytes]) -> bool:
        """Count the leaf's names as links; return whether all of it is as it must be."""
        records = self.records
        found = read_leaf(self.superblock, self.block(block), ino, page)
        for name in found or ():
            if name.name in names:
                return False
            names.add(name.name)
            known = name.ino < records.limit
            kind = int(records.kinds[name.ino]) if known else 0
            if known and kind == DAMAGED:
                continue
            if not known or kind == 0 or kind != name.kind or name.ino == layout.ROOT_INO:
                what = f"a name of inode {name.ino}, type {name.kind}"
                self.found("directory", block * _BLOCK, what, ino)
            else:
                records.link(ino, name.ino)
        return found is not None

    def check_links(self) -> None:
        """Judge link counts, parents and the way from the root."""
        records = self.records
        root = layout.ROOT_INO
        if records.limit <= root or records.kinds[root] != stat.S_IFDIR >> 12:
            self.found("inode", 0, "the root is no directory", root)
        else:
            records.links[root] += 2
            records.named_in[root] = root
        for ino in records.in_use():
            counted, stored = int(records.links[ino]), int(records.nlinks[ino])
            if stored != counted:
                self.found("links", 0, f"link count {stored}, not {counted}", ino)
            if counted == 0 and not records.orphans[ino]:
                self.found("unreachable", 0, "no directory names it", ino)
            if records.kinds[ino] == stat.S_IFDIR >> 12 and counted:
                named, parent = int(records.named_in[ino]), int(records.parents[ino])
                if named != parent:
                    self.found("links", 0, f"parent {parent}, named in {named}", ino)
        for ino in records.astray():
            self.found("unreachable", 0, "the directories above it run in a circle", ino)

    def check_lists(self, counters: Counters) -> None:
        records = self.records
        for title, head, members in (
            ("free", counters.free_ino, records.free()),
            ("orphan", counters.orphan_ino, records.orphaned()),
        ):
            on, previous, ino = 0, 0, head
            while 0 < ino < records.limit and members[ino]:
                members[ino] = False
                on += 1
                if title == "orphan" and records.previous[ino] != previous:
                    self.found("list", 0, f"orphan list: previous is not {previous}", ino)
                previous, ino = ino, int(records.following[ino])
            left = int(np.count_nonzero(members))
            if ino or left:
                what = f"{title} list: ends at inode {ino} with {left} inodes not on it"
                self.found("list", _STATE + layout.COUNTERS_OFFSET, what)

    def check_counters(self, counters: Counters) -> None:
        area = self.superblock.data_end - self.superblock.data_start
        for title, stored, counted in (
            ("free blocks", counters.free_blocks, area - int(np.count_nonzero(self.used))),
            ("XIP pages", counters.nr_xip_pages, self.nr_pages[0]),
            ("pagecache pages", counters.nr_pagecache_pages, self.nr_pages[1]),
            ("inodes in use", counters.inodes_used, self.records.nr_in_use()),
        ):
            if stored != counted:
                what = f"{title}: {stored} stored, {counted} counted"
                self.found("counters", _STATE + layout.COUNTERS_OFFSET, what)

    def check_bitmap(self) -> None:
        """Compare the bitmap with the blocks owned, one finding a bitmap block."""
        self.used[: self.superblock.data_start] = True
        self.used[self.superblock.data_end :] = True
        for index in range(self.superblock.bitmap_blocks):
            first, number = index * layout.BITS_PER_BLOCK, self.superblock.bitmap_start + index
            bits = np.unpackbits(np.frombuffer(self.block(number), np.uint8), bitorder="little")
            wanted = np.ones(layout.BITS_PER_BLOCK, np.bool_)
            part = self.used[first : first + layout.BITS_PER_BLOCK]
            wanted[: part.size] = part
            wrong = np.flatnonzero(bits != wanted)
            if wrong.size:
                leaked = int(np.count_nonzero(bits[wrong]))
                what = f"{leaked} blocks leaked, {wrong.size - leaked} in use but marked free; "
                what += f"the first is {first + int(wrong[0])}"
                self.found("bitmap", number * _BLOCK + int(wrong[0]) // 8, what)
