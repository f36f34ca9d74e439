"""Small images with everything the format has, and where in them each field of SPEC.md lies.

Each file's bytes say whose they are: every 8 bytes hold a mark, the inode number and the page. The
places are found by SPEC.md's text: nothing here asks xipfs.image where something is.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from media import PowerCut, RecordingMedium, open_medium

from xipfs.clock import ManualClock
from xipfs.errors import FsError
from xipfs.fs.build import make_image
from xipfs.fs.filesystem import Filesystem
from xipfs.image.superblock import geometry

BLOCK = 4096
MARK = 0x5AFE
BLOCKS = 96
#: Eighteen of these fill a leaf.
LONG_NAME = b"a name of some length %03d " + b"x" * 180
TAG = struct.Struct("<HHI")
WORD = (1 << 64) - 1


def page_of(ino: int, page: int) -> bytes:
    """Return the bytes that page of that file holds."""
    return TAG.pack(MARK, ino, page) * (BLOCK // TAG.size)


def _file(fs: Filesystem, parent: int, name: bytes, pages: list[int]) -> int:
    ino = fs.mknod(parent, name, 0o100644, 0, 1000, 1000).ino
    for page in pages:
        fs.write(ino, page * BLOCK, page_of(ino, page))
    return ino


def _fill(fs: Filesystem, *, names: int) -> None:
    """Make one of everything: files flat, tall and with holes, names in many leaves, links."""
    first = _file(fs, 1, b"first", [0, 1, 2])
    fs.link(first, 1, b"first again")
    fs.setxattr(first, b"user.colour", b"blue")
    fs.setxattr(first, b"user.size", b"x" * 300)
    fs.setxattr(_file(fs, 1, b"one page", [0]), b"trusted.key", b"")
    tall = _file(fs, 1, b"tall", [0, 3, 600, 601])
    fs.promote(tall, 600)
    below = fs.mkdir(1, b"directory", 0o755, 0, 0).ino
    deeper = fs.mkdir(below, b"deeper", 0o700, 5, 6).ino
    _file(fs, deeper, b"deep", [0, 1])
    for number in range(names):
        fs.mknod(below, LONG_NAME % number, 0o100600, 0, 0, 0)
    fs.symlink(1, b"link", b"directory/deeper", 0, 0)
    fs.mknod(1, b"fifo", 0o010644, 0, 0, 0)
    fs.mknod(1, b"device", 0o020600, 0x0103, 0, 0)
    hole = _file(fs, 1, b"hole", [])
    fs.setattr(hole, size_bytes=1 << 40)
    fs.mkdir(1, b"empty", 0o755, 0, 0)
    gone = _file(fs, 1, b"gone", [])
    fs.unlink(1, b"gone")
    assert gone


def _fill_up(fs: Filesystem) -> None:
    """Take the last block; some pages of the inode table belong to empty files only."""
    for number in range(64):
        fs.mknod(1, b"empty %d" % number, 0o100644, 0, 0, 0)
    filler = _file(fs, 1, b"filler", [])
    fs.mknod(1, b"a free inode", 0o100644, 0, 0, 0)
    while left := fs.statfs().blocks_free:
        page = fs.getattr(filler).size_bytes // BLOCK
        try:
            fs.write(filler, page * BLOCK, page_of(filler, page))
        except FsError:  # no room for the page and a node: a file of one page
            _file(fs, 1, b"last %d" % left, [0])
    fs.unlink(1, b"a free inode")
    assert fs.statfs().blocks_free == 0


def _build(pagecache: bool, names: int, ending: str) -> bytes:
    """``ending``: clean, full, orphans (unlinked but held), or pending (cut in a transaction)."""
    superblock = geometry(
        BLOCKS * BLOCK,
        uuid=bytes(range(16)),
        hash_key=bytes(range(16, 32)),
        created_ns=10**9,
        default_pagecache=pagecache,
        label="fuzz",
    )
    medium = RecordingMedium(bytes(BLOCKS * BLOCK))
    make_image(medium, superblock, ManualClock(10**9))
    fs = open_medium(medium, clock=ManualClock(10**9))
    _fill(fs, names=names)
    if ending == "full":
        _fill_up(fs)
    if ending in ("clean", "full"):
        fs.close()
        return bytes(medium.durable)
    held = [_file(fs, 1, b"held %d" % n, [0, 1]) for n in range(3)]
    for number, ino in enumerate(held):
        fs.hold(ino)
        fs.unlink(1, b"held %d" % number)
    fs.sync()
    if ending == "pending":
        # The third fence of a commit: the mark is durable, the records are not in their places.
        medium._cut_at = medium.fences + 3
        try:
            fs.rename(1, b"first", 1, b"renamed")
        except PowerCut:
            return bytes(medium.durable)
        raise FsError(5, "the cut did not come")
    return bytes(medium.durable)


#: Names of the images that are mutated.
TEMPLATES = {
    "xip": (False, 20, "clean"),
    "pagecache": (True, 5, "clean"),
    "orphans": (False, 5, "orphans"),
    "pending": (False, 5, "pending"),
    "full": (False, 20, "full"),
}


@functools.cache
def template(name: str) -> tuple[bytes, Places]:
    """Return the image of that name and its fields."""
    image = _build(*TEMPLATES[name])
    return image, Places(image)


Fix = Callable[[bytearray], None]


@dataclass
class Field:
    """``size`` bytes at ``offset``, called ``name``; ``fixes`` makes the checksums right again."""

    name: str
    offset: int
    size: int
    fixes: list[Fix] = field(default_factory=list)
    #: Entries only: (ino, level, position).
    entry: tuple[int, int, int] | None = None


SUPERBLOCK = (
    "magic:8 version:4 crc:4 block_size:4 inode_size:4 blocks:8 journal:8 journal_blocks:8 \
bitmap:8 bitmap_blocks:8 data:8 uuid:16 key:16 created:8 kind:1 label_length:1 label:64 rest:8"
)
COUNTERS = "crc:4 zero:4 free_blocks:8 inode_limit:8 free_ino:8 orphan_ino:8 xip_pages:8 \
pagecache_pages:8 inodes_used:8"
INODE = (
    "crc:4 mode:4 generation:4 nlink:4 uid:4 gid:4 rdev:4 height:1 kind:1 flags:2 size:8 atime:8 \
mtime:8 ctime:8 root:8 blocks:8 xattrs:8 parent:8 next:8 previous:8 entries:8 zero:8"
)
LEAF = "crc:4 count:2 used:2 owner:8 page:8 zero:8"
RECORD = "hash:8 ino:8 type:1 length:1"
XATTRS = "crc:4 count:2 used:2 owner:8"
JOURNAL = "mark:8 sequence:8 length:8 crc:4 zero:4"


def fields_of(table: str, structure: str, base: int, fixes: list[Fix]) -> Iterator[Field]:
    """Yield the fields of one of the tables above."""
    for word in table.split():
        name, size = word.split(":")
        yield Field(f"{structure}.{name}", base, int(size), list(fixes))
        base += int(size)


def seal(ino: int, level: int, position: int, body: int) -> int:
    """Return an entry with its check, as SPEC.md says."""
    x = (
        body
        ^ (ino * 0x9E3779B97F4A7C15 & WORD)
        ^ ((position * 8 + level) * 0xC2B2AE3D27D4EB4F & WORD)
    )
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & WORD
    return body | (x >> 48) << 48


def _crc(base: int, size: int, start: int = 0) -> Fix:
    def fix(image: bytearray) -> None:
        image[base : base + 4] = zlib.crc32(image[base + 4 : base + size], start).to_bytes(
            4, "little"
        )

    return fix


def _used_crc(base: int) -> Fix:
    """The checksum of a leaf or of attributes covers what the header says is used."""

    def fix(image: bytearray) -> None:
        used = min(int.from_bytes(image[base + 6 : base + 8], "little"), BLOCK)
        crc = zlib.crc32(image[base + 4 : base + max(used, 4)])
        image[base : base + 4] = crc.to_bytes(4, "little")

    return fix


def _superblock_crc(base: int) -> Fix:
    def fix(image: bytearray) -> None:
        image[base + 12 : base + 16] = bytes(4)
        crc = zlib.crc32(image[base : base + BLOCK])
        image[base + 12 : base + 16] = crc.to_bytes(4, "little")

    return fix


def _reseal(at: int, ino: int, level: int, position: int) -> Fix:
    def fix(image: bytearray) -> None:
        word = int.from_bytes(image[at : at + 8], "little")
        if word:
            image[at : at + 8] = seal(ino, level, position, word & (1 << 48) - 1).to_bytes(
                8, "little"
            )

    return fix


def _journal_crc(base: int) -> Fix:
    def fix(image: bytearray) -> None:
        sequence, length = struct.unpack_from("<QQ", image, base + 8)
        payload = image[base + 64 : base + 64 + min(length, 8 * BLOCK - 64)]
        crc = zlib.crc32(payload, zlib.crc32(b"%d %d" % (sequence, length)))
        image[base + 24 : base + 28] = crc.to_bytes(4, "little")

    return fix


class Places:
    """Every field of one sound image."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.fields: list[Field] = []
        self.blocks: list[int] = []
        """Blocks that hold something: what is copied over something else."""
        self.pages: set[int] = set()
        """Those that hold bytes of files, which no checksum covers."""
        self.inos: list[int] = []
        self.bitmap = self.word(48)
        for base in (0, len(image) - BLOCK):
            self.fields += fields_of(SUPERBLOCK, "superblock", base, [_superblock_crc(base)])
        self.fields.append(Field("state.flag", BLOCK, 8))
        counters = BLOCK + 64
        self.fields += fields_of(COUNTERS, "counters", counters, [_crc(counters, 64)])
        data = self.word(64)
        last = len(image) // BLOCK
        at = self.bitmap * BLOCK
        self.fields += [Field("bitmap.byte", at + n, 1) for n in range(data // 8, last // 8 + 1)]
        self.journal()
        self.inode(0, BLOCK + 128)
        self.by_structure: dict[str, list[Field]] = {}
        for each in self.fields:
            self.by_structure.setdefault(each.name, []).append(each)

    def word(self, offset: int, size: int = 8) -> int:
        return int.from_bytes(self.image[offset : offset + size], "little")

    def journal(self) -> None:
        base = 2 * BLOCK
        fix = _journal_crc(base)
        self.fields += fields_of(JOURNAL, "journal", base, [fix])
        if self.word(base) == 0:
            return
        at, end = base + 64, base + 64 + self.word(base + 16)
        while at < end:
            offset, size = struct.unpack_from("<QQ", self.image, at)
            self.fields += fields_of("offset:8 size:8", "journal.record", at, [fix])
            at += 16
            step = 8 if offset // BLOCK > 1 else 4
            for place in range(at, at + size, step):
                self.fields.append(Field("journal.payload", place, step, [fix]))
            if offset == BLOCK + 64:
                self.fields += fields_of(COUNTERS, "journal.counters", at, [_crc(at, 64), fix])
            at += size

    def inode(self, ino: int, base: int) -> None:
        """Note an inode's fields and everything below it."""
        start = zlib.crc32(ino.to_bytes(8, "little"))
        fix = _crc(base, 128, start)
        kind = self.word(base + 4, 4) >> 12
        structure = {0: "table" if ino == 0 else "free inode", 4: "directory", 8: "file"}
        name = structure.get(kind, "special inode")
        height, root, xattrs = self.word(base + 28, 1), self.word(base + 64), self.word(base + 80)
        for each in fields_of(INODE, name, base, [fix]):
            if each.size == 8 and each.offset in (base + 64, base + 80):
                level = height if each.offset == base + 64 else 7
                each.entry = (ino, level, 0)
                each.fixes.insert(0, _reseal(each.offset, ino, level, 0))
            self.fields.append(each)
        if ino:
            self.inos.append(ino)
        if xattrs:
            self.xattrs(xattrs & (1 << 40) - 1)
        if root:
            for page, block in self.walk(ino, root, height, 0):
                self.page(ino, kind, page, block)

    def walk(self, ino: int, word: int, level: int, position: int) -> Iterator[tuple[int, int]]:
        block = word & (1 << 40) - 1
        self.blocks.append(block)
        if level == 0:
            yield position, block
            return
        for slot in range(512):
            at = block * BLOCK + slot * 8
            below = position * 512 + slot
            entry = (ino, level - 1, below)
            if self.word(at) or slot in (0, 1, 511):
                fix = _reseal(at, *entry)
                self.fields.append(Field(f"node{level}.entry", at, 8, [fix], entry))
            if self.word(at):
                yield from self.walk(ino, self.word(at), level - 1, below)

    def page(self, ino: int, kind: int, page: int, block: int) -> None:
        base = block * BLOCK
        if ino == 0:
            for slot in range(32):
                number = page * 32 + slot
                if 0 < number < self.word(BLOCK + 64 + 16):
                    self.inode(number, base + slot * 128)
        elif kind == 4:
            self.leaf(base)
        elif kind == 8:
            self.pages.add(block)
        elif kind == 10:
            self.fields += [Field("symlink.byte", base + n, 1) for n in (0, 3, 20, 4095)]

    def leaf(self, base: int) -> None:
        fix = _used_crc(base)
        self.fields += fields_of(LEAF, "leaf", base, [fix])
        at, end = base + 32, base + self.word(base + 6, 2)
        while at < end:
            length = self.word(at + 17, 1)
            self.fields += fields_of(RECORD, "name", at, [fix])
            name, behind = at + 18, at + 18 + length
            self.fields += [Field("name.byte", each, 1, [fix]) for each in (name, behind - 1)]
            at = behind + -behind % 8
            self.fields += [Field("name.zero", each, 1, [fix]) for each in range(behind, at)]

    def xattrs(self, block: int) -> None:
        base = block * BLOCK
        self.blocks.append(block)
        fix = _used_crc(base)
        self.fields += fields_of(XATTRS, "xattrs", base, [fix])
        at, end = base + 16, base + self.word(base + 6, 2)
        while at < end:
            name, value = self.word(at, 1), self.word(at + 1, 2)
            self.fields += fields_of("name_length:1 value_length:2 name:1", "xattr", at, [fix])
            at += 3 + name + value
            if value:
                self.fields.append(Field("xattr.value", at - 1, 1, [fix]))
