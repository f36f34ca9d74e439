"""Every structure of an image judged against SPEC.md; nothing is written.

A pending transaction is laid over the medium in memory and its result is judged, as a mount would
see it. Damage never ends the walk: what cannot be read is a finding and is left out, and a block
is entered once only, so that maps that run in a circle end too. One byte a block and one record an
inode are kept in memory.
"""

from __future__ import annotations

import hashlib
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.counters import Counters
from xipfs.image.filemap import seal
from xipfs.image.journal import Journal
from xipfs.image.record import Inode, unpack_inode
from xipfs.image.superblock import decode, load
from xipfs.memory.region import Medium

#: What a finding's name says; README.md has the same table.
FINDINGS: Final = {
    "superblock": "a copy of the superblock is damaged or differs from the other",
    "mount-flag": "the mount flag is neither of its two words",
    "journal": "the journal's pending transaction is damaged",
    "counters": "the counters fail their checksum, or do not match what they count",
    "inode": "an inode fails its checksum, or has a field out of range",
    "map": "a map entry fails its check, leaves the data area, or its node is empty",
    "shared-block": "a block has two owners",
    "bitmap": "a block is in use but marked free, or marked in use by nobody",
    "list": "the list of free inodes or of orphans is broken",
    "directory": "a leaf is damaged or misplaced, or a name is wrong or names nothing",
    "links": "a link count, a parent or the way from the root is wrong",
    "symlink": "a symbolic link's target is missing or has an impossible length",
    "xattrs": "a block of extended attributes is damaged",
}
_BLOCK: Final = layout.BLOCK_SIZE
_STATE: Final = layout.STATE_BLOCK * _BLOCK


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: its name (of FINDINGS), where in the image, of which inode, and what."""

    name: str
    offset: int
    ino: int | None
    what: str


def check(medium: Medium, name: str) -> list[Finding]:
    """Return all that is wrong with the image; raise ImageError if it has no superblock."""
    return _Check(medium, name).run()


class _Check:
    """The walk over one image."""

    def __init__(self, medium: Medium, name: str) -> None:
        self.medium = medium
        self.findings: list[Finding] = []
        self.superblock = load(medium, name)
        self.used = np.zeros(self.superblock.block_count, np.bool_)
        self.pages: Counter[bool] = Counter()
        self.inodes: dict[int, Inode] = {}
        self.places = {layout.TABLE_INO: _STATE + layout.TABLE_INODE_OFFSET}
        self.damaged: set[int] = set()
        self.links: Counter[int] = Counter()
        self.children: dict[int, list[tuple[int, int]]] = {}
        self.overlay: dict[int, bytearray] = {}

    def found(self, name: str, offset: int, what: str, ino: int | None = None) -> None:
        """Note a finding; offset 0 with an inode stands for that inode's record."""
        if offset == 0 and ino is not None:
            offset = self.places.get(ino, 0)
        self.findings.append(Finding(name, offset, ino, what))

    def block(self, number: int) -> bytearray:
        shown = self.overlay.get(number)
        return bytearray(self.medium.load(number * _BLOCK, _BLOCK)) if shown is None else shown

    def run(self) -> list[Finding]:
        self.check_head()
        state = self.block(layout.STATE_BLOCK)
        counters = None
        try:
            counters = Counters.load(state)
        except ImageError as error:
            self.found("counters", _STATE + layout.COUNTERS_OFFSET, error.what)
        self.read_table(state, counters)
        for inode in self.inodes.values():
            self.check_inode(inode)
        self.check_names()
        if counters is not None:
            self.check_lists(counters)
            self.check_counters(counters)
        self.check_bitmap()
        return self.findings

    def check_head(self) -> None:
        """Judge both superblocks, the mount flag and the journal; lay its records over."""
        for number in (layout.SUPERBLOCK_A, self.superblock.data_end):
            try:
                if decode(bytes(self.block(number))) != self.superblock:
                    self.found("superblock", number * _BLOCK, "differs from the other copy")
            except ImageError as error:
                self.found("superblock", number * _BLOCK, str(error))
        flag = int.from_bytes(self.block(layout.STATE_BLOCK)[:8], "little")
        if flag not in (layout.STATE_CLEAN, layout.STATE_MOUNTED):
            self.found("mount-flag", _STATE, f"{flag:#x}")
        try:
            records = Journal(self.medium, self.superblock).pending()
        except ImageError as error:
            self.found("journal", layout.JOURNAL_START * _BLOCK, error.what)
            return
        for offset, data in records:
            number, start = divmod(offset, _BLOCK)
            shown = self.overlay.setdefault(number, bytearray(self.block(number)))
            shown[start : start + len(data)] = data

    def read_table(self, state: bytearray, counters: Counters | None) -> None:
        try:
            table = unpack_inode(
                layout.TABLE_INO, state, layout.STATE_BLOCK, layout.TABLE_INODE_OFFSET
            )
        except ImageError as error:
            self.found("inode", _STATE + layout.TABLE_INODE_OFFSET, error.what, 0)
            return
        limit = (1 << 63) if counters is None else counters.inode_limit
        seen = 0
        for page, number, _pagecache in self.walk(table):
            raw = self.block(number)
            seen += 1
            for slot in range(layout.INODES_PER_BLOCK):
                ino, at = page * layout.INODES_PER_BLOCK + slot, slot * layout.INODE_SIZE
                record = raw[at : at + layout.INODE_SIZE]
                if ino == 0 or ino >= limit or (counters is None and not any(record)):
                    continue
                self.places[ino] = number * _BLOCK + at
                try:
                    self.inodes[ino] = unpack_inode(ino, raw, number, at)
                except ImageError as error:
                    self.damaged.add(ino)
                    self.found("inode", number * _BLOCK + at, error.what, ino)
        if counters is not None and seen != -(-limit // layout.INODES_PER_BLOCK):
            what = f"the inode table has {seen} pages for inode numbers below {limit}"
            self.found("map", _STATE + layout.TABLE_INODE_OFFSET, what, 0)

    def own(self, number: int, ino: int, offset: int) -> bool:
        """Whether the block is in the data area and had no owner; it has one now."""
        if not self.superblock.data_start <= number < self.superblock.data_end:
            self.found("map", offset, f"block {number} is outside the data area", ino)
            return False
        if self.used[number]:
            self.found("shared-block", number * _BLOCK, f"block {number} is owned twice", ino)
            return False
        self.used[number] = True
        return True

    def entry(self, ino: int, level: int, position: int, word: int, offset: int) -> int | None:
        """Return the block of a sound entry that nobody else owns."""
        body = word & layout.ENTRY_BODY_MASK
        home = (body & layout.ENTRY_HOME_MASK) >> layout.ENTRY_HOME_SHIFT
        wanted = layout.HOME_RAW if level in (0, 7) else layout.HOME_NODE
        if seal(ino, level, position, body) != word or home != wanted or body >> 44:
            self.found("map", offset, f"entry of level {level}, position {position}", ino)
            return None
        number = body & layout.ENTRY_BLOCK_MASK
        return number if self.own(number, ino, offset) else None

    def walk(self, inode: Inode) -> Iterator[tuple[int, int, bool]]:
        """Own all of the map; yield each page's number, block and kind."""
        owned = 0
        todo = [(inode.root, inode.height, 0, 0)]
        while todo:
            word, level, position, offset = todo.pop()
            if word == 0:
                continue
            number = self.entry(inode.ino, level, position, word, offset)
            if number is None:
                continue
            owned += 1
            if level == 0:
                yield position, number, bool(word & layout.ENTRY_PAGECACHE)
                continue
            words = np.frombuffer(self.block(number), "<u8")
            slots = np.flatnonzero(words)
            if not slots.size:
                self.found("map", number * _BLOCK, "an empty node", inode.ino)
            todo += [
                (int(words[s]), level - 1, position * layout.FANOUT + s, number * _BLOCK + s * 8)
                for s in reversed(slots.tolist())
            ]
        if inode.xattr_block:
            number = self.entry(inode.ino, 7, 0, inode.xattr_block, 0)
            if number is not None:
                owned += 1
                self.check_xattrs(inode.ino, number)
        if owned != inode.blocks:
            what = f"{inode.blocks} blocks in the inode, {owned} in its map"
            self.found("inode", 0, what, inode.ino)

    def check_xattrs(self, ino: int, number: int) -> None:
        raw = self.block(number)
        crc, count, used, owner = layout.XATTR_HEADER.unpack_from(raw)
        at, sound = layout.XATTR_HEADER.size, used <= _BLOCK and owner == ino
        sound = sound and zlib.crc32(raw[4:used]) == crc
        while sound and count and at + layout.XATTR_RECORD.size <= used:
            name, value = layout.XATTR_RECORD.unpack_from(raw, at)
            at += layout.XATTR_RECORD.size + name + value
            count -= 1
        if not sound or count or at != used:
            self.found("xattrs", number * _BLOCK, "the block is damaged", ino)

    def check_inode(self, inode: Inode) -> None:
        if inode.mode == 0:
            return
        pages = self.walk(inode)
        if stat.S_ISDIR(inode.mode):
            self.check_directory(inode, list(pages))
            return
        regular, link = stat.S_ISREG(inode.mode), stat.S_ISLNK(inode.mode)
        count = 0
        for page, number, pagecache in pages:
            count += 1
            if regular:
                self.pages[pagecache] += 1
                if page * _BLOCK >= inode.size_bytes and not inode.orphan:
                    self.found("map", number * _BLOCK, f"page {page} is behind the end", inode.ino)
        if link and (count != 1 or not 1 <= inode.size_bytes <= layout.SYMLINK_MAX):
            self.found("symlink", 0, f"{count} pages, {inode.size_bytes} bytes", inode.ino)

    def check_directory(self, inode: Inode, pages: list[tuple[int, int, bool]]) -> None:
        names: set[bytes] = set()
        self.children[inode.ino] = []
        spans = []
        for page, number, _pagecache in pages:
            depth = (page + 1).bit_length() - 1
            width = layout.HASH_BITS - depth
            spans.append(((page + 1 - (1 << depth)) << width, 1 << width))
            if not self.check_leaf(inode, page, number, names):
                self.found("directory", number * _BLOCK, f"leaf {page} is damaged", inode.ino)
        reached = 0
        for start, size in sorted(spans):
            if start != reached:
                self.found("directory", 0, "leaves overlap or leave a gap", inode.ino)
            reached = start + size
        if spans and reached != 1 << layout.HASH_BITS:
            self.found("directory", 0, "leaves end early", inode.ino)
        if inode.entries != len(names):
            what = f"{inode.entries} entries in the inode, {len(names)} names"
            self.found("directory", 0, what, inode.ino)

    def check_leaf(self, inode: Inode, page: int, number: int, names: set[bytes]) -> bool:
        """Collect the leaf's names; return whether all of it is as it must be."""
        raw = self.block(number)
        crc, count, used, owner, place, zero = layout.LEAF_HEADER.unpack_from(raw)
        if not layout.LEAF_HEADER.size <= used <= _BLOCK or zlib.crc32(raw[4:used]) != crc:
            return False
        depth = (page + 1).bit_length() - 1
        prefix = page + 1 - (1 << depth)
        sound = (owner, place, zero) == (inode.ino, page, 0) and depth <= 35
        at = layout.LEAF_HEADER.size
        while sound and at + layout.LEAF_RECORD.size <= used:
            hash_, ino, kind, length = layout.LEAF_RECORD.unpack_from(raw, at)
            start = at + layout.LEAF_RECORD.size
            name = bytes(raw[start : start + length])
            key = self.superblock.hash_key
            digest = hashlib.blake2b(name, digest_size=8, key=key).digest()
            sound = hash_ == int.from_bytes(digest, "little") % ((1 << 62) - 1) + 1
            sound = sound and hash_ >> (layout.HASH_BITS - depth) == prefix and length > 0
            sound = sound and name not in names and name not in (b".", b"..")
            sound = sound and b"/" not in name and b"\0" not in name
            names.add(name)
            self.children[inode.ino].append((ino, kind))
            at = start + length + -(start + length) % 8
            count -= 1
        return sound and count == 0 and at == used

    def check_names(self) -> None:
        """Judge what names point to, link counts, parents and the way from the root."""
        self.links[layout.ROOT_INO] += 2
        for parent, children in self.children.items():
            for ino, kind in children:
                target = self.inodes.get(ino)
                self.links[ino] += 1
                if target is None or target.mode == 0 or target.mode >> 12 != kind:
                    if ino not in self.damaged:
                        self.found("directory", 0, f"a name of inode {ino}, type {kind}", parent)
                elif stat.S_ISDIR(target.mode):
                    self.links[parent] += 1
                    self.links[ino] += 1
                    if target.parent != parent:
                        self.found("links", 0, f"parent {target.parent}, named in {parent}", ino)
        reached, todo = {layout.ROOT_INO}, [layout.ROOT_INO]
        while todo:
            below = {ino for ino, _kind in self.children.get(todo.pop(), ())} - reached
            reached |= below
            todo += below
        for ino, inode in self.inodes.items():
            if inode.mode and inode.nlink != self.links[ino]:
                self.found("links", 0, f"link count {inode.nlink}, not {self.links[ino]}", ino)
            elif inode.mode and ino not in reached and not inode.orphan:
                self.found("links", 0, "not reached from the root", ino)
        root = self.inodes.get(layout.ROOT_INO)
        if root is None or not stat.S_ISDIR(root.mode):
            self.found("inode", 0, "the root is no directory", layout.ROOT_INO)

    def check_lists(self, counters: Counters) -> None:
        free = {ino for ino, inode in self.inodes.items() if inode.mode == 0}
        orphans = {ino for ino, inode in self.inodes.items() if inode.mode and inode.orphan}
        lists = (("free", counters.free_ino, free), ("orphan", counters.orphan_ino, orphans))
        for title, ino, members in lists:
            previous, left = 0, set(members)
            while ino in left:
                left.remove(ino)
                inode = self.inodes[ino]
                if title == "orphan" and inode.previous_ino != previous:
                    self.found("list", 0, f"orphan list: previous is not {previous}", ino)
                previous, ino = ino, inode.next_ino
            if ino or left:
                what = f"{title} list: ends at inode {ino} with {len(left)} inodes not on it"
                self.found("list", _STATE + layout.COUNTERS_OFFSET, what)

    def check_counters(self, counters: Counters) -> None:
        area = self.superblock.data_end - self.superblock.data_start
        in_use = sum(1 for inode in self.inodes.values() if inode.mode)
        for title, stored, counted in (
            ("free blocks", counters.free_blocks, area - int(np.count_nonzero(self.used))),
            ("XIP pages", counters.nr_xip_pages, self.pages[False]),
            ("pagecache pages", counters.nr_pagecache_pages, self.pages[True]),
            ("inodes in use", counters.inodes_used, in_use),
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
