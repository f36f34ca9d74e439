"""The superblock: its geometry, its two copies, and what is refused."""

from __future__ import annotations

import struct
import zlib

import pytest
from media import RecordingMedium, new_medium, open_medium

from xipfs.errors import ImageError, UsageError
from xipfs.image.superblock import Superblock, geometry, load
from xipfs.units import PAGE_SIZE


def make(size_bytes: int, label: str = "") -> Superblock:
    return geometry(
        size_bytes,
        uuid=bytes(16),
        hash_key=bytes(16),
        created_ns=0,
        default_pagecache=False,
        label=label,
    )


@pytest.mark.parametrize(
    ("blocks", "journal", "bitmap", "data_start"),
    [
        (32, 8, 1, 11),  # the smallest
        (2048, 8, 1, 11),
        (2304, 9, 1, 12),
        (32768, 128, 1, 131),  # 128 MiB
        (32769, 128, 2, 132),
        (65536, 128, 2, 132),  # 256 MiB
        (1 << 40, 128, 1 << 25, (1 << 25) + 130),  # the largest: 4 PiB
    ],
)
def test_geometry(blocks: int, journal: int, bitmap: int, data_start: int) -> None:
    made = make(blocks * PAGE_SIZE)
    assert (made.journal_start, made.journal_blocks) == (2, journal)
    assert (made.bitmap_start, made.bitmap_blocks) == (2 + journal, bitmap)
    assert (made.data_start, made.data_end) == (data_start, blocks - 1)


@pytest.mark.parametrize("size", [0, 4096, 31 * 4096, 32 * 4096 + 1, 33 * 4096 - 512, 1 << 53])
def test_sizes_that_are_no_image(size: int) -> None:
    with pytest.raises(UsageError, match="a multiple of 4096 from 128 KiB to 4 PiB"):
        make(size)


def test_labels() -> None:
    assert make(1 << 20, "ä" * 31 + "x").label == "ä" * 31 + "x"  # 63 bytes
    for wrong in ("x" * 64, "ä" * 32, "a\0b"):
        with pytest.raises(UsageError, match="at most 63 bytes of UTF-8 without NUL"):
            make(1 << 20, wrong)


def test_the_fields_are_where_the_specification_says() -> None:
    image = new_medium(64).durable
    assert image[:8] == b"xipfsNVM"
    assert struct.unpack_from("<I", image, 8) == (1,)
    assert struct.unpack_from("<II", image, 16) == (4096, 128)
    assert struct.unpack_from("<QQQQQQ", image, 24) == (64, 2, 8, 10, 1, 11)
    assert image[72:88] == bytes(range(16))
    assert image[88:104] == bytes(range(16, 32))
    assert struct.unpack_from("<q", image, 104) == (1_000_000_000,)
    assert image[112:120] == b"\x00\x06medium"
    without = bytes(image[:12]) + bytes(4) + bytes(image[16:4096])
    assert struct.unpack_from("<I", image, 12) == (zlib.crc32(without),)
    assert image[-4096:] == image[:4096]


@pytest.mark.parametrize("damaged", [0, 8, 12, 20, 24, 100, 113, 4000])
def test_either_copy_is_enough(damaged: int) -> None:
    sound = bytes(new_medium(64).durable)
    for base in (0, 63 * PAGE_SIZE):
        image = bytearray(sound)
        image[base + damaged] ^= 0x10
        assert load(RecordingMedium(image), "image").label == "medium"
    image = bytearray(sound)
    image[damaged] ^= 0x10
    image[63 * PAGE_SIZE + damaged] ^= 0x10
    with pytest.raises(ImageError) as caught:
        load(RecordingMedium(image), "image x")
    text = str(caught.value)
    assert text.startswith("image x is not a usable xipfs image (superblock at offset 0: ")
    assert "superblock at offset 258048: " in text


def test_an_image_that_was_cut_off_is_named_as_such() -> None:
    image = bytes(new_medium(64).durable)[: 40 * PAGE_SIZE]
    with pytest.raises(ImageError, match="was cut off: 40 blocks are left; expected 64 blocks"):
        load(RecordingMedium(image), "image x")


@pytest.mark.parametrize(
    ("offset", "value"),
    [(32, 3), (40, 7), (40, 129), (48, 11), (56, 2), (64, 12), (24, 31)],
    ids=["journal", "short", "long", "bitmap", "bitmap size", "data", "count"],
)
def test_areas_that_overlap_are_refused_though_the_checksum_is_right(
    offset: int, value: int
) -> None:
    image = bytearray(new_medium(64).durable)
    for base in (0, 63 * PAGE_SIZE):
        struct.pack_into("<Q", image, base + offset, value)
        struct.pack_into("<I", image, base + 12, 0)
        struct.pack_into("<I", image, base + 12, zlib.crc32(image[base : base + 4096]))
    with pytest.raises(ImageError, match="areas overlap or leave the image"):
        load(RecordingMedium(image), "image")


def test_the_mount_flag_says_whether_the_image_was_closed() -> None:
    medium = new_medium()
    assert medium.now[4096:4104] == b"XIPClean"
    fs = open_medium(medium)
    assert medium.durable[4096:4104] == b"XXIPMunt"
    fs.close()
    assert medium.durable[4096:4104] == b"XIPClean"
    image = bytearray(medium.now)
    image[4096] ^= 1
    with pytest.raises(ImageError, match="mount flag at offset 4096 is damaged"):
        open_medium(RecordingMedium(image))


def test_counters_that_fail_their_checksum_are_refused() -> None:
    image = bytearray(new_medium().now)
    image[4096 + 64 + 8] ^= 1
    with pytest.raises(ImageError, match="counters at offset 4160 fail their checksum"):
        open_medium(RecordingMedium(image))
