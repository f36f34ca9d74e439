"""Every structure of the image format, field by field; SPEC.md tells the same in prose.

All numbers are little-endian. A *block* is 4096 bytes, equal to a page, so that a file's page and
its home are the same size and an XIP page is one block of the region. Nothing here reads or writes
an image: this module only says what the bytes mean.

    block 0                 superblock, first copy
    block 1                 state: mount flag, counters, the inode table's own inode
    [2, + journal_blocks)   journal
    [.., + bitmap_blocks)   one bit a block, 1 = in use
    [data_start, count - 1) everything else: inode table, map nodes, directories, file pages
    block count - 1         superblock, second copy
"""

from __future__ import annotations

import struct
from typing import Final

from xipfs.units import PAGE_SIZE

BLOCK_SIZE: Final = PAGE_SIZE
BLOCK_SHIFT: Final = 12
LINE_SHIFT: Final = 6
LINES_PER_BLOCK: Final = 64
BITS_PER_BLOCK: Final = BLOCK_SIZE * 8

MAGIC: Final = b"xipfsNVM"
FORMAT_VERSION: Final = 1

SUPERBLOCK_A: Final = 0
STATE_BLOCK: Final = 1
JOURNAL_START: Final = 2

#: Smallest and largest image: the first is what the fixed structures and a few files need.
MIN_BLOCKS: Final = 32
MAX_BLOCKS: Final = 1 << 40
#: A transaction must fit the journal; the largest directory step needs five blocks.
MIN_JOURNAL_BLOCKS: Final = 8
MAX_JOURNAL_BLOCKS: Final = 128
LABEL_MAX_BYTES: Final = 63

#: magic, version, crc32 of the block with this field zero, block size, inode size,
#: block count, journal start, journal blocks, bitmap start, bitmap blocks, data start,
#: uuid, key of the directories' hash, created (ns), default kind, label length, label
SUPERBLOCK: Final = struct.Struct("<8sIIIIQQQQQQ16s16sqBB64s")

#: State block, line 0: the mount flag, one word.
MOUNT_FLAG_OFFSET: Final = 0
STATE_CLEAN: Final = 0x6E61656C43504958  # "XIPClean" as bytes
STATE_MOUNTED: Final = 0x746E754D50495858  # "XXIPMunt" as bytes
STATE_REPAIR: Final = 0x7269617065525858  # "XXRepair" as bytes: fsck is at work, or was cut
#: State block, line 1: crc32 of the rest, zero, free blocks, high-water mark of inode numbers,
#: first free inode, first orphan, file pages of kind XIP, of kind pagecache, inodes in use.
COUNTERS_OFFSET: Final = 64
COUNTERS: Final = struct.Struct("<IIQQQQQQQ")
#: State block, lines 2-3: the inode record of the inode table (inode 0).
TABLE_INODE_OFFSET: Final = 128

TABLE_INO: Final = 0
ROOT_INO: Final = 1
INODE_SIZE: Final = 128
INODES_PER_BLOCK: Final = BLOCK_SIZE // INODE_SIZE
#: crc32 (seeded with the inode number) of the rest, mode (0 = free), generation, nlink, uid, gid,
#: rdev, map height, default kind, flags, size, atime, mtime, ctime (ns) | map root, blocks,
#: xattr block, parent (directories), next and previous orphan (next free inode if free),
#: entries (directories), zero. The fields before the bar are one line: a write that changes
#: neither the map nor the links dirties 64 bytes.
INODE: Final = struct.Struct("<IIIIIIIBBHQqqqQQQQQQQQ")
INODE_FLAG_ORPHAN: Final = 1
#: Where in the record the map's root and the attributes' entry lie.
INODE_ROOT_OFFSET: Final = 64
INODE_XATTR_OFFSET: Final = 80

#: An entry of a file map: 8 bytes, 0 = nothing there.
#:   bits 0-39 block   bit 40 kind (0 XIP, 1 pagecache)   bits 41-43 home   bits 44-47 zero
#:   bits 48-63 a check over the rest, the inode number, the level and the position
ENTRY_BLOCK_MASK: Final = (1 << 40) - 1
ENTRY_PAGECACHE: Final = 1 << 40
ENTRY_HOME_SHIFT: Final = 41
HOME_RAW: Final = 1  # the block holds the page's bytes
HOME_COMPRESSED: Final = 2  # reserved: refused by this version
HOME_NODE: Final = 3  # the block is a map node
ENTRY_CHECK_SHIFT: Final = 48
ENTRY_BODY_MASK: Final = (1 << 48) - 1

FANOUT_SHIFT: Final = 9
FANOUT: Final = 1 << FANOUT_SHIFT
MAX_HEIGHT: Final = 4
#: The format's limits, whatever the image's size: 2^36 pages = 256 TiB (sparse).
MAX_FILE_PAGES: Final = 1 << (FANOUT_SHIFT * MAX_HEIGHT)
MAX_FILE_BYTES: Final = MAX_FILE_PAGES * BLOCK_SIZE

#: Directory leaf: crc32 of the used bytes after it, entries, used bytes, owner, position, zero.
LEAF_HEADER: Final = struct.Struct("<IHHQQQ")
#: Directory record: hash, inode, file type (DT_*), name length; the name and zeros to 8 bytes.
LEAF_RECORD: Final = struct.Struct("<QQBB")
HASH_BITS: Final = 62
#: Leaf (depth d, prefix p) sits at map position 2^d + p - 1; this depth fills the map's range.
MAX_DIRECTORY_DEPTH: Final = 35
NAME_MAX: Final = 255
SYMLINK_MAX: Final = 4095
LINK_MAX: Final = (1 << 32) - 1

#: Extended attributes of one inode: crc32 of the used bytes after it, entries, used, owner.
XATTR_HEADER: Final = struct.Struct("<IHHQ")
#: name length, value length; then name and value, no padding.
XATTR_RECORD: Final = struct.Struct("<BH")

#: Journal header, the journal's first line: mark, sequence, payload bytes, crc32 of the sequence,
#: the length and the payload, zero. The mark is stored alone, after the rest is durable.
JOURNAL_HEADER: Final = struct.Struct("<QQQII")
JOURNAL_MARK: Final = 0x74696D6D6F435058  # "XPCommit" as bytes
#: Journal record: offset in the image, bytes; both multiples of a line. The bytes follow.
JOURNAL_RECORD: Final = struct.Struct("<QQ")

assert COUNTERS.size == 1 << LINE_SHIFT
assert INODE.size == INODE_SIZE
assert LEAF_HEADER.size == 32
