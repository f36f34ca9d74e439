"""Repairing inodes and their maps: what is sound is kept, what leads nowhere is cut to a hole.

An entry's check holds over the entry alone, so a map is judged by itself, also below an inode whose
own checksum is wrong. A node, a leaf, a block of attributes says whose it is: if two lead there,
the owner keeps it. A page says nothing: whoever is read first keeps it, the others get a copy.
"""

from __future__ import annotations

import stat
from typing import Final

import numpy as np

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.filemap import Entries, seal
from xipfs.image.mending import FREE, PAGE, STRUCTURE, Mending, NoRoomError
from xipfs.image.record import FILE_TYPES, NO_ID, Inode, pack_inode, unpack_inode
from xipfs.image.records import plain
from xipfs.image.sound import (
    PAGE_LEVEL,
    XATTR_LEVEL,
    entry_block,
    is_leaf_of,
    is_xattrs_of,
    read_xattrs,
    sound_pages,
)
from xipfs.image.xattrs import pack_xattrs

_BLOCK: Final = layout.BLOCK_SIZE
_REGULAR: Final = stat.S_IFREG | 0o600


class MapMending(Mending):
    """Repairs one inode after another."""

    #: Pages whose block has another owner: (ino, page).
    doubles: list[tuple[int, int]]
    #: Blocks taken from a page that came first by a structure that says whose it is.
    stolen: set[int]

    def mend_inode(self, ino: int, offset: int) -> Inode:
        """Repair the record at ``offset`` and all that it leads to; return what it is now."""
        number, at = divmod(offset, _BLOCK)
        raw = bytes(self.block(number)[at : at + layout.INODE_SIZE])
        inode = self.read_inode(ino, raw, offset)
        if inode.mode:
            self.mend_map(inode)
            self.mend_xattrs(inode)
            self.mend_type(inode)
        inode = plain(inode)
        if pack_inode(inode) != raw:
            self.put(inode)
            self.did("inode", offset, "fields put right", ino)
        return inode

    def read_inode(self, ino: int, raw: bytes, offset: int) -> Inode:
        """Return the inode of a record, field by field where it cannot be read as a whole.

        One with pages that lacks its type is a file, but for a sound record of a free inode: its
        pages could not be read, and a full image may need their blocks.
        """
        try:
            inode = unpack_inode(ino, bytearray(raw), 0, 0)
            inode.record_offset = offset
            free = inode.mode == 0 and inode.nlink == 0
        except ImageError:
            inode, free = salvaged(ino, raw, offset), False
        if ino and inode.root and self.height_of(inode) is None:
            # A right checksum over a root that leads nowhere: the walk cuts it.
            return inode
        if ino and inode.root and not free:
            inode.height = self.height_of(inode) or 0
            if inode.mode == 0:
                inode.mode = _REGULAR
        return inode

    def height_of(self, inode: Inode) -> int | None:
        """Return the height that the root's check fits, the stored one first."""
        for height in (inode.height, *range(layout.MAX_HEIGHT + 1)):
            if entry_block(self.superblock, inode.ino, height, 0, inode.root) is not None:
                return int(height)
        return None

    def mend_map(self, inode: Inode) -> None:
        """Cut what is not sound; own the rest."""
        owned, root = 0, inode.root
        if root:
            owned = self.mend_entry(inode, inode.height, 0, root)
            if owned == 0:
                self.cut(inode, inode.height, 0, inode.record_offset + layout.INODE_ROOT_OFFSET)
                inode.root = 0
        if inode.root == 0:
            inode.height = 0
        inode.blocks = owned

    def cut(self, inode: Inode, level: int, position: int, offset: int) -> None:
        """Note that an entry became a hole."""
        first, count = position << 9 * level, 1 << 9 * level
        what = f"page {first} is a hole now"
        if count > 1:
            what = f"pages {first} to {first + count - 1} are holes now"
        self.did("map", offset, what, inode.ino)

    def mend_entry(self, inode: Inode, level: int, position: int, word: int) -> int:
        """Own what the entry leads to; return how many blocks, 0 if it must be cut."""
        number = entry_block(self.superblock, inode.ino, level, position, word)
        if number is None:
            return 0
        if level == PAGE_LEVEL:
            return self.own_page(inode, position, number)
        words: Entries = np.frombuffer(self.block(number), "<u8")
        if not self.is_node(inode, level, position, words):
            return 0
        if not self.own_structure(number):
            return 0
        return self.mend_node(inode, level, position, number)

    def is_node(self, inode: Inode, level: int, position: int, words: Entries) -> bool:
        """Whether any entry fits: what was never this inode's node is not to be changed."""
        first = position * layout.FANOUT
        if level == 1:
            return bool(sound_pages(self.superblock, inode.ino, first, words).any())
        return any(
            entry_block(self.superblock, inode.ino, level - 1, first + slot, int(words[slot]))
            for slot in np.flatnonzero(words).tolist()
        )

    def mend_node(self, inode: Inode, level: int, position: int, number: int) -> int:
        """Repair a node's entries; return its blocks, itself included, or 0 if none is left."""
        words: Entries = np.frombuffer(bytes(self.block(number)), "<u8")
        first, base = position * layout.FANOUT, number * _BLOCK
        owned, cuts = 1, []
        if level == 1 and stat.S_ISREG(inode.mode):
            blocks = (words & np.uint64(layout.ENTRY_BLOCK_MASK)).astype(np.int64)[words != 0]
            sound = sound_pages(self.superblock, inode.ino, first, words)[words != 0]
            plain_case = sound.all() and not self.used[blocks].any()
            if plain_case and np.unique(blocks).size == blocks.size:
                self.used[blocks] = PAGE
                return 1 + int(blocks.size)
        for slot in np.flatnonzero(words).tolist():
            below = self.mend_entry(inode, level - 1, first + slot, int(words[slot]))
            owned += below
            if below == 0:
                cuts.append(base + slot * 8)
                self.cut(inode, level - 1, first + slot, base + slot * 8)
        if owned == 1:
            self.used[number] = FREE
            return 0
        if cuts:
            self.write([(offset, bytes(8)) for offset in cuts])
        return owned

    def own_structure(self, number: int) -> bool:
        """Take a block that says whose it is, also from a page that claimed it before."""
        if self.used[number] == STRUCTURE:
            return False
        if self.used[number] == PAGE:
            self.stolen.add(number)
        self.used[number] = STRUCTURE
        return True

    def own_page(self, inode: Inode, page: int, number: int) -> int:
        """Own a page; of directories and the table only what says that it is theirs."""
        if inode.ino == layout.TABLE_INO:
            return int(self.is_table_page(page, number) and self.own_structure(number))
        if stat.S_ISDIR(inode.mode) and is_leaf_of(self.block(number), inode.ino, page):
            return int(self.own_structure(number))
        if self.used[number]:
            self.doubles.append((inode.ino, page))
        else:
            self.used[number] = PAGE
        return 1

    def is_table_page(self, page: int, number: int) -> bool:
        """Whether one record of the block is right, or the block is still empty."""
        raw = self.block(number)
        if not any(raw):
            return True
        for slot in range(layout.INODES_PER_BLOCK):
            try:
                unpack_inode(
                    page * layout.INODES_PER_BLOCK + slot, raw, number, slot * layout.INODE_SIZE
                )
            except ImageError:
                continue
            return True
        return False

    def mend_xattrs(self, inode: Inode) -> None:
        """Keep the attributes that can be recognised; drop the block if there is none."""
        word, offset = inode.xattr_block, inode.record_offset + layout.INODE_XATTR_OFFSET
        if word == 0:
            return
        number = entry_block(self.superblock, inode.ino, XATTR_LEVEL, 0, word)
        found: dict[bytes, bytes] = {}
        sound = False
        if number is not None and is_xattrs_of(self.block(number), inode.ino):
            found, sound = read_xattrs(self.block(number), inode.ino)
        if number is None or not found or not self.own_structure(number):
            inode.xattr_block = 0
            self.did("xattrs", offset, "the extended attributes are gone", inode.ino)
            return
        inode.blocks += 1
        if not sound:
            self.write([(number * _BLOCK, pack_xattrs(inode.ino, found))])
            kept = b", ".join(found).decode(errors="replace")
            self.did("xattrs", number * _BLOCK, f"kept {kept}", inode.ino)

    def mend_type(self, inode: Inode) -> None:
        """Make type, size and pages agree; what has pages of bytes becomes a file."""
        pages = self.pages(inode) if not stat.S_ISREG(inode.mode) else []
        if stat.S_ISDIR(inode.mode):
            if pages and not any(is_leaf_of(self.block(at), inode.ino, page) for page, at in pages):
                self.become_file(inode)
        elif stat.S_ISLNK(inode.mode):
            if len(pages) > 1 or (pages and pages[0][0]):
                self.become_file(inode)
        elif not stat.S_ISREG(inode.mode) and pages:
            self.become_file(inode)
        if stat.S_ISREG(inode.mode) and inode.root and not inode.orphan:
            last = self.last_page(inode)
            if last * _BLOCK >= inode.size_bytes:
                inode.size_bytes = (last + 1) * _BLOCK
                what = f"{inode.size_bytes} bytes long now, so that page {last} can be read"
                self.did("inode", inode.record_offset, what, inode.ino)

    def become_file(self, inode: Inode) -> None:
        """Let an inode with pages that its type cannot have be a regular file."""
        inode.mode = stat.S_IFREG | stat.S_IMODE(inode.mode) & 0o600
        inode.parent = inode.entries = 0
        self.did("inode", inode.record_offset, "a regular file now, so that it can be read")

    def mend_link(self, inode: Inode) -> None:
        """End a link's target at its first zero; without a target there is no link.

        Comes when every page has a block of its own: until then its block may be another's.
        """
        pages = self.pages(inode)
        if pages and pages[0][1] in self.shared:
            return
        raw = bytes(self.block(pages[0][1])) if pages else b""
        size = (raw + b"\0").index(b"\0")
        if size > layout.SYMLINK_MAX:
            self.become_file(inode)
            inode.size_bytes = _BLOCK
        elif size == 0:
            owned = [number for _page, number in pages]
            if inode.xattr_block:
                owned.append(inode.xattr_block & layout.ENTRY_BLOCK_MASK)
            inode.mode = 0
            self.put(plain(inode))
            self.untake(owned)
            self.did("symlink", inode.record_offset, "removed: it has no target", inode.ino)
            return
        elif inode.size_bytes == size and not any(raw[size:]):
            return
        else:
            inode.size_bytes = size
            self.write([(pages[0][1] * _BLOCK, raw[:size].ljust(_BLOCK, b"\0"))])
            self.did("symlink", inode.record_offset, f"{size} bytes long now", inode.ino)
        self.put(inode)

    def last_page(self, inode: Inode) -> int:
        """Return the number of a mended map's last page."""
        word, position = inode.root, 0
        for level in range(inode.height, 0, -1):
            number = entry_block(self.superblock, inode.ino, level, position, word)
            assert number is not None, (inode.ino, level)
            words = np.frombuffer(self.block(number), "<u8")
            slot = int(np.flatnonzero(words)[-1])
            word, position = int(words[slot]), position * layout.FANOUT + slot
        return position

    def part_doubles(self, read: Inode, page: int) -> None:
        """Give a page of a mended inode, whose block another one owns, a block of its own."""
        word, position, offset = read.root, 0, read.record_offset + layout.INODE_ROOT_OFFSET
        for level in range(read.height, 0, -1):
            number = word & layout.ENTRY_BLOCK_MASK
            slot = page >> 9 * (level - 1) & layout.FANOUT - 1
            offset = number * _BLOCK + slot * 8
            word = int.from_bytes(self.medium.load(offset, 8), "little")
            position = position * layout.FANOUT + slot
        old = entry_block(self.superblock, read.ino, PAGE_LEVEL, position, word)
        if old is None:
            return  # the inode lost its pages meanwhile
        assert self.originals is not None, "all pages have been parted"
        try:
            number = self.take(self.originals.get(old) or bytes(self.block(old)), PAGE)
        except NoRoomError:
            self.shared.add(old)
            return
        body = word & layout.ENTRY_BODY_MASK & ~layout.ENTRY_BLOCK_MASK | number
        entry = seal(read.ino, PAGE_LEVEL, position, body)
        if read.height:
            self.write([(offset, entry.to_bytes(8, "little"))])
        else:
            read.root = entry
            self.put(read)
        self.did("shared-block", old * _BLOCK, f"page {page} has a copy of its own now", read.ino)


def salvaged(ino: int, raw: bytes, offset: int) -> Inode:
    """Return what can be believed of a record whose checksum or fields are wrong."""
    fields = layout.INODE.unpack(raw)
    _crc, mode, generation, nlink, uid, gid, rdev, height, kind, _flags = fields[:10]
    size, atime, mtime, ctime, root, _blocks, xattrs, parent = fields[10:18]
    if not any(raw):
        return Inode(ino, record_offset=offset)
    if mode & ~0o7777 not in FILE_TYPES:
        mode = _REGULAR if root else 0
    return Inode(
        ino,
        mode=mode,
        generation=generation,
        nlink=nlink,
        uid=0 if uid == NO_ID else uid,
        gid=0 if gid == NO_ID else gid,
        rdev=rdev,
        height=min(height, layout.MAX_HEIGHT),
        pagecache=kind == 1,
        size_bytes=size if size <= layout.MAX_FILE_BYTES else 0,
        atime_ns=atime,
        mtime_ns=mtime,
        ctime_ns=ctime,
        root=root,
        xattr_block=xattrs,
        parent=parent,
        record_offset=offset,
    )
