"""Files and directories on a real mount: every operation, bytes compared, and after a remount."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import stat
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts

pytestmark = [needs("root", "fuse")]

NOISE = random.Random(20080328).randbytes(300_007)


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    return shared.mount()


def remounted(live: Mounts, mount: LiveMount) -> LiveMount:
    """The same image, mounted read-only elsewhere: what is there now was on the image."""
    return live.remount(mount, "ro")


def test_a_tree_survives_the_remount(live: Mounts) -> None:
    mount = live.mount()
    (mount / "dir" / "sub").mkdir(parents=True)
    (mount / "dir" / "sub" / "file").write_bytes(NOISE)
    (mount / "dir" / "empty").touch(mode=0o640)
    os.symlink("sub/file", mount / "dir" / "link")
    os.link(mount / "dir" / "sub" / "file", mount / "hard")
    os.mkfifo(mount / "fifo", 0o600)
    os.chmod(mount / "hard", 0o4711)
    os.chown(mount / "hard", 1234, 4321)
    os.utime(mount / "hard", ns=(1_000_000_001, 2_000_000_002))
    os.setxattr(mount / "hard", "user.note", b"a\0b")
    (mount / "gone").mkdir()
    (mount / "gone").rmdir()

    after = remounted(live, mount)
    assert sorted(os.listdir(after.directory)) == ["dir", "fifo", "hard"]
    assert sorted(os.listdir(after / "dir")) == ["empty", "link", "sub"]
    assert (after / "dir" / "sub" / "file").read_bytes() == NOISE
    assert os.readlink(after / "dir" / "link") == "sub/file"
    assert (after / "dir" / "link").read_bytes() == NOISE
    status = os.stat(after / "hard")
    assert status.st_ino == os.stat(after / "dir" / "sub" / "file").st_ino
    assert (status.st_nlink, status.st_uid, status.st_gid) == (2, 1234, 4321)
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert status.st_size == 300_007
    # chown(2) takes the set-user-ID bit away.
    assert stat.S_IMODE(status.st_mode) == 0o711
    assert os.getxattr(after / "hard", "user.note") == b"a\0b"
    assert stat.S_ISFIFO(os.stat(after / "fifo").st_mode)
    assert stat.S_IMODE(os.stat(after / "dir" / "empty").st_mode) == 0o640
    assert os.stat(after.directory).st_nlink == 3
    assert os.stat(after / "dir").st_nlink == 3


def test_writes_at_every_kind_of_offset(live: Mounts) -> None:
    mount = live.mount()
    model = bytearray()
    boundaries = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 130 * PAGE - 7]
    with open(mount / "file", "wb", buffering=0) as file:
        for offset in boundaries:
            for size in (1, PAGE, 2 * PAGE + 3):
                data = NOISE[offset % 1000 : offset % 1000 + size]
                assert os.pwrite(file.fileno(), data, offset) == size
                if len(model) < offset + size:
                    model.extend(bytes(offset + size - len(model)))
                model[offset : offset + size] = data
    assert (mount / "file").read_bytes() == model
    assert remounted(live, mount).directory.joinpath("file").read_bytes() == model


def test_truncate_cuts_and_extends_with_zeros(live: Mounts) -> None:
    mount = live.mount()
    file = mount / "file"
    file.write_bytes(NOISE)
    os.truncate(file, PAGE + 100)
    assert file.read_bytes() == NOISE[: PAGE + 100]
    os.truncate(file, 3 * PAGE)
    expected = NOISE[: PAGE + 100] + bytes(2 * PAGE - 100)
    assert file.read_bytes() == expected
    with open(file, "r+b") as opened:
        opened.truncate(5)
    assert file.read_bytes() == NOISE[:5]
    os.truncate(file, 3 * PAGE)
    after = remounted(live, mount)
    assert (after / "file").read_bytes() == NOISE[:5] + bytes(3 * PAGE - 5)


def test_open_with_o_trunc_empties_the_file(mnt: LiveMount) -> None:
    (mnt / "trunc").write_bytes(NOISE)
    with open(mnt / "trunc", "wb"):
        assert os.stat(mnt / "trunc").st_size == 0
    assert (mnt / "trunc").read_bytes() == b""


def test_an_append_goes_to_the_end(mnt: LiveMount) -> None:
    for word in (b"one ", b"two ", b"three"):
        with open(mnt / "append", "ab") as file:
            file.write(word)
    assert (mnt / "append").read_bytes() == b"one two three"


def test_a_sparse_file_of_16_tib(live: Mounts) -> None:
    mount = live.mount()
    size = 1 << 44
    with open(mnt_file := mount / "sparse", "wb") as file:
        file.truncate(size)
        file.seek(size - 5)
        file.write(b"last\n")
    status = os.stat(mnt_file)
    assert status.st_size == size
    assert status.st_blocks * 512 < 1 << 20
    after = remounted(live, mount)
    with open(after / "sparse", "rb") as file:
        assert file.read(10) == bytes(10)
        file.seek(size - 10)
        assert file.read() == bytes(5) + b"last\n"
    with pytest.raises(OSError, match="Read-only") as refused, open(after / "sparse", "r+b"):
        pass
    assert refused.value.errno == errno.EROFS


def test_rename_replaces_and_keeps_the_open_file(mnt: LiveMount) -> None:
    (mnt / "r-old").write_bytes(b"old")
    (mnt / "r-new").write_bytes(NOISE)
    with open(mnt / "r-old", "rb") as replaced:
        os.rename(mnt / "r-new", mnt / "r-old")
        assert replaced.read() == b"old"
        assert os.fstat(replaced.fileno()).st_nlink == 0
    assert (mnt / "r-old").read_bytes() == NOISE
    assert not (mnt / "r-new").exists()


def test_an_open_file_is_renamed_under_its_user(mnt: LiveMount) -> None:
    (mnt / "moved-dir").mkdir()
    with open(mnt / "moving", "w+b", buffering=0) as file:
        file.write(b"before ")
        os.rename(mnt / "moving", mnt / "moved-dir" / "moved")
        file.write(b"after")
    assert (mnt / "moved-dir" / "moved").read_bytes() == b"before after"


def test_an_unlinked_open_file_lives_until_its_last_close(live: Mounts) -> None:
    mount = live.mount()
    free = os.statvfs(mount.directory).f_bfree
    with open(mount / "unlinked", "w+b", buffering=0) as file:
        file.write(NOISE)
        os.unlink(mount / "unlinked")
        assert os.listdir(mount.directory) == []
        file.write(NOISE)
        file.seek(0)
        assert file.read() == NOISE + NOISE
        with mmap.mmap(file.fileno(), 0) as mapped:
            assert mapped[:] == NOISE + NOISE
    after = live.remount(mount)
    assert os.statvfs(after.directory).f_bfree == free


def test_errors_are_those_of_the_manual_pages(mnt: LiveMount) -> None:
    (mnt / "e-dir").mkdir()
    (mnt / "e-dir" / "child").touch()

    def error_of(call: object, *arguments: object) -> int:
        with pytest.raises(OSError) as raised:  # noqa: PT011  # which one is what is asked
            call(*arguments)  # type: ignore[operator]
        assert raised.value.errno is not None
        return raised.value.errno

    assert error_of(os.stat, mnt / "absent") == errno.ENOENT
    assert error_of(os.rmdir, mnt / "e-dir") == errno.ENOTEMPTY
    assert error_of(os.unlink, mnt / "e-dir") == errno.EISDIR
    assert error_of(os.rmdir, mnt / "e-dir" / "child") == errno.ENOTDIR
    assert error_of(os.mkdir, mnt / "e-dir") == errno.EEXIST
    assert error_of(os.readlink, mnt / "e-dir" / "child") == errno.EINVAL
    assert error_of(os.mkdir, mnt / ("n" * 256)) == errno.ENAMETOOLONG
    assert error_of(os.truncate, mnt / "e-dir" / "child", (1 << 63) - 1) == errno.EFBIG
    assert error_of(os.rename, mnt / "e-dir", mnt / "e-dir" / "x") == errno.EINVAL
    assert error_of(os.getxattr, mnt / "e-dir", "user.none") == errno.ENODATA


def test_a_full_image_refuses_the_write_and_goes_on(live: Mounts) -> None:
    mount = live.mount(live.image(size_bytes=8 << 20))
    with pytest.raises(OSError, match="No space") as full:
        (mount / "big").write_bytes(bytes(20 << 20))
    assert full.value.errno == errno.ENOSPC
    assert os.stat(mount / "big").st_size > 4 << 20
    os.unlink(mount / "big")
    (mount / "small").write_bytes(NOISE)
    assert (mount / "small").read_bytes() == NOISE


def fill_up(path: Path) -> None:
    """Append to the file until not one more page has room."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))


def test_the_room_of_what_was_just_removed_is_there(live: Mounts) -> None:
    """FUSE sends FORGET, which gives the blocks back, after unlink(2) has returned."""
    mount = live.mount(live.image(size_bytes=8 << 20))
    less = NOISE[: 60 * PAGE]
    old, rest = mount / "old", mount / "rest"
    os.mkdir(mount / "dir")
    old.write_bytes(NOISE)
    for turn in range(20):
        fill_up(rest)
        os.unlink(old)
        old.write_bytes(less)
        fill_up(rest)
        os.unlink(old)
        with open(old, "w+b") as file:
            file.truncate(len(less))
            with mmap.mmap(file.fileno(), 0) as mapped:
                mapped[:] = less
                mapped.flush()
        assert old.read_bytes() == less
        fill_up(rest)
        os.unlink(old)
        os.mkdir(mount / "dir" / f"{turn}")
        os.symlink("x" * 1000, old)
        fill_up(rest)
        os.unlink(old)
        os.mkdir(old)
        os.rmdir(old)
        os.truncate(rest, os.stat(rest).st_size - 80 * PAGE)
        old.write_bytes(NOISE)


def test_a_removed_file_that_is_open_gives_no_room(live: Mounts) -> None:
    mount = live.mount(live.image(size_bytes=8 << 20))
    (mount / "held").write_bytes(NOISE)
    fill_up(mount / "rest")
    with open(mount / "held", "rb") as held:
        os.unlink(mount / "held")
        with pytest.raises(OSError, match="No space"):
            (mount / "new").write_bytes(NOISE)
        assert held.read() == NOISE
    (mount / "new").write_bytes(NOISE)
    assert (mount / "new").read_bytes() == NOISE


@pytest.mark.parametrize("pagecache", [False, True], ids=["xip", "pagecache"])
def test_a_file_larger_than_ram(live: Mounts, pagecache: bool) -> None:
    image = live.image(pagecache=pagecache)
    mount = live.mount(image, "ram=64K")
    data = NOISE * 7
    assert len(data) > 2 << 20
    (mount / "big").write_bytes(data)
    assert (mount / "big").read_bytes() == data
    with open(mount / "big", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[:] == data
        for offset in range(0, len(data), 3 * PAGE):
            mapped[offset] = 0xA5
        mapped.flush()
    model = bytearray(data)
    model[:: 3 * PAGE] = b"\xa5" * len(model[:: 3 * PAGE])
    assert (mount / "big").read_bytes() == model
    vmstat = mount.vmstat()
    assert vmstat["nr_resident_pages"] == (16 if pagecache else 0)
    assert (vmstat["pgevict"] > 0) == pagecache
    after = live.remount(mount, "ram=64K")
    assert (after / "big").read_bytes() == model
    expected = {"xip": 0, "pagecache": 0} | {"pagecache" if pagecache else "xip": 513}
    vmstat = after.vmstat()
    assert vmstat["nr_xip_pages"] == expected["xip"]
    assert vmstat["nr_pagecache_pages"] == expected["pagecache"]


def test_two_mappings_and_read_see_one_file(mnt: LiveMount) -> None:
    (mnt / "coherent").write_bytes(bytes(4 * PAGE))
    with (
        open(mnt / "coherent", "r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), 0) as one,
        mmap.mmap(file.fileno(), 0) as two,
    ):
        one[PAGE] = 1
        assert two[PAGE] == 1
        assert os.pread(file.fileno(), 1, PAGE) == b"\1"
        os.pwrite(file.fileno(), b"\2", 2 * PAGE)
        assert (one[2 * PAGE], two[2 * PAGE]) == (2, 2)
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        private[PAGE] = 9
        assert (private[PAGE], one[PAGE]) == (9, 1)
        private.close()


def test_kinds_survive_the_remount_and_writes_never_change_them(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(NOISE[: 10 * PAGE])
    assert mount.letters("file") == "XXXXXXXXXX"
    outcome = mount.migrate("file", "pagecache", "2-4")
    assert (outcome["moved"], outcome["already"], outcome["failed"]) == (3, 0, {})
    assert mount.letters("file") == "XXPPPXXXXX"
    with open(mount / "file", "r+b") as file:
        file.write(NOISE[: 10 * PAGE])
    assert mount.letters("file") == "XXPPPXXXXX"

    after = live.remount(mount)
    assert after.letters("file") == "XXpppXXXXX"
    with open(after / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for page in range(10):
            mapped[page * PAGE] = page
        mapped.flush()
        # The kernel's write-back fills no frames, but a program's write does.
        file.seek(3 * PAGE)
        file.write(b"x")
    assert after.letters("file").replace("p", "P") == "XXPPPXXXXX"
    vmstat = after.vmstat()
    assert (vmstat["nr_xip_pages"], vmstat["nr_pagecache_pages"]) == (7, 3)
    (after / "file").write_bytes(b"")
    vmstat = after.vmstat()
    assert (vmstat["nr_xip_pages"], vmstat["nr_pagecache_pages"]) == (0, 0)


@pytest.mark.parametrize("way", ["fsync", "evict", "demote", "umount"])
def test_bytes_of_pagecache_pages_reach_home(live: Mounts, way: str) -> None:
    """``home``: the image file itself, looked at beside the mount."""
    image = live.image(pagecache=True)
    mount = live.mount(image, "ram=64K")
    needle = b"NEEDLE-in-a-pagecache-page" + bytes(6)
    data = needle * (PAGE // len(needle))
    assert len(data) == PAGE
    with open(mount / "file", "wb", buffering=0) as file:
        file.write(data)
        assert mount.letters("file") == "P"
        assert needle not in image.read_bytes(), "the page is home before anything asked for it"
        if way == "fsync":
            os.fsync(file.fileno())
        elif way == "evict":
            (mount / "other").write_bytes(bytes(64 * PAGE))
        elif way == "demote":
            assert mount.migrate("file", "xip")["moved"] == 1
    if way == "umount":
        mount.umount()
    assert data in image.read_bytes()


def test_a_name_of_every_byte(mnt: LiveMount) -> None:
    name = bytes(byte for byte in range(1, 256) if byte != ord("/"))
    directory = os.fsencode(mnt.directory) + b"/names"
    os.mkdir(directory)
    for part in (name[:127], name[127:]):
        with open(directory + b"/" + part, "wb") as file:
            file.write(part)
    assert sorted(os.listdir(directory)) == sorted([name[:127], name[127:]])
    with open(directory + b"/" + name[127:], "rb") as file:
        assert file.read() == name[127:]


def test_a_large_directory_is_listed_whole(live: Mounts) -> None:
    mount = live.mount()
    names = [f"file-{number:04}" for number in range(1013)]
    for name in names:
        (mount / name).touch()
    assert sorted(os.listdir(mount.directory)) == names
    for name in names[::2]:
        (mount / name).unlink()
    after = live.remount(mount)
    assert sorted(os.listdir(after.directory)) == names[1::2]
    entries = {entry.name: entry.inode() for entry in os.scandir(after.directory)}
    assert entries["file-0001"] == os.stat(after / "file-0001").st_ino


def test_permissions_are_checked_for_other_users(live: Mounts) -> None:
    mount = live.mount(None, "allow_other")
    for path in (mount.directory, *mount.directory.parents[:3]):
        os.chmod(path, os.stat(path).st_mode | 0o055)
    (mount / "secret").write_bytes(b"secret")
    (mount / "public").write_bytes(b"public")
    os.chmod(mount / "secret", 0o600)
    child = os.fork()
    if child == 0:
        code = _look_as_nobody(mount.directory)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _look_as_nobody(directory: Path) -> int:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        if (directory / "public").read_bytes() != b"public":
            return 1
        (directory / "secret").read_bytes()
    except PermissionError as error:
        if error.filename != str(directory / "secret"):
            return 2
        try:
            (directory / ".xipfs" / "stats.json").read_bytes()
        except PermissionError:
            return 0
        return 3
    return 4
