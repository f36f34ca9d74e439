"""A file's map from page number to home: a radix tree of 512 eight-byte entries a node.

The tree's height grows with the highest page used: a file of one page has no node at all, and the
limit of 2^36 pages is the format's, not the image's. An entry says which block, what kind of page
(XIP or pagecache) and what kind of home; changing a page's kind is one aligned 8-byte store, which
no power cut tears.

Each entry carries 16 bits of check over itself, the inode's number and the entry's position. A
block that a damaged or hostile image points at from a second file thus fails the check instead of
being served under the wrong name. Callers see entries without the check (the *body*).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.allocator import Allocator
from xipfs.image.metadata import Metadata
from xipfs.image.record import Inode
from xipfs.image.superblock import Superblock

Entries = npt.NDArray[np.uint64]
"""Bodies of entries, 0 = hole: uint64[pages]."""

_K_INO: Final = 0x9E3779B97F4A7C15
_K_PLACE: Final = 0xC2B2AE3D27D4EB4F
_K_MIX: Final = 0xD6E8FEB86659FD93
_WORD: Final = (1 << 64) - 1
_SHIFT: Final = layout.FANOUT_SHIFT
_SLOT_MASK: Final = layout.FANOUT - 1
_FEW_PAGES: Final = 4


def seal(ino: int, level: int, position: int, body: int) -> int:
    """Return ``body`` with its check; ``position`` counts entries of this level (0 = pages)."""
    mixed = body ^ (ino * _K_INO & _WORD) ^ ((position << 3 | level) * _K_PLACE & _WORD)
    mixed = (mixed ^ mixed >> 32) * _K_MIX & _WORD
    return body | (mixed >> layout.ENTRY_CHECK_SHIFT) << layout.ENTRY_CHECK_SHIFT


def seal_pages(ino: int, first: int, bodies: Entries) -> Entries:
    """``seal`` for the page entries from ``first`` on, all at once; holes stay 0."""
    # In one array from step to step: a bulk move spends a good part of its time here.
    mixed = np.arange(first, first + bodies.size, dtype=np.uint64)
    mixed *= np.uint64((_K_PLACE << 3) & _WORD)
    mixed ^= bodies
    mixed ^= np.uint64(ino * _K_INO & _WORD)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(_K_MIX)
    mixed &= np.uint64(_WORD ^ layout.ENTRY_BODY_MASK)
    mixed |= bodies
    mixed[bodies == 0] = 0
    return mixed


class FileMap:
    """The maps of all inodes: changes an inode's root, height and blocks; the caller puts it."""

    def __init__(self, metadata: Metadata, allocator: Allocator, superblock: Superblock) -> None:
        self._metadata = metadata
        self._allocator = allocator
        self._owners = allocator.owners
        self._data_start = superblock.data_start
        self._data_end = superblock.data_end
        #: The leaf that was looked for last: inode, root and number; its block.
        self._walked: tuple[int, int, int] | None = None
        self._walked_to = 0

    def forget(self) -> None:
        """Drop what may be true no more: nodes came or went, or a transaction was aborted."""
        self._walked = None

    @staticmethod
    def raw_home(block: int, *, pagecache: bool = False) -> int:
        """Return the body of an entry whose page lies in ``block`` as it is."""
        kind = layout.ENTRY_PAGECACHE if pagecache else 0
        return block | kind | layout.HOME_RAW << layout.ENTRY_HOME_SHIFT

    def entry(self, inode: Inode, index: int) -> int:
        """Return page ``index``'s body, 0 for a hole."""
        if index >> (_SHIFT * inode.height):
            return 0
        if inode.height == 0:
            return self._open(inode, 0, inode.root, _root_offset(inode))
        leaf = self._leaf(inode, index >> _SHIFT)
        if leaf == 0:
            return 0
        slot = (index & _SLOT_MASK) * 8
        word = int.from_bytes(self._metadata.block(leaf)[slot : slot + 8], "little")
        return self._open(inode, index, word, (leaf << layout.BLOCK_SHIFT) + slot)

    def entries(self, inode: Inode, first: int, count: int) -> Entries:
        """Return the bodies of pages [first, first + count)."""
        if count <= _FEW_PAGES:
            # numpy's fixed cost a call is that of a dozen pages looked up one by one.
            return np.array([self.entry(inode, first + i) for i in range(count)], np.uint64)
        words = np.zeros(count, np.uint64)
        if inode.height == 0:
            if first == 0 and count:
                words[0] = self._open(inode, 0, inode.root, _root_offset(inode))
            return words
        end = min(first + count, 1 << (_SHIFT * inode.height))
        index = first
        leaves = []
        while index < end:
            stop = min((index | _SLOT_MASK) + 1, end)
            leaf = self._leaf(inode, index >> _SHIFT)
            leaves.append(leaf)
            if leaf:
                part = self._words(leaf, index & _SLOT_MASK, stop - index)
                words[index - first : stop - first] = part
            index = stop
        return self._open_pages(inode, first, words, leaves)

    def assign_one(self, inode: Inode, index: int, body: int) -> None:
        """Set page ``index``'s body (0 makes a hole)."""
        self.assign(inode, index, np.array([body], np.uint64))

    def assign(self, inode: Inode, first: int, bodies: Entries) -> None:
        """Set the bodies of the pages from ``first`` on; make and free nodes as needed."""
        last = first + bodies.size - 1
        assert last < layout.MAX_FILE_PAGES, last
        index = first
        while index <= last:
            stop = min(index | _SLOT_MASK, last) + 1
            self._assign_leaf(inode, index, bodies[index - first : stop - first])
            index = stop

    def replace(self, inode: Inode, index: int, body: int) -> None:
        """Set the body of page ``index``, which has one already, to another one."""
        word = seal(inode.ino, 0, index, body)
        if inode.height == 0:
            inode.root = word
            return
        leaf = self._leaf(inode, index >> _SHIFT)
        self._metadata.write(leaf, (index & _SLOT_MASK) * 8, word.to_bytes(8, "little"))

    def replace_many(self, inode: Inode, first: int, bodies: Entries) -> None:
        """``replace`` for the pages from ``first`` on; holes among them stay holes."""
        if inode.height == 0:
            assert bodies.size == 1, bodies
            inode.root = seal(inode.ino, 0, first, int(bodies[0]))
            return
        data = seal_pages(inode.ino, first, bodies).tobytes()
        index, end = first, first + bodies.size
        while index < end:
            stop = min((index | _SLOT_MASK) + 1, end)
            leaf = self._leaf(inode, index >> _SHIFT)
            if leaf:  # else all of it is one hole
                words = data[(index - first) * 8 : (stop - first) * 8]
                self._metadata.write(leaf, (index & _SLOT_MASK) * 8, words)
            index = stop

    def take(self, inode: Inode, first: int, limit: int) -> Entries | None:
        """Make holes of up to ``limit`` pages from ``first`` on, within one leaf.

        Return the bodies that were there (not one of them 0), or None when there are none left.
        """
        for start, bodies in self.leaves(inode, first):
            used = np.flatnonzero(bodies)[:limit]
            low, high = int(used[0]), int(used[-1]) + 1
            taken = bodies[used]
            self.assign(inode, start + low, np.zeros(high - low, np.uint64))
            return taken
        return None

    def leaves(self, inode: Inode, first: int) -> Iterator[tuple[int, Entries]]:
        """Yield (index of its first page, bodies) of each part of a leaf from ``first`` on.

        Parts without a page are left out, and so is everything the tree has no node for.
        """
        for start, words, leaf in self._leaf_words(inode, first):
            if leaf == 0:
                self._open(inode, 0, inode.root, _root_offset(inode))
                yield start, words & np.uint64(layout.ENTRY_BODY_MASK)
            elif (bodies := self._open_pages(inode, start, words, [leaf])).any():
                yield start, bodies

    def used(self, inode: Inode, first: int) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """Yield what ``leaves`` would as (first page, which are no holes), nothing checked."""
        for start, words, _ in self._leaf_words(inode, first):
            yield start, words != 0

    def _leaf_words(self, inode: Inode, first: int) -> Iterator[tuple[int, Entries, int]]:
        """Yield (first page, sealed entries, block) of each part of a leaf; the inode's own: 0."""
        if inode.height == 0:
            if inode.root and first == 0:
                yield 0, np.array([inode.root], np.uint64), 0
            return
        root = self._root_node(inode)
        for number, leaf in self._leaf_blocks(inode, root, inode.height, 0, first >> _SHIFT):
            start = max(number << _SHIFT, first)
            slot = start & _SLOT_MASK
            yield start, self._words(leaf, slot, layout.FANOUT - slot), leaf

    def _leaf_blocks(
        self, inode: Inode, node: int, level: int, position: int, first: int
    ) -> Iterator[tuple[int, int]]:
        """Yield (leaf number, block) of the leaves below ``node``, from leaf ``first`` on."""
        if node == 0:
            return
        if level == 1:
            # A tree of one leaf gets here without its number having been compared.
            if position >= first:
                yield position, node
            return
        span = _SHIFT * (level - 2)
        base = position << _SHIFT
        lowest = max(first - (base << span), 0) >> span
        if lowest >= layout.FANOUT:
            return
        words = self._words(node, lowest, layout.FANOUT - lowest)
        for slot in (np.flatnonzero(words) + lowest).tolist():
            child = self._child(inode, level, position, node, slot)
            yield from self._leaf_blocks(inode, child, level - 1, base + slot, first)

    def _assign_leaf(self, inode: Inode, index: int, bodies: Entries) -> None:
        empty = not bodies.any()
        if not empty:
            self._grow(inode, index + bodies.size - 1)
            used = bodies[bodies != 0] & np.uint64(layout.ENTRY_BLOCK_MASK)
            self._owners.meet_many(inode.ino, used)
        if index >> (_SHIFT * inode.height):
            return
        if inode.height == 0:
            inode.root = seal(inode.ino, 0, 0, int(bodies[0])) if bodies[0] else 0
            return
        number = index >> _SHIFT
        leaf = self._leaf(inode, number)
        if leaf == 0:
            if empty:
                return
            leaf = self._make_leaf(inode, number)
        words = seal_pages(inode.ino, index, bodies)
        self._metadata.write(leaf, (index & _SLOT_MASK) * 8, words.tobytes())
        if empty and not self._words(leaf, 0, layout.FANOUT).any():
            self._prune(inode, number)

    def _grow(self, inode: Inode, index: int) -> None:
        """Raise the tree until ``index`` fits. The old root moves unchanged: its check holds at
        position 0 of its level, wherever the entry lies."""
        while index >> (_SHIFT * inode.height):
            if inode.root:
                node = self._new_node(inode)
                self._metadata.write(node, 0, inode.root.to_bytes(8, "little"))
                inode.root = self._node_word(inode, inode.height + 1, 0, node)
            inode.height += 1

    def _make_leaf(self, inode: Inode, number: int) -> int:
        """Create the nodes down to leaf ``number`` and return the leaf's block."""
        level = inode.height
        node = self._root_node(inode)
        if node == 0:
            node = self._new_node(inode)
            inode.root = self._node_word(inode, level, 0, node)
        while level > 1:
            level -= 1
            position = number >> (_SHIFT * (level - 1))
            slot = position & _SLOT_MASK
            child = self._child(inode, level + 1, position >> _SHIFT, node, slot)
            if child == 0:
                child = self._new_node(inode)
                word = self._node_word(inode, level, position, child)
                self._metadata.write(node, slot * 8, word.to_bytes(8, "little"))
            node = child
        return node

    def _prune(self, inode: Inode, number: int) -> None:
        """Free leaf ``number``, which is empty, and each node above it that becomes so."""
        path: list[tuple[int, int]] = []
        level = inode.height
        node = self._root_node(inode)
        while level > 1:
            level -= 1
            position = number >> (_SHIFT * (level - 1))
            slot = position & _SLOT_MASK
            path.append((node, slot))
            node = self._child(inode, level + 1, position >> _SHIFT, node, slot)
        self._drop_node(inode, node)
        while path:
            node, slot = path.pop()
            self._metadata.write(node, slot * 8, bytes(8))
            if self._words(node, 0, layout.FANOUT).any():
                return
            self._drop_node(inode, node)
        inode.root = inode.height = 0

    def _leaf(self, inode: Inode, number: int) -> int:
        """Return the block of leaf ``number``, 0 if the tree has none."""
        wanted = (inode.ino, inode.root, number)
        if wanted == self._walked:
            return self._walked_to
        level = inode.height
        node = self._root_node(inode)
        while level > 1 and node:
            level -= 1
            position = number >> (_SHIFT * (level - 1))
            node = self._child(inode, level + 1, position >> _SHIFT, node, position & _SLOT_MASK)
        self._walked, self._walked_to = wanted, node
        return node

    def _new_node(self, inode: Inode) -> int:
        self.forget()
        block = self._allocator.allocate_block()
        self._metadata.fresh(block)
        self._owners.meet(inode.ino, block)
        inode.blocks += 1
        return block

    def _drop_node(self, inode: Inode, block: int) -> None:
        self.forget()
        self._allocator.free([block])
        inode.blocks -= 1

    def _words(self, block: int, slot: int, count: int) -> Entries:
        return np.frombuffer(self._metadata.block(block), "<u8", count, slot * 8)

    @staticmethod
    def _node_word(inode: Inode, level: int, position: int, block: int) -> int:
        return seal(inode.ino, level, position, block | layout.HOME_NODE << layout.ENTRY_HOME_SHIFT)

    def _root_node(self, inode: Inode) -> int:
        """Return the block of the tree's highest node, 0 if there is none."""
        return self._open_node(inode, inode.height, 0, inode.root, _root_offset(inode))

    def _child(self, inode: Inode, level: int, position: int, node: int, slot: int) -> int:
        """Return the node below ``node`` (of this level and position) in ``slot``, 0 if none."""
        at = slot * 8
        word = int.from_bytes(self._metadata.block(node)[at : at + 8], "little")
        below, offset = position << _SHIFT | slot, (node << layout.BLOCK_SHIFT) + at
        return self._open_node(inode, level - 1, below, word, offset)

    def _open_node(self, inode: Inode, level: int, position: int, word: int, offset: int) -> int:
        """Return the block of the node that ``word`` (which lies at ``offset``) points to."""
        if word == 0:
            return 0
        body = word & layout.ENTRY_BODY_MASK
        block = body & layout.ENTRY_BLOCK_MASK
        if (
            seal(inode.ino, level, position, body) != word
            or body >> layout.ENTRY_HOME_SHIFT != layout.HOME_NODE
            or body & layout.ENTRY_PAGECACHE
            or not self._data_start <= block < self._data_end
        ):
            raise self._damaged(inode, level, position, offset)
        self._owners.meet(inode.ino, block)
        return block

    def _open(self, inode: Inode, index: int, word: int, offset: int) -> int:
        """Return the body of page ``index``'s ``word``; raise ImageError if its check fails."""
        if word == 0:
            return 0
        body = word & layout.ENTRY_BODY_MASK
        block = body & layout.ENTRY_BLOCK_MASK
        if (
            seal(inode.ino, 0, index, body) != word
            or body >> layout.ENTRY_HOME_SHIFT != layout.HOME_RAW
            or not self._data_start <= block < self._data_end
        ):
            raise self._damaged(inode, 0, index, offset)
        self._owners.meet(inode.ino, block)
        return body

    def _open_pages(self, inode: Inode, first: int, words: Entries, leaves: list[int]) -> Entries:
        """``_open`` for the ``words`` of the pages from ``first`` on, which lie in ``leaves``."""
        bodies: Entries = words & np.uint64(layout.ENTRY_BODY_MASK)
        wrong = seal_pages(inode.ino, first, bodies) != words
        used = words if words.all() else words[words != 0]
        # The block and the kind of home at once: another kind makes it a block beyond the image.
        homes = used & np.uint64(layout.ENTRY_BODY_MASK ^ layout.ENTRY_PAGECACHE)
        homes ^= np.uint64(layout.HOME_RAW << layout.ENTRY_HOME_SHIFT)
        if homes.size and not self._data_start <= homes.min() <= homes.max() < self._data_end:
            wrong[np.flatnonzero(words)] |= (homes < self._data_start) | (homes >= self._data_end)
        if wrong.any():
            page = first + int(np.argmax(wrong))
            leaf = leaves[(page >> _SHIFT) - (first >> _SHIFT)]
            offset = (leaf << layout.BLOCK_SHIFT) + (page & _SLOT_MASK) * 8
            raise self._damaged(inode, 0, page, offset)
        self._owners.meet_many(inode.ino, homes)
        return bodies

    @staticmethod
    def _damaged(inode: Inode, level: int, position: int, offset: int) -> ImageError:
        return ImageError(
            f"map of inode {inode.ino}: the entry at offset {offset} (level {level}, position"
            f" {position}) is damaged",
            remedy="run fsck.xipfs",
        )


def _root_offset(inode: Inode) -> int:
    """Where the root's entry lies: in the inode's record."""
    return inode.record_offset + layout.INODE_ROOT_OFFSET
