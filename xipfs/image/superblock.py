"""The superblock: what never changes after mkfs, in two copies at the image's two ends.

Because nothing in it changes, no store can tear it; the second copy is for damage, not for
updates. What does change (the mount flag, the counters) lives in the state block.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from xipfs.errors import ImageError, UsageError
from xipfs.image import layout
from xipfs.memory.region import Medium
from xipfs.units import format_size


@dataclass(frozen=True, slots=True)
class Superblock:
    """Geometry and identity of an image; positions and counts in blocks."""

    block_count: int
    journal_start: int
    journal_blocks: int
    bitmap_start: int
    bitmap_blocks: int
    data_start: int
    uuid: bytes
    hash_key: bytes
    created_ns: int
    default_pagecache: bool
    label: str

    @property
    def data_end(self) -> int:
        """First block after the data area: the second superblock's."""
        return self.block_count - 1


def geometry(
    size_bytes: int,
    *,
    uuid: bytes,
    hash_key: bytes,
    created_ns: int,
    default_pagecache: bool,
    label: str,
) -> Superblock:
    """Lay an image of ``size_bytes`` out; raise UsageError for a size or label it cannot have."""
    block_count, rest = divmod(size_bytes, layout.BLOCK_SIZE)
    if rest or not layout.MIN_BLOCKS <= block_count <= layout.MAX_BLOCKS:
        smallest = format_size(layout.MIN_BLOCKS * layout.BLOCK_SIZE)
        largest = format_size(layout.MAX_BLOCKS * layout.BLOCK_SIZE)
        raise UsageError(
            f"an image of {size_bytes} bytes is not possible",
            expected=f"a multiple of 4096 from {smallest} to {largest}",
        )
    if len(label.encode()) > layout.LABEL_MAX_BYTES or "\0" in label:
        raise UsageError(
            f"label {label!r} is not usable",
            expected=f"at most {layout.LABEL_MAX_BYTES} bytes of UTF-8 without NUL",
        )
    wanted = block_count // 256
    journal_blocks = min(max(wanted, layout.MIN_JOURNAL_BLOCKS), layout.MAX_JOURNAL_BLOCKS)
    bitmap_start = layout.JOURNAL_START + journal_blocks
    bitmap_blocks = -(-block_count // layout.BITS_PER_BLOCK)
    return Superblock(
        block_count=block_count,
        journal_start=layout.JOURNAL_START,
        journal_blocks=journal_blocks,
        bitmap_start=bitmap_start,
        bitmap_blocks=bitmap_blocks,
        data_start=bitmap_start + bitmap_blocks,
        uuid=uuid,
        hash_key=hash_key,
        created_ns=created_ns,
        default_pagecache=default_pagecache,
        label=label,
    )


def encode(superblock: Superblock) -> bytes:
    """Return the block's 4096 bytes."""
    label = superblock.label.encode()

    def pack(crc: int) -> bytes:
        return layout.SUPERBLOCK.pack(
            layout.MAGIC,
            layout.FORMAT_VERSION,
            crc,
            layout.BLOCK_SIZE,
            layout.INODE_SIZE,
            superblock.block_count,
            superblock.journal_start,
            superblock.journal_blocks,
            superblock.bitmap_start,
            superblock.bitmap_blocks,
            superblock.data_start,
            superblock.uuid,
            superblock.hash_key,
            superblock.created_ns,
            superblock.default_pagecache,
            len(label),
            label,
        ).ljust(layout.BLOCK_SIZE, b"\0")

    return pack(zlib.crc32(pack(0)))


def decode(block: bytes) -> Superblock:
    """Return the superblock in ``block``; raise ImageError if it is not a sound one."""
    magic, version, crc, block_size, inode_size, *rest = layout.SUPERBLOCK.unpack_from(block)
    if magic != layout.MAGIC:
        raise ImageError("no xipfs magic number")
    if version != layout.FORMAT_VERSION:
        raise ImageError(f"format version {version}", expected=f"{layout.FORMAT_VERSION}")
    if zlib.crc32(block[:12] + bytes(4) + block[16:]) != crc:
        raise ImageError("the checksum does not match")
    if block_size != layout.BLOCK_SIZE or inode_size != layout.INODE_SIZE:
        raise ImageError(f"blocks of {block_size} and inodes of {inode_size} bytes")
    (
        block_count,
        journal_start,
        journal_blocks,
        bitmap_start,
        bitmap_blocks,
        data_start,
        uuid,
        hash_key,
        created_ns,
        kind,
        label_length,
        label,
    ) = rest
    if kind > 1 or label_length > layout.LABEL_MAX_BYTES:
        raise ImageError("a field is out of range")
    try:
        text = label[:label_length].decode()
    except UnicodeDecodeError as error:
        raise ImageError("the label is not UTF-8") from error
    superblock = Superblock(
        block_count,
        journal_start,
        journal_blocks,
        bitmap_start,
        bitmap_blocks,
        data_start,
        uuid,
        hash_key,
        created_ns,
        bool(kind),
        text,
    )
    _check_geometry(superblock)
    return superblock


def _check_geometry(superblock: Superblock) -> None:
    """Refuse areas that overlap or leave the image: a checksum proves no author honest."""
    sound = (
        layout.MIN_BLOCKS <= superblock.block_count <= layout.MAX_BLOCKS
        and superblock.journal_start == layout.JOURNAL_START
        and layout.MIN_JOURNAL_BLOCKS <= superblock.journal_blocks <= layout.MAX_JOURNAL_BLOCKS
        and superblock.bitmap_start == superblock.journal_start + superblock.journal_blocks
        and superblock.bitmap_blocks == -(-superblock.block_count // layout.BITS_PER_BLOCK)
        and superblock.data_start == superblock.bitmap_start + superblock.bitmap_blocks
        and superblock.data_start < superblock.data_end
    )
    if not sound:
        raise ImageError("the areas overlap or leave the image")


def load(medium: Medium, name: str) -> Superblock:
    """Return the superblock of the image called ``name`` from the first copy that is sound."""
    reasons = []
    last = medium.size_bytes // layout.BLOCK_SIZE - 1
    for block in (layout.SUPERBLOCK_A, last):
        offset = block << layout.BLOCK_SHIFT
        try:
            superblock = decode(bytes(medium.load(offset, layout.BLOCK_SIZE)))
        except ImageError as error:
            reasons.append(f"superblock at offset {offset}: {error}")
            continue
        if superblock.block_count > last + 1:
            raise ImageError(
                f"{name} was cut off: {last + 1} blocks are left",
                expected=f"{superblock.block_count} blocks of 4096 bytes",
                remedy="restore the file's end from a copy",
            )
        return superblock
    raise ImageError(
        f"{name} is not a usable xipfs image ({'; '.join(reasons)})",
        expected="an image made by xipfs mkfs",
    )
