"""SPEC.md's tables say of every structure what layout.py packs: each field's offset and size."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from xipfs.image import layout

SPEC = (Path(layout.__file__).parent / "SPEC.md").read_text()


def fields_of(packing: struct.Struct, start: int = 0) -> list[tuple[int, int]]:
    """Return offset and size of each field of a struct."""
    found, at = [], start
    for count, code in re.findall(r"(\d*)([a-zA-Z])", packing.format.lstrip("<")):
        size = int(count) if code == "s" else struct.calcsize("<" + code)
        for _ in range(1 if code == "s" else int(count or 1)):
            found.append((at, size))
            at += size
    assert at == start + packing.size
    return found


def table_of(heading: str, column: str = "field") -> list[tuple[int, int]]:
    """Return offset and size of each field of a section's table of SPEC.md."""
    section = SPEC.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = section.split(f"| {column} |\n")[1].split("\n\n")[0].splitlines()[1:]
    found = []
    for row in rows:
        offsets, sizes, _text = (cell.strip() for cell in row.strip("|").split("|", 2))
        at = [int(number) for number in offsets.split(",")]
        each = [int(number) for number in sizes.removesuffix("each").split(",")]
        found += list(zip(at, each * (len(at) // len(each)), strict=True))
    return found


@pytest.mark.parametrize(
    ("heading", "column", "packing"),
    [
        ("Superblock", "field", layout.SUPERBLOCK),
        ("Journal", "field", layout.JOURNAL_HEADER),
        ("Inode, 128 bytes", "field", layout.INODE),
        ("Directory", "leaf header", layout.LEAF_HEADER),
    ],
)
def test_a_table_is_what_is_packed(heading: str, column: str, packing: struct.Struct) -> None:
    assert table_of(heading, column) == fields_of(packing)


def test_the_state_block_s_table_is_what_is_packed() -> None:
    counters = fields_of(layout.COUNTERS, layout.COUNTERS_OFFSET)
    table = [(layout.TABLE_INODE_OFFSET, layout.INODE_SIZE)]
    assert table_of("State block") == [(layout.MOUNT_FLAG_OFFSET, 8), *counters, *table]


def test_records_without_a_table_have_the_sizes_of_the_text() -> None:
    text = " ".join(SPEC.split())
    assert "records of offset (8), size (8) and that many bytes" in text
    assert [size for _, size in fields_of(layout.JOURNAL_RECORD)] == [8, 8]
    assert "hash (8), inode (8), type (1, DT_*), name length (1, 1 to 255), the name" in text
    assert [size for _, size in fields_of(layout.LEAF_RECORD)] == [8, 8, 1, 1]
    assert "crc32 of the used bytes from 4 on (4), entries (2), used bytes (2), inode" in text
    assert [size for _, size in fields_of(layout.XATTR_HEADER)] == [4, 2, 2, 8]
    assert "the name length (1), value length (2), name, value, unpadded" in text
    assert [size for _, size in fields_of(layout.XATTR_RECORD)] == [1, 2]


def test_words_and_limits_are_those_of_the_text() -> None:
    for word, text in (
        (layout.STATE_CLEAN, "XIPClean"),
        (layout.STATE_MOUNTED, "XXIPMunt"),
        (layout.STATE_REPAIR, "XXRepair"),
        (layout.JOURNAL_MARK, "XPCommit"),
    ):
        assert word.to_bytes(8, "little") == text.encode()
        assert f"`{text}`" in SPEC
    assert (layout.MAGIC, layout.FORMAT_VERSION) == (b"xipfsNVM", 1)
    assert (layout.MIN_BLOCKS, layout.MAX_BLOCKS) == (32, 1 << 40)
    assert (layout.MIN_JOURNAL_BLOCKS, layout.MAX_JOURNAL_BLOCKS) == (8, 128)
    assert (layout.MAX_HEIGHT, layout.MAX_DIRECTORY_DEPTH) == (4, 35)
    assert (layout.NAME_MAX, layout.SYMLINK_MAX, layout.LABEL_MAX_BYTES) == (255, 4095, 63)
    assert layout.MAX_FILE_BYTES == 1 << 48


def test_an_entry_s_bits_are_those_of_the_text() -> None:
    assert layout.ENTRY_BLOCK_MASK == (1 << 40) - 1, "bits 0-39"
    assert layout.ENTRY_PAGECACHE == 1 << 40
    assert layout.ENTRY_HOME_SHIFT == 41, "bits 41-43"
    assert layout.ENTRY_BODY_MASK == (1 << 48) - 1
    assert layout.ENTRY_CHECK_SHIFT == 48
    assert (layout.HOME_RAW, layout.HOME_COMPRESSED, layout.HOME_NODE) == (1, 2, 3)
