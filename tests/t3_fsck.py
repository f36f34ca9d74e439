"""fsck: a sound image has no finding; each damaged structure is found under its name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from xipfs.cli import main
from xipfs.clock import ManualClock
from xipfs.fs.build import Build, replace_image
from xipfs.fs.imagelock import ImageLock
from xipfs.fs.tree import scan

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "directory" / "below").mkdir(parents=True)
    for number in range(200):
        (tree / "directory" / f"a name of some length {number}").touch()
    (tree / "file").write_bytes(b"x" * 3 * MIB)
    (tree / "link").symlink_to("file")
    (tree / "second").hardlink_to(tree / "file")
    path = tmp_path / "image"
    build = Build(size_bytes=16 * MIB, label="", pagecache=False)
    replace_image(path, build, scan(tree), ManualClock(0), lambda _size: None)
    return path


def fsck(image: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    before = image.read_bytes()
    code = main(["fsck", "-n", str(image)])
    assert image.read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    return code, sorted({line.split(" ", 1)[0] for line in lines[:-1]})


def damage(image: Path, offset: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_sound_image_has_no_finding(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fsck(image, capsys) == (0, [])


# 16 MiB are 4096 blocks: journal 2 to 17, bitmap 18, data from 19, second superblock 4095.
@pytest.mark.parametrize(
    ("offset", "data", "names"),
    [
        (200, b"!", ["superblock"]),
        (4095 * 4096 + 8, b"!", ["superblock"]),
        (4096, b"?", ["mount-flag"]),
        (4096 + 72, b"\xff\xff", ["counters"]),
        (2 * 4096, b"XPCommi?", ["journal"]),
        (18 * 4096 + 511, b"\xff", ["bitmap"]),
        (18 * 4096 + 500, b"\x01", ["bitmap"]),
    ],
)
def test_damage_is_found_by_name(
    image: Path, offset: int, data: bytes, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(image, offset, data)
    code, found = fsck(image, capsys)
    assert (code, found) == (4, names)


def test_an_image_in_use_is_refused(image: Path) -> None:
    lock = ImageLock(image, exclusive=True)
    assert main(["fsck", "-y", str(image)]) == 8
    assert main(["fsck", "-p", str(image)]) == 8
    lock.release()


def test_an_image_in_use_is_judged_with_a_warning(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = ImageLock(image, exclusive=True)
    assert main(["fsck", "-n", str(image)]) == 0
    lock.release()
    assert "warning: image" in capsys.readouterr().err


def table_block(image: Path) -> int:
    """The block of the inode table's first page: below its root, two levels at most."""
    raw = image.read_bytes()
    height, (word,) = raw[4096 + 128 + 28], struct.unpack_from("<Q", raw, 4096 + 128 + 64)
    for _level in range(height):
        (word,) = struct.unpack_from("<Q", raw, (word & (1 << 40) - 1) * 4096)
    return int(word & (1 << 40) - 1)


def test_a_damaged_inode_and_map_are_found(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inode = table_block(image) * 4096 + 128
    damage(image, inode + 40, b"!!")
    code = main(["fsck", "-n", str(image)])
    assert (code, f"inode at offset {inode} inode 1: " in capsys.readouterr().out) == (4, True)
    damage(image, 4096 + 128 + 64, b"\xff")
    code, found = fsck(image, capsys)
    assert code == 4
    assert "inode" in found


def test_a_pending_transaction_is_judged_by_its_result(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = image.read_bytes()[4096 + 64 : 4096 + 128]
    payload = struct.pack("<QQ", 4096 + 64, 64) + line
    crc = zlib.crc32(b"7 80" + payload)
    damage(image, 4096 + 64, bytes(64))
    assert fsck(image, capsys) == (4, ["counters"])
    damage(image, 2 * 4096, b"XPCommit" + struct.pack("<QQII", 7, 80, crc, 0))
    damage(image, 2 * 4096 + 64, payload)
    assert fsck(image, capsys) == (0, [])
