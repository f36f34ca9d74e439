"""Damaged images on a real mount: read-only with the reason, or refused; and never a stuck call."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import fuzz_mounts
import pytest
from conftest import needs
from fuzz_images import BLOCK, Places, template
from fuzz_visit import Visit
from fuzzing import Case, FuzzError, Outcome
from live import Mounts, xipfs

from xipfs.fuse.mounts import mounts
from xipfs.image.check import check
from xipfs.memory.region import Region

MOUNTS = 24


def mutant(name: str, field: str, value: int, *, at: int = 0, fits: bool = True) -> bytes:
    image, places = template(name)
    made = bytearray(image)
    each = places.by_structure[field][at]
    made[each.offset : each.offset + each.size] = value.to_bytes(each.size, "little")
    for fix in each.fixes if fits else ():
        fix(made)
    return bytes(made)


def image_without_page_1_of_first() -> bytes:
    """Its entry in the map of that file, inode 2, fails its check."""
    entries = template("xip")[1].by_structure["node1.entry"]
    (at,) = [place for place, each in enumerate(entries) if each.entry == (2, 0, 1)]
    return mutant("xip", "node1.entry", 5, at=at, fits=False)


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


def test_a_name_of_the_root_is_damage(live: Mounts, path: Path) -> None:
    """The kernel refuses such an answer itself, and would leave nobody knowing why."""
    path.write_bytes(mutant("xip", "name.ino", 1))
    mount = live.mount(path)
    mount.expected_log = [r"is damaged: ", r"nothing is changed"]
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(mount.directory)
    assert "directory inode 1: the leaf at offset " in mount.stats()["mount"]["damage"]


def test_damage_met_by_a_migration_is_told_and_ends_all_changes(live: Mounts, path: Path) -> None:
    path.write_bytes(image_without_page_1_of_first())
    mount = live.mount(path)
    mount.expected_log = [r"is damaged: map of inode 2: the entry at offset", r"nothing is changed"]
    done = xipfs("migrate", mount / "first", "--to", "pagecache", check=False)
    assert done.returncode == 1
    assert "map of inode 2: the entry at offset " in done.stderr
    assert mount.stats()["mount"]["damage"].startswith("map of inode 2: the entry at offset ")
    with pytest.raises(OSError, match="Read-only"):
        (mount / "new").touch()


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


@needs("root", "fuse")
@pytest.mark.timeout(300)
def test_mounts_of_damaged_images_end_well(tmp_path: Path) -> None:
    """Some of the 200 that ``tools/fuzz`` mounts of its 100,000."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}; again: tools/fuzz --replay {seed}:NUMBER --mounts")
    numbers = list(range(MOUNTS))
    outcome, failures = fuzz_mounts.run(seed, numbers, 2, tmp_path, lambda _done, _failures: None)
    assert not failures
    endings = outcome.endings
    assert endings["refused"] < MOUNTS * 4 // 5, endings
    assert endings["read-write, until damage was met"] > 0, endings


def sound_case(image: bytes) -> Case:
    return Case(0, 0, image, ["image xip"], forged=False, copied=False)


@needs("root", "fuse")
@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGSTOP, "a program hung"), (signal.SIGKILL, "ENOTCONN")]
)
def test_the_judge_knows_a_hang_and_a_dead_daemon_and_frees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    def visit(mount: fuzz_mounts.FuzzMount) -> Visit:
        os.kill(mount.daemon, number)
        if number == signal.SIGKILL:
            os.waitid(os.P_PID, mount.daemon, os.WEXITED | os.WNOWAIT)
        return real_visit(mount)

    real_visit = fuzz_mounts.FuzzMount.visit
    monkeypatch.setattr(fuzz_mounts.FuzzMount, "visit", visit)
    case = sound_case(template("xip")[0])
    with pytest.raises(FuzzError, match=rf"^0:0 \(image xip; mounted with .*{told}"):
        fuzz_mounts.judge(case, Outcome(), tmp_path, step_max_s=2)
    assert list(tmp_path.iterdir()) == []
    assert not [mount for mount in mounts() if tmp_path in mount.mountpoint.parents]


@needs("root", "fuse")
def test_the_judge_knows_another_files_bytes(tmp_path: Path) -> None:
    image, places = template("xip")
    one, other = min(places.pages), max(places.pages)
    made = bytearray(image)
    made[one * BLOCK : (one + 1) * BLOCK] = image[other * BLOCK : (other + 1) * BLOCK]
    with pytest.raises(FuzzError, match=r"inode \d+ was served with bytes of inode \d+"):
        fuzz_mounts.judge(sound_case(bytes(made)), Outcome(), tmp_path)
