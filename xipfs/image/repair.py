"""Repairing an image: every finding of ``check``, so that what can be read stays readable.

Order: superblocks and journal; inodes and their maps; directories; the lists, bitmap and counters
that follow from them; then link counts and what nobody names. Every step is a transaction or a
store that can be made again, and none takes away what an earlier state could read, so a repair that
was cut is begun again from the start. Meanwhile the mount flag says that a repair is under way.
"""

from __future__ import annotations

import stat
from typing import Final, NamedTuple

import numpy as np

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.check import Progress
from xipfs.image.check_maps import Finding
from xipfs.image.counters import Counters
from xipfs.image.mend_names import NameMending
from xipfs.image.mend_table import TableMending
from xipfs.image.mending import FREE, NoRoomError
from xipfs.image.reconnect import Reconnecting
from xipfs.image.record import Inode
from xipfs.image.records import Flags
from xipfs.image.sound import is_leaf_of
from xipfs.image.superblock import encode, load
from xipfs.memory.region import Medium

_BLOCK: Final = layout.BLOCK_SIZE
_STATE: Final = layout.STATE_BLOCK * _BLOCK
_TABLE: Final = _STATE + layout.TABLE_INODE_OFFSET
_COUNTERS: Final = _STATE + layout.COUNTERS_OFFSET
_STATE_USED: Final = layout.TABLE_INODE_OFFSET + layout.INODE_SIZE
_DIRECTORY: Final = stat.S_IFDIR >> 12

#: Findings whose repair is never a choice: what is right follows from the rest of the image.
SAFE: Final = {"superblock", "mount-flag", "counters", "reserved", "bitmap", "list", "links"}


def was_clean(medium: Medium, name: str) -> bool:
    """Whether the image was cleanly unmounted; raise ImageError if it has no superblock."""
    load(medium, name)
    return int.from_bytes(medium.load(_STATE, 8), "little") == layout.STATE_CLEAN


def mark_clean(medium: Medium) -> None:
    """Say that the image is what a clean unmount leaves: ``check`` found nothing."""
    _set_flag(medium, layout.STATE_CLEAN)


def _set_flag(medium: Medium, value: int) -> None:
    medium.store_word(_STATE + layout.MOUNT_FLAG_OFFSET, value)
    medium.flush(_STATE, 8)
    medium.fence()


class Repaired(NamedTuple):
    """What was done, and whether something could not be, since no block was free for it."""

    done: list[Finding]
    lacked_room: bool


def repair(medium: Medium, name: str, progress: Progress | None = None) -> Repaired:
    """Repair the image and return what was done; raise ImageError if it has no superblock.

    The image is left as not cleanly unmounted: whoever finds nothing more may ``mark_clean``.
    """
    return _Repair(medium, name, progress).run()


class _Repair(TableMending, NameMending):
    """One repair."""

    def __init__(self, medium: Medium, name: str, progress: Progress | None) -> None:
        super().__init__(medium, load(medium, name))
        self.doubles = []
        self.stolen = set()
        self.table_pages = {}
        self.lost_names = {}
        self.progress = progress
        self.counters: Counters | None = None
        self.inode_limit = 0

    def run(self) -> Repaired:
        """Repair; see the module."""
        self.mend_head()
        self.mend_table()
        self.mend_inodes()
        # From here on it is known which blocks are free.
        self.find_lost_names()
        try:
            self.complete_table()
        except NoRoomError:
            # What follows needs the table. As it is the image can be mounted, maybe read-only.
            _set_flag(self.medium, layout.STATE_MOUNTED)
            return Repaired(self.done, self.lacked_room)
        old_root = self.mend_root()
        self.part_all_doubles()
        self.untake(old_root)
        self.mend_links()
        for ino in self.records.in_use():
            if self.records.kinds[ino] == _DIRECTORY:
                self.tell(self.inode_limit + ino)
                self.mend_directory(self.inode_of(ino))
        self.records.links[layout.ROOT_INO] += 2
        self.records.named_in[layout.ROOT_INO] = layout.ROOT_INO
        self.break_circles()
        self.mend_lists()
        self.mend_bitmap()
        _set_flag(self.medium, layout.STATE_MOUNTED)
        Reconnecting(self).run()
        self.tell(2 * self.inode_limit)
        return Repaired(self.done, self.lacked_room)

    def mend_head(self) -> None:
        """Write the superblock's copies, mark the repair, finish or drop the journal."""
        wanted = encode(self.superblock)
        for number in (layout.SUPERBLOCK_A, self.superblock.data_end):
            if self.block(number) != wanted:
                # The flag's fence is this one's too: until then the other copy is enough.
                self.medium.store(number * _BLOCK, wanted)
                self.medium.flush(number * _BLOCK, _BLOCK)
                self.did("superblock", number * _BLOCK, "written from the other copy")
        flag = int.from_bytes(self.block(layout.STATE_BLOCK)[:8], "little")
        if flag not in (layout.STATE_CLEAN, layout.STATE_MOUNTED):
            self.did("mount-flag", _STATE, "set")
        _set_flag(self.medium, layout.STATE_REPAIR)
        try:
            self.journal.recover()
        except ImageError as error:
            # Nothing but the next header can follow on this line, and that has a fence.
            self.medium.store_word(layout.JOURNAL_START * _BLOCK, 0)
            self.medium.flush(layout.JOURNAL_START * _BLOCK, 8)
            self.did("journal", layout.JOURNAL_START * _BLOCK, f"dropped: {error.what}")
        state = self.block(layout.STATE_BLOCK)
        changes = [
            (_STATE + start, bytes(stop - start))
            for start, stop in ((8, layout.COUNTERS_OFFSET), (_STATE_USED, _BLOCK))
            if any(state[start:stop])
        ]
        if changes:
            self.write(changes)
            self.did("reserved", _STATE, "zeroed")
        try:
            self.counters = Counters.load(self.block(layout.STATE_BLOCK))
            self.inode_limit = self.counters.inode_limit
        except ImageError:
            self.counters = None

    def tell(self, done: int) -> None:
        """Tell how far the repair is: inodes, once for what they have and once for their names."""
        if self.progress is not None:
            self.progress(done, 2 * self.inode_limit)

    def mend_inodes(self) -> None:
        """Repair every inode and note what it is."""
        for page, number in sorted(self.table_pages.items()):
            self.tell(page * layout.INODES_PER_BLOCK)
            for slot in range(layout.INODES_PER_BLOCK):
                ino, at = page * layout.INODES_PER_BLOCK + slot, slot * layout.INODE_SIZE
                offset = number * _BLOCK + at
                if 0 < ino < self.inode_limit:
                    self.records.note(self.mend_inode(ino, offset))
                elif any(self.block(number)[at : at + layout.INODE_SIZE]):
                    self.write([(offset, bytes(layout.INODE_SIZE))])
                    self.did("reserved", offset, f"zeroed: inode {ino} was never used")

    def mend_root(self) -> list[int]:
        """Let inode 1 be a directory, whatever it is; return the blocks that it gave up."""
        root = self.inode_of(layout.ROOT_INO)
        if stat.S_ISDIR(root.mode):
            return []
        doubles = {page for ino, page in self.doubles if ino == layout.ROOT_INO}
        old = [
            number
            for level, at, number in self.tree(root)
            if (level or at not in doubles) and number not in self.stolen
        ]
        fresh = Inode(layout.ROOT_INO, mode=stat.S_IFDIR | 0o755, generation=root.generation)
        fresh.parent = layout.ROOT_INO
        fresh.pagecache = self.superblock.default_pagecache
        fresh.record_offset = root.record_offset
        if root.xattr_block:
            old.append(root.xattr_block & layout.ENTRY_BLOCK_MASK)
        self.put(fresh)
        self.records.note(fresh)
        self.did("inode", root.record_offset, "an empty root directory", layout.ROOT_INO)
        return old

    def part_all_doubles(self) -> None:
        """Give every page whose block another one owns a block of its own."""
        if self.stolen:
            for ino in self.records.in_use():
                self.doubles += [
                    (ino, page)
                    for page, number in self.pages(self.inode_of(ino))
                    if number in self.stolen
                    and (ino, page) not in self.doubles
                    and not is_leaf_of(self.block(number), ino, page)
                ]
        for ino, page in self.doubles:
            inode = self.inode_of(ino)
            if inode.mode:
                self.part_doubles(inode, page)
        self.originals = None

    def mend_links(self) -> None:
        """Judge the symbolic links' targets."""
        for ino in self.records.in_use():
            if self.records.kinds[ino] == stat.S_IFLNK >> 12:
                inode = self.inode_of(ino)
                self.mend_link(inode)
                if not stat.S_ISLNK(inode.mode):
                    self.records.note(self.inode_of(ino))

    def mend_lists(self) -> None:
        """Link the free inodes and the orphans anew where their lists are not whole."""
        heads = {}
        for title, members in (("free", self.records.free()), ("orphan", self.records.orphaned())):
            head = 0
            if self.counters is not None:
                head = self.counters.free_ino if title == "free" else self.counters.orphan_ino
            if not self.is_list(title, head, members.copy()):
                head = self.link_list(title, np.flatnonzero(members).tolist())
                self.did("list", _COUNTERS, f"the {title} list is linked anew")
            heads[title] = head
        self.mend_counters(heads["free"], heads["orphan"])

    def is_list(self, title: str, ino: int, left: Flags) -> bool:
        """Whether the list holds exactly the inodes of ``left``, which is used up."""
        previous = 0
        while 0 < ino < self.records.limit and left[ino]:
            left[ino] = False
            if title == "orphan" and self.records.previous[ino] != previous:
                return False
            previous, ino = ino, int(self.records.following[ino])
        return ino == 0 and not left.any()

    def link_list(self, title: str, members: list[int]) -> int:
        """Link these inodes and return the first."""
        for at, ino in enumerate(members):
            inode = self.inode_of(ino)
            inode.next_ino = members[at + 1] if at + 1 < len(members) else 0
            if title == "orphan":
                inode.previous_ino = members[at - 1] if at else 0
            self.put(inode)
        return members[0] if members else 0

    def mend_counters(self, free_ino: int, orphan_ino: int) -> None:
        """Count again what the counters count."""
        area = slice(self.superblock.data_start, self.superblock.data_end)
        pages = self.count_pages()
        counters = Counters(
            free_blocks=int(np.count_nonzero(self.used[area] == FREE)),
            inode_limit=self.inode_limit,
            free_ino=free_ino,
            orphan_ino=orphan_ino,
            nr_xip_pages=pages[0],
            nr_pagecache_pages=pages[1],
            inodes_used=self.records.nr_in_use(),
        )
        if counters != self.counters:
            self.write([(_COUNTERS, counters.pack())])
            self.did("counters", _COUNTERS, "counted again")

    def count_pages(self) -> tuple[int, int]:
        """Return the pages of regular files of kind XIP and of kind pagecache."""
        counts = [0, 0]
        for ino in self.records.in_use():
            if self.records.kinds[ino] != stat.S_IFREG >> 12:
                continue
            inode = self.inode_of(ino)
            if inode.height == 0:
                if inode.root:
                    counts[bool(inode.root & layout.ENTRY_PAGECACHE)] += 1
                continue
            for level, _position, number in self.tree(inode, lowest=1):
                if level == 1:
                    words = np.frombuffer(self.block(number), "<u8")
                    cached = int(np.count_nonzero(words & np.uint64(layout.ENTRY_PAGECACHE)))
                    counts[1] += cached
                    counts[0] += int(np.count_nonzero(words)) - cached
        return counts[0], counts[1]

    def mend_bitmap(self) -> None:
        """Write the blocks of the bitmap that do not say what is owned."""
        for index in range(self.superblock.bitmap_blocks):
            first, number = index * layout.BITS_PER_BLOCK, self.superblock.bitmap_start + index
            wanted = np.ones(layout.BITS_PER_BLOCK, np.bool_)
            part = self.used[first : first + layout.BITS_PER_BLOCK] != FREE
            wanted[: part.size] = part
            bits = np.packbits(wanted, bitorder="little").tobytes()
            if self.block(number) != bits:
                self.write([(number * _BLOCK, bits)])
                self.did("bitmap", number * _BLOCK, "written anew")
