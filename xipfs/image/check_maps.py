"""The walk over an inode's map for fsck: each block gets its one owner, what is wrong is noted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xipfs.image import layout
from xipfs.image.filemap import Entries
from xipfs.image.record import Inode
from xipfs.image.records import Records
from xipfs.image.sound import PAGE_LEVEL, XATTR_LEVEL, entry_block, read_xattrs, sound_pages
from xipfs.image.superblock import Superblock
from xipfs.memory.region import Medium

_BLOCK: Final = layout.BLOCK_SIZE
_STATE: Final = layout.STATE_BLOCK * _BLOCK
#: Up to so many entries are judged faster one by one.
_FEW: Final = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: its name (of FINDINGS), where in the image, of which inode, and what."""

    name: str
    offset: int
    ino: int | None
    what: str


class Pages(NamedTuple):
    """Pages of a file: their numbers, blocks and whether they are pagecache pages."""

    numbers: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]
    pagecache: npt.NDArray[np.bool_]


class MapCheck:
    """An image being judged: its blocks, their owners and what was found."""

    def __init__(self, medium: Medium, superblock: Superblock) -> None:
        self.medium = medium
        self.findings: list[Finding] = []
        self.superblock = superblock
        self.used = np.zeros(self.superblock.block_count, np.bool_)
        self.records = Records(0)

    def found(self, name: str, offset: int, what: str, ino: int | None = None) -> None:
        """Note a finding; offset 0 with an inode stands for that inode's record."""
        if offset == 0 and ino is not None:
            offset = _STATE + layout.TABLE_INODE_OFFSET if ino == 0 else self.records.place_of(ino)
        self.findings.append(Finding(name, offset, ino, what))

    def block(self, number: int) -> memoryview:
        """Return the block's bytes, with the pending transaction in place."""
        return self.medium.load(number * _BLOCK, _BLOCK)

    def own(self, number: int, ino: int, offset: int) -> bool:
        """Whether the block had no owner; it has one now."""
        if self.used[number]:
            what = f"block {number} is owned twice, here by the entry at offset {offset}"
            self.found("shared-block", number * _BLOCK, what, ino)
            return False
        self.used[number] = True
        return True

    def walk(self, inode: Inode) -> Iterator[Pages]:
        """Own all of the map; yield the pages, a leaf's at a time, in their order."""
        owned = 0
        root_at = inode.record_offset + layout.INODE_ROOT_OFFSET
        todo = [(inode.root, inode.height, 0, root_at)]
        if inode.root == 0 and inode.height:
            self.found("inode", 0, f"height {inode.height} without a root", inode.ino)
        while todo:
            word, level, position, offset = todo.pop()
            number = entry_block(self.superblock, inode.ino, level, position, word)
            if number is None:
                if word:
                    self.bad_entry(inode.ino, level, position, offset)
                continue
            if not self.own(number, inode.ino, offset):
                continue
            owned += 1
            if level == PAGE_LEVEL:
                yield _single_page(position, word)
                continue
            words: Entries = np.frombuffer(self.block(number), "<u8")
            slots = np.flatnonzero(words)
            if not slots.size:
                self.found("map", number * _BLOCK, "an empty node", inode.ino)
            first, base = position * layout.FANOUT, number * _BLOCK
            if level == 1:
                pages = self.own_pages(inode.ino, first, words, base)
                owned += pages.numbers.size
                yield pages
                continue
            todo += [
                (int(words[s]), level - 1, first + s, base + s * 8) for s in slots[::-1].tolist()
            ]
        owned += self.own_xattrs(inode)
        if owned != inode.blocks:
            what = f"{inode.blocks} blocks in the inode, {owned} in its map"
            self.found("inode", 0, what, inode.ino)

    def bad_entry(self, ino: int, level: int, position: int, offset: int) -> None:
        """Note an entry that cannot be followed, and the pages that it hides."""
        first, count = position << 9 * level, 1 << 9 * level
        what = f"entry of level {level}, position {position}: page {first}"
        what += f" to {first + count - 1}" if count > 1 else ""
        self.found("map", offset, what, ino)

    def own_pages(self, ino: int, first: int, words: Entries, base: int) -> Pages:
        """Own the pages of a node of level 1."""
        slots = np.flatnonzero(words)
        if slots.size > _FEW:
            sound = sound_pages(self.superblock, ino, first, words)[slots]
        else:
            sound = np.array(
                [
                    entry_block(self.superblock, ino, PAGE_LEVEL, first + slot, word) is not None
                    for slot, word in zip(slots.tolist(), words[slots].tolist(), strict=True)
                ],
                np.bool_,
            )
        for slot in slots[~sound].tolist():
            self.bad_entry(ino, PAGE_LEVEL, first + slot, base + slot * 8)
        slots = slots[sound]
        blocks = (words[slots] & np.uint64(layout.ENTRY_BLOCK_MASK)).astype(np.int64)
        if self.used[blocks].any() or np.unique(blocks).size != blocks.size:
            mine = [
                self.own(int(block), ino, base + int(slot) * 8)
                for block, slot in zip(blocks, slots, strict=True)
            ]
            slots, blocks = slots[mine], blocks[mine]
        self.used[blocks] = True
        return Pages(slots + first, blocks, words[slots] & np.uint64(layout.ENTRY_PAGECACHE) != 0)

    def own_xattrs(self, inode: Inode) -> int:
        """Own and judge the block of extended attributes; return whether there is one."""
        word, offset = inode.xattr_block, inode.record_offset + layout.INODE_XATTR_OFFSET
        if word == 0:
            return 0
        number = entry_block(self.superblock, inode.ino, XATTR_LEVEL, 0, word)
        if number is None:
            self.found("map", offset, "the entry of the extended attributes", inode.ino)
            return 0
        if not self.own(number, inode.ino, offset):
            return 0
        if not read_xattrs(self.block(number), inode.ino)[1]:
            self.found("xattrs", number * _BLOCK, "the block is damaged", inode.ino)
        return 1


def _single_page(position: int, word: int) -> Pages:
    block = word & layout.ENTRY_BLOCK_MASK
    pagecache = bool(word & layout.ENTRY_PAGECACHE)
    return Pages(np.array([position]), np.array([block]), np.array([pagecache]))
