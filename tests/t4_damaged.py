"""Damaged images on a real mount: read-only with the reason, or refused; and never a stuck call."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz_images import BLOCK, Places, template
from live import Mounts, xipfs

from xipfs.image.check import check
from xipfs.memory.region import Region


def mutant(name: str, field: str, value: int, *, at: int = 0, fits: bool = True) -> bytes:
    image, places = template(name)
    made = bytearray(image)
    each = places.by_structure[field][at]
    made[each.offset : each.offset + each.size] = value.to_bytes(each.size, "little")
    for fix in each.fixes if fits else ():
        fix(made)
    return bytes(made)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


def test_damage_met_at_the_mount_makes_it_read_only(live: Mounts, path: Path) -> None:
    """The orphan list leads to a file that is none: writing would begin by freeing it."""
    path.write_bytes(mutant("orphans", "counters.orphan_ino", 3))
    directory = path.with_name("mnt")
    directory.mkdir()
    try:
        done = xipfs("mount", path, directory, "-o", "observe=off", "--log", path.with_name("log"))
        reason = "the orphan list leads to inode 3 at offset"
        assert f"{path} is damaged, mounted read-only: {reason}" in done.stderr
        assert (directory / "first").read_bytes()[:2] == b"\xfe\x5a"
        with pytest.raises(OSError, match="Read-only"):
            (directory / "new").touch()
        assert os.statvfs(directory).f_flag & os.ST_RDONLY
        assert "damaged, read-only: the orphan list" in xipfs("stat", directory).stdout
        assert f"mounted read-only: {reason}" in path.with_name("log").read_text()
    finally:
        xipfs("umount", directory)
    region = Region(path, writable=False)
    assert {finding.name for finding in check(region, "image")} == {"list"}
    region.close()


def test_damage_met_later_ends_all_changes(live: Mounts, path: Path) -> None:
    """A file's attributes fail their checksum: what was written before is there after fsck."""
    path.write_bytes(mutant("xip", "xattrs.crc", 1, fits=False))
    mount = live.mount(path)
    mount.expected_log = [r"is damaged: the extended attributes of inode", r"nothing is changed"]
    (mount / "new").write_bytes(b"written before")
    with pytest.raises(OSError, match="Input/output error"):
        os.listxattr(mount / "first")
    with pytest.raises(OSError, match="Read-only"):
        (mount / "other").touch()
    assert (mount / "new").read_bytes() == b"written before"
    told = mount.stats()["mount"]
    assert told["read_only"] is True
    assert told["damage"].startswith("the extended attributes of inode 2 at offset ")
    mount.umount()
    assert path.read_bytes()[BLOCK : BLOCK + 8] == b"XXIPMunt"
    assert xipfs("fsck", "-p", path, check=False).returncode == 4
    assert xipfs("fsck", "-y", path, check=False).returncode == 1
    mount = live.mount(path)
    assert (mount / "new").read_bytes() == b"written before"
    assert os.listxattr(mount / "first") == ["user.colour", "user.size"]
    assert mount.stats()["mount"]["damage"] == ""


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("counters.crc", "the counters at offset 4160 fail their checksum"),
        ("table.crc", "inode 0 at offset 4224 is damaged"),
        ("state.flag", "the mount flag at offset 4096 is damaged"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(path: Path, field: str, reason: str) -> None:
    path.write_bytes(mutant("xip", field, 5, fits=False))
    directory = path.with_name("mnt")
    directory.mkdir()
    done = xipfs("mount", path, directory, "--log", path.with_name("log"), check=False)
    assert (done.returncode, not done.stderr.count(reason)) == (1, False), done.stderr
    assert not os.path.ismount(directory)


def test_a_pending_transaction_is_finished_by_the_mount(live: Mounts, path: Path) -> None:
    path.write_bytes(template("pending")[0])
    mount = live.mount(path)
    assert sorted(os.listdir(mount.directory))[-2:] == ["renamed", "tall"]
    assert "first" not in os.listdir(mount.directory)
    mount.umount()
    assert path.read_bytes()[BLOCK : BLOCK + 8] == b"XIPClean"
    assert Places(path.read_bytes()).word(2 * BLOCK) == 0
