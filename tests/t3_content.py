"""Bytes: boundary sizes, holes, the far end, a full image, files larger than RAM."""

from __future__ import annotations

import errno
import random
import struct

import pytest
from imagecheck import check
from media import RecordingMedium, new_medium, open_medium

from xipfs.clock import ManualClock
from xipfs.errors import FsError, ImageError, NoBlocksError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind, WriteOrigin
from xipfs.image.layout import MAX_FILE_BYTES
from xipfs.memory.region import Buffer

PAGE = 4096
ROOT = 1
#: Of an image of 64 blocks.
BITMAP = 10 * PAGE
KINDS = [PageKind.XIP, PageKind.PAGECACHE]
#: Around 0, a page, a transaction (256 pages) and where the map gets its first and second level.
EDGES = [0, 1, 4095, 4096, 4097, 8191, 8192, 256 * PAGE - 1, 256 * PAGE + 1, 512 * PAGE + 1]


@pytest.fixture
def medium() -> RecordingMedium:
    return new_medium(1400)


@pytest.fixture
def fs(medium: RecordingMedium) -> Filesystem:
    return open_medium(medium, ram_pages=24)


def make(fs: Filesystem, kind: PageKind = PageKind.XIP, name: bytes = b"file") -> int:
    ino = fs.mknod(ROOT, name, 0o100644, 0, 0, 0).ino
    fs.set_default_kind(ino, kind)
    return ino


def pattern(size: int, start: int = 0) -> bytes:
    """Return bytes that differ from page to page and within a page."""
    return bytes((start + i) * 31 // 7 % 256 for i in range(size))


def fails(code: int) -> pytest.RaisesExc[FsError]:
    return pytest.raises(FsError, check=lambda error: error.errno == code)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", EDGES)
def test_a_file_of_a_boundary_size(medium: RecordingMedium, size: int, kind: PageKind) -> None:
    fs = open_medium(medium, ram_pages=24)
    ino = make(fs, kind)
    data = pattern(size)
    assert fs.write(ino, 0, data) == size
    assert fs.getattr(ino).size_bytes == size
    assert bytes(fs.read(ino, 0, size + 10)) == data
    fs.close()
    again = open_medium(RecordingMedium(medium.durable))
    assert bytes(again.read(ino, 0, size + 10)) == data
    pages = -(-size // PAGE)
    nodes = 0 if pages <= 1 else 1 if pages <= 512 else 3
    assert again.getattr(ino).blocks_512 == 8 * (pages + nodes)
    again.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1, 4095, 4096, 4097, 12288])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097])
def test_an_overwrite_changes_its_own_bytes_only(
    fs: Filesystem, kind: PageKind, offset: int, size: int
) -> None:
    ino = make(fs, kind)
    model = bytearray(pattern(5 * PAGE))
    fs.write(ino, 0, bytes(model))
    new = pattern(size, 99)
    fs.write(ino, offset, new)
    model[offset : offset + size] = new
    assert bytes(fs.read(ino, 0, 6 * PAGE)) == model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 4095, 4096, 4097, 9000])
def test_what_was_cut_off_reads_as_zeros_when_the_file_grows_again(
    fs: Filesystem, kind: PageKind, cut: int
) -> None:
    ino = make(fs, kind)
    data = pattern(3 * PAGE)
    fs.write(ino, 0, data)
    fs.setattr(ino, size_bytes=cut)
    assert bytes(fs.read(ino, 0, 3 * PAGE)) == data[:cut]
    fs.setattr(ino, size_bytes=3 * PAGE)
    assert bytes(fs.read(ino, 0, 4 * PAGE)) == data[:cut].ljust(3 * PAGE, b"\0")


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_behind_the_end_leaves_zeros_between(fs: Filesystem, kind: PageKind) -> None:
    ino = make(fs, kind)
    fs.write(ino, 0, b"x" * 5000)
    fs.setattr(ino, size_bytes=100)
    fs.write(ino, 4500, b"y")
    assert bytes(fs.read(ino, 0, 5000)) == b"x" * 100 + bytes(4400) + b"y"


@pytest.mark.parametrize(
    "offset", [1 << 21, 1 << 30, 1 << 39, 1 << 44, (1 << 44) - 1, MAX_FILE_BYTES - 5]
)
def test_bytes_far_out(medium: RecordingMedium, offset: int) -> None:
    """16 TiB and on to the format's last byte, on an image of 5 MiB."""
    fs = open_medium(medium)
    ino = make(fs)
    free = fs.statfs().blocks_free
    assert fs.write(ino, offset, b"tail!") == 5
    assert fs.getattr(ino).size_bytes == offset + 5
    assert bytes(fs.read(ino, offset - 3, 100)) == b"\0\0\0tail!"
    assert bytes(fs.read(ino, 0, 8192)) == bytes(8192)
    assert free - fs.statfs().blocks_free <= 10
    fs.close()
    again = open_medium(RecordingMedium(medium.durable))
    assert bytes(again.read(ino, offset, 5)) == b"tail!"
    again.setattr(ino, size_bytes=0)
    assert again.statfs().blocks_free == free
    again.close()


def test_the_limit_is_the_format_s(fs: Filesystem) -> None:
    assert MAX_FILE_BYTES == 1 << 48
    ino = make(fs)
    with fails(errno.EFBIG):
        fs.write(ino, MAX_FILE_BYTES, b"x")
    with fails(errno.EFBIG):
        fs.setattr(ino, size_bytes=MAX_FILE_BYTES + 1)
    assert fs.write(ino, MAX_FILE_BYTES - 2, b"abc") == 2
    assert bytes(fs.read(ino, MAX_FILE_BYTES - 2, 10)) == b"ab"
    assert fs.setattr(ino, size_bytes=MAX_FILE_BYTES).size_bytes == MAX_FILE_BYTES
    for offset, size in ((-1, 1), (0, -1)):
        with fails(errno.EINVAL):
            fs.read(ino, offset, size)
    with fails(errno.EINVAL):
        fs.write(ino, -1, b"x")
    with fails(errno.EISDIR):
        fs.read(ROOT, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_image_takes_what_fits_and_is_not_damaged(kind: PageKind) -> None:
    medium = new_medium(400)
    fs = open_medium(medium, ram_pages=16)
    keep = make(fs, kind, b"keep")
    fs.write(keep, 0, pattern(3 * PAGE))
    ino = make(fs, kind)
    done = 0
    with fails(errno.ENOSPC):
        while True:
            done += fs.write(ino, done, pattern(50 * PAGE, done))
    assert done == 350 * PAGE  # whole calls of 50 pages; a shorter one would say so
    assert fs.statfs().blocks_free < 50
    left = fs.statfs().blocks_free
    with fails(errno.ENOSPC):
        fs.write(ino, done, pattern((left + 1) * PAGE))
    with fails(errno.ENOSPC):
        fs.write(keep, 200 * PAGE, pattern((left + 1) * PAGE))
    assert fs.statfs().blocks_free == left
    assert bytes(fs.read(ino, 0, done + 1)) == b"".join(
        pattern(50 * PAGE, at) for at in range(0, done, 50 * PAGE)
    )
    # Overwriting needs no block; freeing gives room again.
    fs.write(ino, 0, pattern(50 * PAGE, 5))
    fs.unlink(ROOT, b"file")
    assert fs.write(keep, 3 * PAGE, pattern(300 * PAGE)) == 300 * PAGE
    fs.close()
    check(bytes(medium.durable))


def test_a_write_longer_than_a_transaction_may_end_early() -> None:
    fs = open_medium(new_medium(380))
    ino = make(fs)
    # 256 pages a transaction, which is what the kernel sends at once: one fits, not the second.
    assert fs.write(ino, 0, pattern(500 * PAGE)) == 256 * PAGE
    assert fs.getattr(ino).size_bytes == 256 * PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_does_not_fit_changes_nothing(kind: PageKind) -> None:
    """Half of its pages are there already."""
    fs = open_medium(new_medium(380))
    ino = make(fs, kind)
    fs.write(ino, 0, pattern(4 * PAGE))
    filler = make(fs, PageKind.XIP, b"filler")
    while fs.statfs().blocks_free > 2:
        fs.write(filler, fs.getattr(filler).size_bytes, bytes(PAGE))
    before = fs.getattr(ino)
    with fails(errno.ENOSPC):
        fs.write(ino, 0, pattern(8 * PAGE, 5))
    assert bytes(fs.read(ino, 0, 9 * PAGE)) == pattern(4 * PAGE)
    assert fs.getattr(ino) == before


def test_a_truncation_that_meets_damage_loses_no_bytes() -> None:
    """What was written and not yet at home is there still, and goes home."""
    medium = new_medium(1400)
    fs = open_medium(medium, ram_pages=24)
    ino = make(fs, PageKind.PAGECACHE)
    fs.write(ino, 600 * PAGE, b"far")
    fs.write(ino, 0, pattern(3 * PAGE))
    volume = fs._core.volume
    inode = volume.inodes.get(ino)
    root = (inode.root & ((1 << 40) - 1)) * PAGE
    (second,) = struct.unpack_from("<Q", medium.load(root, 16), 8)
    medium.store(((second & ((1 << 40) - 1)) * PAGE) + (600 - 512) * 8, b"\xff")
    with pytest.raises(ImageError) as damage:
        fs.setattr(ino, size_bytes=0)
    assert bytes(fs.read(ino, 0, 3 * PAGE)) == pattern(3 * PAGE)
    fs.note_damage(damage.value)
    fs.close()
    again = open_medium(RecordingMedium(medium.durable))
    assert bytes(again.read(ino, 0, 3 * PAGE)) == pattern(3 * PAGE)


def test_a_block_that_a_wrong_bitmap_lent_out_is_not_served() -> None:
    """Its owner would read what another file, gone since, wrote there."""
    medium = new_medium(64)
    before = open_medium(medium)
    ino = make(before)
    before.write(ino, 0, b"a" * PAGE)
    before.close()
    block = bytes(medium.now).index(b"a" * PAGE) // PAGE
    bits = BITMAP + block // 8
    medium.store(bits, bytes([medium.now[bits] & ~(1 << block % 8)]))
    fs = open_medium(medium)
    fs.write(make(fs, name=b"other"), 0, b"b" * PAGE)
    assert bytes(medium.load(block * PAGE, PAGE)) == b"b" * PAGE
    fs.unlink(ROOT, b"other")
    with pytest.raises(ImageError, match=rf"block {block} at offset .* inode {ino} and was freed"):
        fs.read(ino, 0, PAGE)


class CrowdedMedium(RecordingMedium):
    """A medium whose host has no room for one block."""

    crowded: int = -1

    def store(self, offset: int, data: Buffer) -> None:
        if offset // PAGE <= self.crowded <= (offset + len(data) - 1) // PAGE:
            raise FsError(errno.ENOSPC, "the host has no room")
        super().store(offset, data)


def test_a_home_without_room_keeps_no_other_page_from_its_own() -> None:
    medium = CrowdedMedium(bytes(new_medium(1400).now))
    before = open_medium(medium)
    inos = [make(before, PageKind.PAGECACHE, name) for name in (b"a", b"b")]
    old = random.Random(5).randbytes(3 * PAGE)
    for ino in inos:
        before.write(ino, 0, old)
    before.close()
    fs = open_medium(medium)
    middle = bytes(medium.now).index(old[PAGE : 2 * PAGE]) // PAGE
    for ino in inos:
        for page in range(3):
            fs.write(ino, page * PAGE, b"new!" * 1024)
    medium.crowded = middle
    for _ in range(2):
        with pytest.raises(FsError, match="the host has no room"):
            fs.write_back(100)
        assert fs.nr_dirty_pages == 1
    for page in (0, 2):
        fs.write(inos[0], page * PAGE, b"last" * 1024)
    fs.write(inos[1], 0, b"last" * 1024)
    with pytest.raises(FsError, match="the host has no room"):
        fs.close()
    again = open_medium(RecordingMedium(medium.durable))
    kept = old[PAGE : 2 * PAGE]
    assert bytes(again.read(inos[0], 0, 3 * PAGE)) == b"last" * 1024 + kept + b"last" * 1024
    assert bytes(again.read(inos[1], 0, 3 * PAGE)) == b"last" * 1024 + b"new!" * 2048
    assert not again._core.volume.was_clean


def test_only_a_lack_of_blocks_can_end_by_itself(fs: Filesystem) -> None:
    """Whoever waits for room must not wait for what no removal changes."""
    ino = make(fs)
    with pytest.raises(FsError) as attributes:
        fs.setxattr(ino, b"user.long", bytes(5000))
    assert (attributes.value.errno, type(attributes.value)) == (errno.ENOSPC, FsError)
    fs.write(ino, 0, bytes(fs.statfs().blocks_free * PAGE))
    with pytest.raises(NoBlocksError) as blocks:
        fs.write(ino, 2000 * PAGE, bytes(256 * PAGE))
    assert blocks.value.errno == errno.ENOSPC


def test_names_need_room_too_and_fail_without_damage() -> None:
    medium = new_medium(64)
    fs = open_medium(medium)
    ino = make(fs)
    while fs.statfs().blocks_free:
        fs.write(ino, fs.getattr(ino).size_bytes, bytes(PAGE))
    made = 0
    with fails(errno.ENOSPC):
        for made in range(200):
            fs.mkdir(ROOT, b"directory-%03d" % made, 0o755, 0, 0)
    before = sorted(name for name, _, _ in fs.readdir(ROOT, 0))
    assert len(before) == made + 1
    with fails(errno.ENOSPC):
        fs.symlink(ROOT, b"link", b"target", 0, 0)
    with fails(errno.ENOSPC):
        fs.setxattr(ino, b"user.a", b"1")
    assert sorted(name for name, _, _ in fs.readdir(ROOT, 0)) == before
    fs.close()
    check(bytes(medium.durable))


@pytest.mark.parametrize("ram_pages", [1, 2, 16])
def test_a_file_larger_than_ram(medium: RecordingMedium, ram_pages: int) -> None:
    fs = open_medium(medium, ram_pages=ram_pages)
    ino = make(fs, PageKind.PAGECACHE)
    data = bytearray(pattern(300 * PAGE))
    fs.write(ino, 0, bytes(data))
    assert fs.nr_resident_pages == ram_pages
    assert fs.cache_statistics().evictions == 300 - ram_pages
    chance = random.Random(3)
    for _ in range(200):
        at, size = chance.randrange(len(data) - 9000), chance.randint(1, 9000)
        new = chance.randbytes(size)
        fs.write(ino, at, new)
        data[at : at + size] = new
        at = chance.randrange(len(data))
        assert bytes(fs.read(ino, at, 9000)) == data[at : at + 9000]
    fs.close()
    again = open_medium(RecordingMedium(medium.durable))
    assert bytes(again.read(ino, 0, len(data))) == data
    again.close()


def test_a_write_to_a_pagecache_page_is_home_after_fsync_and_not_before(
    medium: RecordingMedium,
) -> None:
    fs = open_medium(medium)
    ino = make(fs, PageKind.PAGECACHE)
    fs.write(ino, 0, b"written" * 1000)
    assert b"written" * 100 not in medium.now
    assert fs.page(ino, 0).dirty
    fs.fsync(ino)
    assert b"written" * 500 in medium.durable
    assert not fs.page(ino, 0).dirty
    assert medium.synced == 1


def test_a_write_to_an_xip_page_is_durable_after_fsync(medium: RecordingMedium) -> None:
    fs = open_medium(medium)
    ino = make(fs)
    fs.write(ino, 0, b"in place" * 600)
    fs.write(ino, 8, b"IN PLACE")
    fs.fsync(ino)
    assert b"in placeIN PLACEin place" in medium.durable
    assert medium.volatile_lines() == set()


def test_write_back_goes_straight_home(medium: RecordingMedium) -> None:
    fs = open_medium(medium)
    ino = make(fs, PageKind.PAGECACHE)
    fs.write(ino, 0, bytes(2 * PAGE))
    fs.close()
    medium = RecordingMedium(medium.durable)
    fs = open_medium(medium)
    fs.write(ino, 100, b"from the kernel", origin=WriteOrigin.WRITEBACK)
    fs.write(ino, 2 * PAGE, b"a hole's bytes", origin=WriteOrigin.WRITEBACK)
    assert fs.nr_resident_pages == 0
    assert b"from the kernel" in medium.durable
    assert b"a hole's bytes" in medium.durable
    assert [fs.page(ino, i).kind for i in range(3)] == [PageKind.PAGECACHE] * 3
    # A resident page takes the bytes in its frame, as ever.
    assert bytes(fs.read(ino, 100, 4)) == b"from"
    fs.write(ino, 100, b"FROM", origin=WriteOrigin.WRITEBACK)
    assert bytes(fs.read(ino, 100, 8)) == b"FROM the"
    assert b"FROM the" not in medium.durable


def test_a_contiguous_xip_read_is_a_view_of_the_region(fs: Filesystem) -> None:
    ino = make(fs)
    fs.write(ino, 0, pattern(4 * PAGE))
    view = fs.read(ino, 100, 3 * PAGE)
    assert isinstance(view, memoryview)
    assert view.readonly
    fs.write(ino, 100, b"later")
    assert bytes(view[:5]) == b"later"


def test_times_and_kinds_after_a_write(medium: RecordingMedium) -> None:
    clock = ManualClock()
    fs = open_medium(medium, clock=clock)
    ino = make(fs)
    fs.write(ino, 0, bytes(PAGE))
    clock.advance(50)
    fs.write(ino, 10, b"x")
    attr = fs.getattr(ino)
    assert attr.mtime_ns == attr.ctime_ns == 1_000_000_050
    assert attr.atime_ns == 1_000_000_000
    fs.set_default_kind(ino, PageKind.PAGECACHE)
    fs.write(ino, 0, bytes(2 * PAGE))
    assert [fs.page(ino, i).kind for i in range(2)] == [PageKind.XIP, PageKind.PAGECACHE]


def test_a_cut_within_the_last_page_of_a_full_map_node(fs: Filesystem) -> None:
    ino = make(fs)
    last = 511 * PAGE
    fs.write(ino, last, b"x" * PAGE)
    assert fs.setattr(ino, size_bytes=last + PAGE - 1).size_bytes == 2097151
    assert bytes(fs.read(ino, last, PAGE)) == b"x" * 4095
