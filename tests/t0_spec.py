"""SPEC.md's tables say of every structure what layout.py packs: each field's offset and size.

And tools/fuzz damages each of them: what SPEC.md gains, it must learn.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import fuzz_images
import fuzzing
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


# What tools/fuzz damages


def section_of(heading: str) -> str:
    """Return the text of a section, without line ends."""
    return " ".join(SPEC.split(f"\n## {heading}\n")[1].split("\n## ")[0].split())


def mutated(structure: str, size: int) -> set[tuple[int, int]]:
    """Return offset and size of each field of a structure ``size`` bytes long that is damaged."""
    for name in fuzz_images.TEMPLATES:
        _, places = fuzz_images.template(name)
        mine = [each for each in places.fields if each.name.startswith(f"{structure}.")]
        if mine:
            break
    base = min(each.offset for each in mine)
    return {(each.offset - base, each.size) for each in mine if each.offset < base + size}


@pytest.mark.parametrize(
    ("heading", "column", "structure", "size"),
    [
        ("Superblock", "field", "superblock", 4096),
        ("Journal", "field", "journal", 64),
        ("Inode, 128 bytes", "field", "table", 128),
        ("Inode, 128 bytes", "field", "file", 128),
        ("Inode, 128 bytes", "field", "directory", 128),
        ("Inode, 128 bytes", "field", "special inode", 128),
        ("Inode, 128 bytes", "field", "free inode", 128),
        ("Directory", "leaf header", "leaf", 32),
    ],
)
def test_every_field_of_a_table_is_damaged(
    heading: str, column: str, structure: str, size: int
) -> None:
    assert set(table_of(heading, column)) <= mutated(structure, size)


def test_every_field_of_the_state_block_is_damaged() -> None:
    (flag, *counters, table) = table_of("State block")
    assert {flag} == mutated("state", 4096)
    at = counters[0][0]
    assert {(offset - at, size) for offset, size in counters} <= mutated("counters", 64)
    assert table == (128, 128), "inode 0: its fields are those of every inode"


@pytest.mark.parametrize(
    ("heading", "start", "structure", "rest"),
    [
        ("Journal", "records of", "journal.record", ["payload"]),
        ("Directory", "Records follow", "name", ["byte", "zero"]),
        ("Symbolic link, attributes", "share one block:", "xattrs", []),
        ("Symbolic link, attributes", "then for each", "xattr", ["name", "value"]),
    ],
)
def test_every_field_told_in_words_is_damaged(
    heading: str, start: str, structure: str, rest: list[str]
) -> None:
    """Such a record is told as ``name (bytes)``, one after the other; then what has no length."""
    told = re.split(r"[;.] ", section_of(heading).split(start)[1])[0]
    sizes = [int(size) for size in re.findall(r"\((\d+)[,)]", told)]
    at = [sum(sizes[:number]) for number in range(len(sizes))]
    assert sizes
    assert set(zip(at, sizes, strict=True)) <= mutated(structure, sum(sizes))
    _, places = fuzz_images.template("pending")
    names = {each.name for each in places.fields}
    structure = structure.removesuffix(".record")
    assert {f"{structure}.{each}" for each in rest} <= names


def test_every_section_is_known_to_the_fuzzer() -> None:
    """The bitmap and a link's target have no fields: any byte of theirs is damaged."""
    assert re.findall(r"^## (.*)$", SPEC, re.MULTILINE) == [
        "Superblock",
        "State block",
        "Bitmap",
        "Journal",
        "Inode, 128 bytes",
        "Map entry, 8 bytes",
        "Directory",
        "Symbolic link, attributes",
    ]
    _, places = fuzz_images.template("pending")
    assert {"bitmap.byte", "symlink.byte"} <= set(places.by_structure)


def test_damage_reaches_every_field_and_every_bit_of_an_entry() -> None:
    """What 6,000 cases did: with a fitting checksum and without."""
    done: dict[str, set[bool]] = {}
    bits = 0
    for number in range(6000):
        for line in fuzzing.make_case(1, number).what:
            told = re.fullmatch(r"(.*) at \d+: 0x([0-9a-f]+) -> (-?)0x([0-9a-f]+)(.*)", line)
            if told is None:
                continue
            name, old, minus, new, fits = told.groups()
            done.setdefault(name, set()).add(fits == ", checksum fits")
            if name == "node1.entry" and not minus:
                bits |= int(old, 16) ^ int(new, 16)
    names = {
        name
        for each in fuzz_images.TEMPLATES
        for name in fuzz_images.template(each)[1].by_structure
    }
    assert {name for name in names if done.get(name) != {False, True}} == set()
    section = SPEC.split("\n## Map entry, 8 bytes\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+)(?:-(\d+))? \|", section, re.MULTILINE)
    parts = [range(int(first), int(last or first) + 1) for first, last in rows]
    assert [bit for part in parts for bit in part] == list(range(64))
    for part in parts:
        assert any(bits >> bit & 1 for bit in part), part
