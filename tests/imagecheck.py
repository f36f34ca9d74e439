"""An image checked against SPEC.md by other means than the code's: every block owned once.

It reads the bytes with offsets of its own and shares nothing with xipfs.image, so that a mistake
there cannot hide here. ``check`` raises AssertionError with what is wrong.
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

BLOCK = 4096
RAW, NODE = 1, 3


class Image(Protocol):
    """Bytes that are only sliced: an image, or a medium that watches what is read of it."""

    def __getitem__(self, at: slice, /) -> bytes: ...


@dataclass
class Node:
    """One inode as the table has it."""

    ino: int
    mode: int
    nlink: int
    height: int
    orphan: bool
    size: int
    root: int
    blocks: int
    xattr: int
    parent: int
    next_ino: int
    previous_ino: int
    entries: int
    names: dict[bytes, int] = field(default_factory=dict)


class Checker:
    """Walks everything once."""

    def __init__(self, image: Image) -> None:
        self.image = image
        head = struct.unpack_from("<8sIIIIQQQQQQ", image[:BLOCK])
        assert head[0] == b"xipfsNVM"
        assert head[1] == 1
        assert head[3:5] == (4096, 128)
        self.blocks, journal, journal_blocks, bitmap, bitmap_blocks, self.data = head[5:]
        assert (journal, bitmap) == (2, 2 + journal_blocks)
        assert self.data == bitmap + bitmap_blocks
        assert image[:BLOCK] == image[(self.blocks - 1) * BLOCK :][:BLOCK], "superblocks differ"
        assert self.word(journal * BLOCK) == 0, "a transaction is pending"
        self.bitmap = image[bitmap * BLOCK : self.data * BLOCK]
        self.used: dict[int, str] = {}
        self.kinds: Counter[str] = Counter()

    def word(self, offset: int) -> int:
        return int.from_bytes(self.image[offset : offset + 8], "little")

    def own(self, block: int, owner: str) -> None:
        assert self.data <= block < self.blocks - 1, (owner, block)
        assert block not in self.used, f"block {block}: {owner} and {self.used[block]}"
        self.used[block] = owner

    def walk(self, ino: int, word: int, level: int, position: int) -> Iterator[tuple[int, int]]:
        """Own the nodes below ``word`` and yield (page, entry)."""
        if word == 0:
            return
        block, home = word & ((1 << 40) - 1), word >> 41 & 7
        assert word >> 44 & 15 == 0, "reserved bits"
        if level == 0:
            assert home == RAW
            yield position, word
            return
        assert home == NODE
        self.own(block, f"inode {ino} node level {level}")
        words = struct.unpack("<512Q", self.image[block * BLOCK : (block + 1) * BLOCK])
        assert any(words), f"inode {ino}: an empty node"
        for slot, child in enumerate(words):
            yield from self.walk(ino, child, level - 1, position * 512 + slot)

    def inode(self, ino: int, offset: int) -> Node:
        record = self.image[offset : offset + 128]
        seed = zlib.crc32(ino.to_bytes(8, "little"))
        assert zlib.crc32(record[4:], seed) == int.from_bytes(record[:4], "little"), f"inode {ino}"
        f = struct.unpack("<IIIIIIIBBHQqqqQQQQQQQQ", record)
        return Node(
            ino,
            f[1],
            f[3],
            f[7],
            bool(f[9]),
            f[10],
            f[14],
            f[15],
            f[16],
            f[17],
            f[18],
            f[19],
            f[20],
        )

    def claim(self, node: Node) -> list[tuple[int, int]]:
        """Own all blocks of ``node``; return its pages."""
        before = len(self.used)
        pages = list(self.walk(node.ino, node.root, node.height, 0))
        for page, word in pages:
            self.own(word & ((1 << 40) - 1), f"inode {node.ino} page {page}")
        if node.xattr:
            self.own(node.xattr & ((1 << 40) - 1), f"inode {node.ino} xattrs")
        assert node.blocks == len(self.used) - before, f"inode {node.ino}: blocks {node.blocks}"
        return pages

    def leaf(self, node: Node, page: int, block: int) -> None:
        raw = self.image[block * BLOCK : (block + 1) * BLOCK]
        crc, count, used, owner, place, _ = struct.unpack_from("<IHHQQQ", raw)
        assert zlib.crc32(raw[4:used]) == crc, f"directory {node.ino}"
        assert (owner, place) == (node.ino, page)
        at, found = 32, 0
        while at < used:
            hash_, ino, _kind, length = struct.unpack_from("<QQBB", raw, at)
            depth = (page + 1).bit_length() - 1
            assert hash_ >> (62 - depth) == page + 1 - (1 << depth), "a name in the wrong leaf"
            name = raw[at + 18 : at + 18 + length]
            assert name not in node.names
            node.names[name] = ino
            at += (18 + length + 7) // 8 * 8
            found += 1
        assert at == used
        assert found == count


def check(image: Image) -> dict[int, Node]:
    """Check the whole image; return the inodes in use."""
    c = Checker(image)
    counters = struct.unpack("<IIQQQQQQQ", image[BLOCK + 64 : BLOCK + 128])
    free_blocks, limit, free_ino, orphan, xip, pagecache, in_use = counters[2:]
    table = c.inode(0, BLOCK + 128)
    places = {page: word & ((1 << 40) - 1) for page, word in c.claim(table)}
    nodes = {
        ino: c.inode(ino, places[ino // 32] * BLOCK + ino % 32 * 128) for ino in range(1, limit)
    }
    free = set()
    while free_ino:
        assert free_ino not in free, "the free list runs in a circle"
        assert nodes[free_ino].mode == 0
        free.add(free_ino)
        free_ino = nodes[free_ino].next_ino
    orphans: list[int] = []
    while orphan:
        assert nodes[orphan].orphan
        assert nodes[orphan].previous_ino == (orphans[-1] if orphans else 0)
        orphans.append(orphan)
        orphan = nodes[orphan].next_ino
    used = {ino: node for ino, node in nodes.items() if node.mode}
    assert set(nodes) - set(used) == free, "a free inode is not on the free list"
    assert {ino for ino in used if used[ino].orphan} == set(orphans)
    assert in_use == len(used)
    _claim_all(c, used)
    assert (c.kinds["xip"], c.kinds["pagecache"]) == (xip, pagecache)
    _check_links(used)
    data = range(c.data, c.blocks - 1)
    bits = int.from_bytes(c.bitmap, "little")
    wrong = [block for block in data if bool(bits >> block & 1) != (block in c.used)]
    assert not wrong, f"the bitmap is wrong for blocks {wrong[:5]}"
    assert (bits | (1 << c.data) - 1) == bits
    assert free_blocks == len(data) - len(c.used)
    return used


def _claim_all(c: Checker, used: dict[int, Node]) -> None:
    for node in used.values():
        pages = c.claim(node)
        if stat.S_ISDIR(node.mode):
            for page, word in pages:
                c.leaf(node, page, word & ((1 << 40) - 1))
            assert node.entries == len(node.names)
        elif stat.S_ISREG(node.mode):
            for page, word in pages:
                c.kinds["pagecache" if word >> 40 & 1 else "xip"] += 1
                # A file that shrinks has pages behind its end only while it is an orphan.
                assert node.orphan or page * BLOCK < node.size


def _check_links(used: dict[int, Node]) -> None:
    links: Counter[int] = Counter()
    for node in used.values():
        for ino in node.names.values():
            links[ino] += 1
            if stat.S_ISDIR(used[ino].mode):
                assert used[ino].parent == node.ino
                links[node.ino] += 1
                links[ino] += 1
    links[1] += 2
    for ino, node in used.items():
        assert node.nlink == links[ino], f"inode {ino}: {node.nlink} links, {links[ino]} names"
