"""What the parts of a repair share: journalled changes of structures, blocks that nobody owns.

Each change is one transaction of the journal, so a cut leaves it done or not begun; new blocks are
filled before the transaction that links them. What is free is known from the maps that were read,
never from the bitmap, which may be what is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from xipfs.image import layout
from xipfs.image.check_maps import Finding
from xipfs.image.filemap import seal
from xipfs.image.journal import Journal
from xipfs.image.metadata import Metadata
from xipfs.image.record import Inode, pack_inode
from xipfs.image.records import Records
from xipfs.image.sound import PAGE_LEVEL, entry_block
from xipfs.image.superblock import Superblock
from xipfs.memory.region import Medium

_BLOCK: Final = layout.BLOCK_SIZE
#: In ``used``: nobody's; a page of a file or of the inode table; a structure that names its owner.
FREE: Final = 0
PAGE: Final = 1
STRUCTURE: Final = 2


class NoRoomError(Exception):
    """A repair needs a block and none is free: what is damaged stays as it is."""


class Mending:
    """One image under repair."""

    def __init__(self, medium: Medium, superblock: Superblock) -> None:
        self.medium = medium
        self.superblock = superblock
        self.journal = Journal(medium, superblock)
        self.metadata = Metadata(medium, self.journal, superblock.block_count)
        self.done: list[Finding] = []
        #: Whether a repair was left out since no block was free for it.
        self.lacked_room = False
        self.used = np.zeros(superblock.block_count, np.uint8)
        self.used[: superblock.data_start] = STRUCTURE
        self.used[superblock.data_end :] = STRUCTURE
        self.records = Records(0)
        self.table = Inode(layout.TABLE_INO)
        #: Blocks that could not be parted, since none was free: nobody may write or free them.
        self.shared: set[int] = set()
        #: Changed blocks as they were; None once every page has a block of its own. A page may
        #: claim one, and is to read as it did. (A repair cut in between has forgotten them.)
        self.originals: dict[int, bytes] | None = {}
        self._cursor = superblock.data_start

    def did(self, name: str, offset: int, what: str, ino: int | None = None) -> None:
        """Note what was done about a finding of that name."""
        self.done.append(Finding(name, offset, ino, what))

    def block(self, number: int) -> memoryview:
        """Return the block's bytes."""
        return self.medium.load(number * _BLOCK, _BLOCK)

    def write(self, changes: list[tuple[int, bytes]]) -> None:
        """Make the changes (offset in the image, bytes within a block) as one transaction."""
        self.metadata.begin()
        try:
            for offset, data in changes:
                if self.originals is not None:
                    number = offset // _BLOCK
                    self.originals.setdefault(number, bytes(self.block(number)))
                self.metadata.write(offset // _BLOCK, offset % _BLOCK, data)
            self.metadata.commit()
        except BaseException:
            self.metadata.abort()
            raise

    def put(self, inode: Inode) -> None:
        """Write an inode's record in its place."""
        self.write([(inode.record_offset, pack_inode(inode))])

    def take(self, content: bytes, use: int) -> int:
        """Fill a block that nobody owns and return it; the next ``write`` makes it durable."""
        free = np.flatnonzero(self.used[self._cursor :] == FREE)
        if not free.size:
            self._cursor = 0
            free = np.flatnonzero(self.used == FREE)
        if not free.size:
            self.lacked_room = True
            raise NoRoomError
        number = self._cursor + int(free[0])
        self._cursor = number + 1
        self.used[number] = use
        offset = number * _BLOCK
        self.medium.store(offset, content.ljust(_BLOCK, b"\0"))
        self.medium.flush(offset, _BLOCK)
        return number

    def untake(self, blocks: list[int]) -> None:
        """Give blocks back, but for those that another one uses as well."""
        self.used[[number for number in blocks if number not in self.shared]] = FREE

    def build_map(
        self, ino: int, pages: dict[int, int], kept: dict[tuple[int, int], int] | None = None
    ) -> tuple[int, int, list[int]]:
        """Build a map of these pages (number: block) in new nodes; (root, height, nodes).

        ``kept``: nodes, by level and position, of a map of the same height that lacks some of the
        pages. They are completed in their place.
        """
        if not pages:
            return 0, 0, []
        height, kept = map_height(pages), kept or {}
        nodes, taken = list[int](), list[int]()
        level = dict(pages)
        try:
            for above in range(1, height + 1):
                parts: dict[int, bytearray] = {}
                for position, number in level.items():
                    node = parts.setdefault(position // layout.FANOUT, bytearray(_BLOCK))
                    at = position % layout.FANOUT * 8
                    word = _word(ino, above - 1, position, number)
                    node[at : at + 8] = word.to_bytes(8, "little")
                level = {}
                for position, node in parts.items():
                    if number := kept.get((above, position), 0):
                        self.write([(number * _BLOCK, bytes(node))])
                    else:
                        number = self.take(bytes(node), STRUCTURE)
                        taken.append(number)
                    level[position] = number
                nodes += level.values()
        except NoRoomError:
            self.untake(taken)
            raise
        return _word(ino, height, 0, level[0]), height, nodes

    def tree(self, inode: Inode, lowest: int = PAGE_LEVEL) -> Iterator[tuple[int, int, int]]:
        """Yield (level, position, block) of a mended map down to a level, pages in their order."""
        todo = [(inode.root, inode.height, 0)]
        while todo:
            word, level, position = todo.pop()
            number = entry_block(self.superblock, inode.ino, level, position, word)
            if number is None:
                continue
            yield level, position, number
            if level == lowest:
                continue
            words = np.frombuffer(self.block(number), "<u8")
            first = position * layout.FANOUT
            todo += [
                (int(words[slot]), level - 1, first + slot)
                for slot in np.flatnonzero(words)[::-1].tolist()
            ]

    def pages(self, inode: Inode) -> list[tuple[int, int]]:
        """Return (page, block) of a mended map: for directories, links and the table."""
        return [(at, number) for level, at, number in self.tree(inode) if level == PAGE_LEVEL]


def map_height(pages: dict[int, int]) -> int:
    """Return the height of a map that has these pages."""
    height = 0
    while max(pages) >> layout.FANOUT_SHIFT * height:
        height += 1
    return height


def _word(ino: int, level: int, position: int, block: int) -> int:
    home = layout.HOME_NODE if level else layout.HOME_RAW
    return seal(ino, level, position, block | home << layout.ENTRY_HOME_SHIFT)
