"""Inodes and their extended attributes: the table, the free list, the orphans, the record."""

from __future__ import annotations

import errno
import struct
import zlib

import pytest
from media import RecordingMedium, new_medium

from xipfs.errors import FsError, ImageError
from xipfs.image.record import Inode, pack_inode
from xipfs.image.volume import Volume


@pytest.fixture
def medium() -> RecordingMedium:
    return new_medium(200)


@pytest.fixture
def volume(medium: RecordingMedium) -> Volume:
    return Volume(medium, "image")


def make(volume: Volume, mode: int = 0o100644) -> Inode:
    with volume.transaction():
        inode = volume.inodes.create()
        inode.mode = mode
        volume.inodes.put(inode)
    return inode


def release(volume: Volume, inode: Inode) -> None:
    with volume.transaction():
        volume.inodes.release(inode)


def test_a_record_keeps_every_field_at_its_extremes(
    volume: Volume, medium: RecordingMedium
) -> None:
    inode = make(volume)
    inode.mode, inode.generation, inode.nlink = 0o147777, (1 << 32) - 1, (1 << 32) - 1
    inode.uid = inode.gid = (1 << 32) - 2
    inode.rdev = (1 << 32) - 1
    inode.height, inode.pagecache, inode.orphan = 4, True, True
    inode.size_bytes, inode.blocks, inode.entries = (1 << 48), (1 << 40), (1 << 64) - 1
    inode.atime_ns, inode.mtime_ns, inode.ctime_ns = -(1 << 63), (1 << 63) - 1, -1
    inode.root = inode.xattr_block = (1 << 64) - 1
    inode.parent = inode.next_ino = inode.previous_ino = (1 << 64) - 1
    with volume.transaction():
        volume.inodes.put(inode)
    assert Volume(RecordingMedium(medium.durable), "image").inodes.get(inode.ino) == inode


def test_the_fields_are_where_the_specification_says() -> None:
    inode = Inode(3, mode=0o100644, generation=2, nlink=1, uid=1000, gid=100, rdev=5, height=2)
    inode.size_bytes, inode.atime_ns, inode.mtime_ns, inode.ctime_ns = 77, 1, -2, 3
    inode.root, inode.blocks, inode.xattr_block, inode.parent = 10, 11, 12, 13
    inode.next_ino, inode.previous_ino, inode.entries, inode.pagecache = 14, 15, 16, True
    record = pack_inode(inode)
    assert len(record) == 128
    assert struct.unpack_from("<IIIIIIBBH", record, 4) == (0o100644, 2, 1, 1000, 100, 5, 2, 1, 0)
    assert struct.unpack_from("<Qqqq", record, 32) == (77, 1, -2, 3)
    assert struct.unpack_from("<8Q", record, 64) == (10, 11, 12, 13, 14, 15, 16, 0)


@pytest.mark.parametrize("owner", ["uid", "gid"])
def test_nobody_owns_an_inode(volume: Volume, medium: RecordingMedium, owner: str) -> None:
    """Neither is such a record written, nor is one that somebody else wrote believed."""
    inode = make(volume)
    record = bytearray(pack_inode(inode))
    at = {"uid": 16, "gid": 20}[owner]
    record[at : at + 4] = b"\xff" * 4
    record[:4] = zlib.crc32(record[4:], zlib.crc32(inode.ino.to_bytes(8, "little"))).to_bytes(
        4, "little"
    )
    medium.store(volume.inodes.get(inode.ino).record_offset, bytes(record))
    with pytest.raises(ImageError, match=f"inode {inode.ino} at offset .* is damaged"):
        volume.inodes.get(inode.ino)
    setattr(inode, owner, (1 << 32) - 1)
    with pytest.raises(FsError) as refused:
        pack_inode(inode)
    assert refused.value.errno == errno.EINVAL


def test_numbers_start_at_one_and_the_table_grows_a_block_at_a_time(volume: Volume) -> None:
    free = volume.counters.free_blocks
    assert volume.inodes.get(1).mode == 0o040755
    assert [make(volume).ino for _ in range(62)] == list(range(2, 64))
    assert volume.counters.free_blocks == free - 2  # inode 32 opened a block and the map's node
    assert volume.counters.inodes_used == 63


def test_a_freed_number_comes_back_with_the_next_generation(volume: Volume) -> None:
    first = make(volume)
    assert (first.ino, first.generation) == (2, 1)
    release(volume, first)
    with pytest.raises(FsError) as caught:
        volume.inodes.get(2)
    assert caught.value.errno == 2
    again = make(volume)
    assert (again.ino, again.generation) == (2, 2)
    assert make(volume).ino == 3


@pytest.mark.parametrize("ino", [0, -1, 2, 1 << 40])
def test_numbers_that_never_were(volume: Volume, ino: int) -> None:
    with pytest.raises(FsError) as caught:
        volume.inodes.get(ino)
    assert caught.value.errno == 2


def test_what_owns_something_is_not_released(volume: Volume) -> None:
    for field, error in (("blocks", ImageError), ("nlink", AssertionError)):
        inode = make(volume)
        setattr(inode, field, 1)
        with pytest.raises(error):
            release(volume, inode)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_orphans_leave_their_list_in_any_order(volume: Volume, order: tuple[int, ...]) -> None:
    inodes = [make(volume) for _ in range(3)]
    for inode in inodes:
        with volume.transaction():
            volume.inodes.orphan(inode)
    assert orphans(volume) == [4, 3, 2]
    left = [4, 3, 2]
    for number in order:
        with volume.transaction():
            inode = volume.inodes.raw(inodes[number].ino)
            volume.inodes.adopt(inode)
            volume.inodes.put(inode)
        left.remove(inode.ino)
        assert orphans(volume) == left
        assert not volume.inodes.raw(inode.ino).orphan


def orphans(volume: Volume) -> list[int]:
    found, ino = [], volume.counters.orphan_ino
    while ino:
        found.append(ino)
        ino = volume.inodes.raw(ino).next_ino
    return found


@pytest.mark.parametrize("at", [0, 4, 63, 64, 127])
def test_a_damaged_record_is_named(volume: Volume, medium: RecordingMedium, at: int) -> None:
    make(volume)
    # The table's first block is the data area's first.
    medium.now[volume.superblock.data_start * 4096 + 2 * 128 + at] ^= 1
    with pytest.raises(ImageError, match="inode 2 at offset 45312 is damaged"):
        volume.inodes.get(2)


def test_a_record_is_good_for_its_own_number_only(volume: Volume, medium: RecordingMedium) -> None:
    make(volume)
    make(volume)
    base = volume.superblock.data_start * 4096
    medium.now[base + 3 * 128 : base + 4 * 128] = medium.now[base + 2 * 128 : base + 3 * 128]
    with pytest.raises(ImageError, match="inode 3 at"):
        volume.inodes.get(3)


# Extended attributes


def save(volume: Volume, inode: Inode, attributes: dict[bytes, bytes]) -> None:
    with volume.transaction():
        volume.xattrs.save(inode, attributes)
        volume.inodes.put(inode)


def test_attributes_come_back_in_their_order(volume: Volume, medium: RecordingMedium) -> None:
    inode = make(volume)
    given = {b"user.b": b"", b"user.a": bytes(range(256)), b"trusted." + b"x" * 247: b"\0"}
    save(volume, inode, given)
    assert inode.blocks == 1
    again = Volume(RecordingMedium(medium.durable), "image")
    found = again.xattrs.load(again.inodes.get(inode.ino))
    assert list(found.items()) == list(given.items())


def test_no_attributes_own_no_block(volume: Volume) -> None:
    inode = make(volume)
    free = volume.counters.free_blocks
    assert volume.xattrs.load(inode) == {}
    save(volume, inode, {b"user.a": b"1"})
    save(volume, inode, {b"user.a": b"2", b"user.b": b"3"})
    assert volume.counters.free_blocks == free - 1
    save(volume, inode, {})
    assert (inode.blocks, inode.xattr_block) == (0, 0)
    assert volume.counters.free_blocks == free


def test_they_fill_one_block_and_no_more(volume: Volume) -> None:
    inode = make(volume)
    room = 4096 - 16 - 3 - len(b"user.a")
    save(volume, inode, {b"user.a": b"v" * room})
    assert volume.xattrs.load(inode) == {b"user.a": b"v" * room}
    for size in (room + 1, 65535, 65536, 1 << 20):
        with pytest.raises(FsError) as caught:
            save(volume, inode, {b"user.a": b"v" * size})
        assert caught.value.errno == 28, size
    assert volume.xattrs.load(inode) == {b"user.a": b"v" * room}


@pytest.mark.parametrize("at", [0, 4, 6, 8, 16, 30])
def test_damaged_attributes_are_named(volume: Volume, medium: RecordingMedium, at: int) -> None:
    inode = make(volume)
    save(volume, inode, {b"user.a": b"some value"})
    block = inode.xattr_block & ((1 << 40) - 1)
    medium.now[block * 4096 + at] ^= 0x80
    with pytest.raises(
        ImageError, match=r"extended attributes of inode 2 at offset \d+ are damaged"
    ):
        volume.xattrs.load(inode)
    inode.xattr_block ^= 1 << 50
    with pytest.raises(
        ImageError, match=r"extended attributes of inode 2 at offset \d+ are damaged"
    ):
        volume.xattrs.load(inode)
