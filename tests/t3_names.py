"""Names: making, linking, renaming, removing; types, counts, times; what the errors are."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

import pytest
from imagecheck import check
from media import PowerCut, RecordingMedium, new_medium, open_medium

from xipfs.clock import ManualClock
from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem

ROOT = 1
REG = stat.S_IFREG | 0o644


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def medium() -> RecordingMedium:
    return new_medium(400)


@pytest.fixture
def fs(medium: RecordingMedium, clock: ManualClock) -> Filesystem:
    return open_medium(medium, clock=clock)


def fails(code: int) -> pytest.RaisesExc[FsError]:
    return pytest.raises(FsError, check=lambda error: error.errno == code)


def file(fs: Filesystem, name: bytes, parent: int = ROOT) -> int:
    return fs.mknod(parent, name, REG, 0, 0, 0).ino


def directory(fs: Filesystem, name: bytes, parent: int = ROOT) -> int:
    return fs.mkdir(parent, name, 0o755, 0, 0).ino


@pytest.mark.parametrize(
    ("mode", "rdev", "kept"),
    [
        (stat.S_IFREG | 0o4755, 7, 0),
        (0o644, 0, 0),  # no type means a regular file
        (stat.S_IFCHR | 0o600, os.makedev(5, 1), os.makedev(5, 1)),
        (stat.S_IFBLK | 0o600, os.makedev(259, 77), os.makedev(259, 77)),
        (stat.S_IFIFO | 0o644, 9, 0),
        (stat.S_IFSOCK | 0o777, 9, 0),
    ],
)
def test_every_type_of_file_survives(
    medium: RecordingMedium, mode: int, rdev: int, kept: int
) -> None:
    fs = open_medium(medium)
    attr = fs.mknod(ROOT, b"x", mode, rdev, 12, 34)
    fs.close()
    again = open_medium(RecordingMedium(medium.durable)).lookup(ROOT, b"x")
    assert again == attr
    want = mode if stat.S_IFMT(mode) else mode | stat.S_IFREG
    assert (again.mode, again.rdev, again.uid, again.gid, again.nlink) == (want, kept, 12, 34, 1)


def test_mknod_makes_neither_directories_nor_links(fs: Filesystem) -> None:
    for mode in (stat.S_IFDIR, stat.S_IFLNK):
        with fails(errno.EINVAL):
            fs.mknod(ROOT, b"x", mode | 0o755, 0, 0, 0)


@pytest.mark.parametrize("size", [1, 59, 60, 4095])
def test_a_symbolic_link_holds_its_target(fs: Filesystem, size: int) -> None:
    target = bytes(1 + i % 255 for i in range(size))
    attr = fs.symlink(ROOT, b"link", target, 5, 6)
    assert (attr.mode, attr.size_bytes, attr.uid) == (stat.S_IFLNK | 0o777, size, 5)
    assert fs.readlink(attr.ino) == target
    with fails(errno.EINVAL):
        fs.readlink(ROOT)


def test_targets_that_cannot_be(fs: Filesystem) -> None:
    with fails(errno.ENOENT):
        fs.symlink(ROOT, b"link", b"", 0, 0)
    with fails(errno.ENAMETOOLONG):
        fs.symlink(ROOT, b"link", b"x" * 4096, 0, 0)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"", errno.EINVAL),
        (b".", errno.EINVAL),
        (b"..", errno.EINVAL),
        (b"a/b", errno.EINVAL),
        (b"a\0b", errno.EINVAL),
        (b"x" * 256, errno.ENAMETOOLONG),
    ],
)
def test_names_that_cannot_be(fs: Filesystem, name: bytes, code: int) -> None:
    ino = file(fs, b"file")
    for call in (
        lambda: fs.mknod(ROOT, name, REG, 0, 0, 0),
        lambda: fs.mkdir(ROOT, name, 0o755, 0, 0),
        lambda: fs.symlink(ROOT, name, b"t", 0, 0),
        lambda: fs.link(ino, ROOT, name),
        lambda: fs.rename(ROOT, b"file", ROOT, name),
    ):
        with fails(code):
            call()
    assert [name for name, _, _ in fs.readdir(ROOT, 0)] == [b"file"]


def test_a_name_of_255_bytes_and_one_that_is_no_utf8(fs: Filesystem) -> None:
    for name in (b"x" * 255, b"\xff\xfe\x01\n"):
        ino = file(fs, name)
        assert fs.lookup(ROOT, name).ino == ino
    with fails(errno.ENAMETOOLONG):
        fs.lookup(ROOT, b"x" * 256)


def test_what_is_not_a_directory_holds_no_names(fs: Filesystem) -> None:
    ino = file(fs, b"file")
    with fails(errno.ENOTDIR):
        fs.lookup(ino, b"x")
    with fails(errno.ENOTDIR):
        file(fs, b"x", ino)
    with fails(errno.ENOTDIR):
        next(fs.readdir(ino, 0))
    with fails(errno.ENOTDIR):
        fs.rename(ROOT, b"file", ino, b"x")
    with fails(errno.ENOENT):
        fs.getattr(99)


def test_dot_and_dotdot(fs: Filesystem) -> None:
    sub = directory(fs, b"sub")
    deep = directory(fs, b"deep", sub)
    assert fs.lookup(deep, b".").ino == deep
    assert fs.lookup(deep, b"..").ino == sub
    assert fs.lookup(ROOT, b"..").ino == ROOT
    assert fs.parent_of(deep) == sub
    fs.rename(sub, b"deep", ROOT, b"up")
    assert fs.lookup(deep, b"..").ino == ROOT


def test_a_directory_counts_its_subdirectories(fs: Filesystem) -> None:
    assert fs.getattr(ROOT).nlink == 2
    first, second = directory(fs, b"first"), directory(fs, b"second")
    assert [fs.getattr(ino).nlink for ino in (ROOT, first)] == [4, 2]
    fs.rename(ROOT, b"second", first, b"inside")
    assert [fs.getattr(ino).nlink for ino in (ROOT, first, second)] == [3, 3, 2]
    fs.rmdir(first, b"inside")
    assert fs.getattr(first).nlink == 2
    file(fs, b"file", first)
    assert fs.getattr(first).nlink == 2
    with fails(errno.ENOTEMPTY):
        fs.rmdir(ROOT, b"first")


def test_hard_links_are_one_file(fs: Filesystem, medium: RecordingMedium) -> None:
    ino = file(fs, b"a")
    sub = directory(fs, b"sub")
    assert fs.link(ino, sub, b"b").nlink == 2
    fs.write(ino, 0, b"shared")
    assert bytes(fs.read(fs.lookup(sub, b"b").ino, 0, 10)) == b"shared"
    fs.unlink(ROOT, b"a")
    assert fs.getattr(ino).nlink == 1
    assert bytes(fs.read(ino, 0, 10)) == b"shared"
    with fails(errno.EPERM):
        fs.link(sub, ROOT, b"c")
    with fails(errno.EEXIST):
        fs.link(ino, ROOT, b"sub")
    fs.unlink(sub, b"b")
    with fails(errno.ENOENT):
        fs.getattr(ino)
    fs.close()
    assert set(check(bytes(medium.durable))) == {ROOT, sub}


def test_an_unlinked_file_lives_while_it_is_held(fs: Filesystem) -> None:
    free = fs.statfs().blocks_free
    ino = file(fs, b"a")
    fs.hold(ino)
    fs.hold(ino)
    fs.write(ino, 0, b"still here" * 1000)
    fs.unlink(ROOT, b"a")
    assert fs.getattr(ino).nlink == 0
    assert bytes(fs.read(ino, 0, 10)) == b"still here"
    fs.write(ino, 50000, b"and written")
    with fails(errno.ENOENT):
        fs.link(ino, ROOT, b"back")
    fs.drop(ino)
    assert bytes(fs.read(ino, 50000, 11)) == b"and written"
    fs.drop(ino)
    with fails(errno.ENOENT):
        fs.getattr(ino)
    assert fs.statfs().blocks_free == free


def test_a_number_used_again_has_another_generation(fs: Filesystem) -> None:
    first = fs.mknod(ROOT, b"a", REG, 0, 0, 0)
    fs.unlink(ROOT, b"a")
    second = fs.mknod(ROOT, b"a", REG, 0, 0, 0)
    assert first.ino == second.ino
    assert first.generation != second.generation


def test_nothing_is_made_in_a_removed_directory(fs: Filesystem) -> None:
    ino = file(fs, b"file")
    gone = directory(fs, b"gone")
    fs.hold(gone)
    fs.rmdir(ROOT, b"gone")
    with fails(errno.ENOENT):
        file(fs, b"x", gone)
    with fails(errno.ENOENT):
        fs.link(ino, gone, b"x")
    with fails(errno.ENOENT):
        fs.rename(ROOT, b"file", gone, b"x")
    assert list(fs.readdir(gone, 0)) == []
    fs.drop(gone)


def test_a_directory_cannot_go_into_itself(fs: Filesystem) -> None:
    top = directory(fs, b"top")
    low = directory(fs, b"low", top)
    bottom = directory(fs, b"bottom", low)
    for target in (top, low, bottom):
        with fails(errno.EINVAL):
            fs.rename(ROOT, b"top", target, b"x")
    with fails(errno.EINVAL):
        fs.rename(low, b"bottom", ROOT, b"top", 2)
    with fails(errno.EINVAL):
        fs.rename(ROOT, b"top", low, b"bottom", 2)
    with fails(errno.EINVAL):
        fs.rename(ROOT, b"top", ROOT, b"y", 4)


def test_rename_replaces_what_it_may(fs: Filesystem) -> None:
    a, b = file(fs, b"a"), file(fs, b"b")
    full, empty = directory(fs, b"full"), directory(fs, b"empty")
    file(fs, b"x", full)
    with fails(errno.EISDIR):
        fs.rename(ROOT, b"a", ROOT, b"empty")
    with fails(errno.ENOTDIR):
        fs.rename(ROOT, b"empty", ROOT, b"a")
    with fails(errno.ENOTEMPTY):
        fs.rename(ROOT, b"empty", ROOT, b"full")
    with fails(errno.EEXIST):
        fs.rename(ROOT, b"a", ROOT, b"b", 1)
    fs.rename(ROOT, b"a", ROOT, b"b")
    assert fs.lookup(ROOT, b"b").ino == a
    with fails(errno.ENOENT):
        fs.getattr(b)
    fs.rename(ROOT, b"full", ROOT, b"empty")
    assert fs.lookup(ROOT, b"empty").ino == full
    with fails(errno.ENOENT):
        fs.getattr(empty)
    assert fs.getattr(ROOT).nlink == 3


def test_exchange_swaps_even_a_file_and_a_directory(
    fs: Filesystem, medium: RecordingMedium
) -> None:
    sub = directory(fs, b"sub")
    other = directory(fs, b"other", sub)
    ino = file(fs, b"file")
    fs.rename(ROOT, b"file", sub, b"other", 2)
    assert fs.lookup(ROOT, b"file").ino == other
    assert fs.lookup(sub, b"other").ino == ino
    assert [fs.getattr(i).nlink for i in (ROOT, sub, other, ino)] == [4, 2, 2, 1]
    assert fs.lookup(other, b"..").ino == ROOT
    fs.close()
    check(bytes(medium.durable))


def test_rename_to_another_name_of_the_same_file_does_nothing(fs: Filesystem) -> None:
    ino = file(fs, b"a")
    fs.link(ino, ROOT, b"b")
    fs.rename(ROOT, b"a", ROOT, b"b")
    assert sorted(name for name, _, _ in fs.readdir(ROOT, 0)) == [b"a", b"b"]
    assert fs.getattr(ino).nlink == 2


def test_changes_stamp_the_directory_and_the_inode(fs: Filesystem, clock: ManualClock) -> None:
    sub = directory(fs, b"sub")

    def moved(call: object) -> bool:
        before = fs.getattr(ROOT)
        clock.advance(10)
        assert callable(call)
        call()
        after = fs.getattr(ROOT)
        assert after.mtime_ns == after.ctime_ns
        return after.mtime_ns == clock.now_ns > before.mtime_ns

    assert moved(lambda: file(fs, b"a"))
    assert moved(lambda: fs.link(fs.lookup(ROOT, b"a").ino, ROOT, b"b"))
    assert fs.lookup(ROOT, b"a").ctime_ns == clock.now_ns
    assert moved(lambda: fs.unlink(ROOT, b"a"))
    assert fs.lookup(ROOT, b"b").ctime_ns == clock.now_ns
    assert moved(lambda: fs.rename(ROOT, b"b", sub, b"c"))
    assert fs.getattr(sub).mtime_ns == clock.now_ns
    assert moved(lambda: fs.symlink(ROOT, b"s", b"t", 0, 0))
    assert moved(lambda: directory(fs, b"d"))
    assert moved(lambda: fs.rmdir(ROOT, b"d"))
    assert not moved(lambda: file(fs, b"e", sub))
    assert not moved(lambda: fs.getattr(ROOT))


def test_setattr_changes_what_is_given(fs: Filesystem, clock: ManualClock) -> None:
    ino = file(fs, b"a")
    before = fs.getattr(ino)
    clock.advance(5)
    attr = fs.setattr(ino, mode=stat.S_IFDIR | 0o4711)  # the type is no mode to change
    assert attr.mode == stat.S_IFREG | 0o4711
    assert (attr.uid, attr.mtime_ns, attr.ctime_ns) == (0, before.mtime_ns, clock.now_ns)
    attr = fs.setattr(ino, uid=7, gid=8, atime_ns=-5, mtime_ns=1 << 62)
    assert (attr.uid, attr.gid, attr.atime_ns, attr.mtime_ns) == (7, 8, -5, 1 << 62)
    assert fs.setattr(ino, atime_ns=1 << 70).atime_ns == (1 << 63) - 1
    for wrong in (ROOT, fs.symlink(ROOT, b"s", b"t", 0, 0).ino):
        with pytest.raises(FsError):
            fs.setattr(wrong, size_bytes=0)


def test_a_setgid_directory_hands_its_group_down(fs: Filesystem) -> None:
    shared = fs.mkdir(ROOT, b"shared", 0o2775, 1, 50).ino
    assert fs.mknod(shared, b"file", REG, 0, 9, 9).gid == 50
    sub = fs.mkdir(shared, b"sub", 0o755, 9, 9)
    assert (sub.gid, sub.mode & 0o7777) == (50, 0o2755)


def test_readdir_goes_on_after_any_cookie(fs: Filesystem) -> None:
    sub = directory(fs, b"sub")
    for number in range(300):
        file(fs, b"f%03d" % number, sub)
    whole = list(fs.readdir(sub, 0))
    assert len(whole) == 300
    for cut in (0, 1, 50, 299):
        assert list(fs.readdir(sub, whole[cut][2])) == whole[cut + 1 :]
    # Removing what was listed does not move what was not, also for a reader in the middle.
    reader = fs.readdir(sub, 0)
    seen = [next(reader)[0] for _ in range(100)]
    for name in seen:
        fs.unlink(sub, name)
    rest = [name for name, _, _ in reader]
    assert sorted(seen + rest) == sorted(name for name, _, _ in whole)


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_xattr_flags(fs: Filesystem, flags: int) -> None:
    ino = file(fs, b"a")
    if flags == 2:
        with fails(errno.ENODATA):
            fs.setxattr(ino, b"user.x", b"1", flags)
        fs.setxattr(ino, b"user.x", b"0")
    fs.setxattr(ino, b"user.x", b"1", flags)
    assert fs.getxattr(ino, b"user.x") == b"1"
    if flags == 1:
        with fails(errno.EEXIST):
            fs.setxattr(ino, b"user.x", b"2", flags)
    else:
        fs.setxattr(ino, b"user.x", b"2", flags)
        assert fs.getxattr(ino, b"user.x") == b"2"
    assert fs.listxattr(ino) == [b"user.x"]
    fs.removexattr(ino, b"user.x")
    assert fs.listxattr(ino) == []
    for call in (fs.getxattr, fs.removexattr):
        with fails(errno.ENODATA):
            call(ino, b"user.x")
    with fails(errno.ERANGE):
        fs.setxattr(ino, b"x" * 256, b"")
    with fails(errno.EINVAL):
        fs.setxattr(ino, b"user.x", b"", 3)


def test_only_three_namespaces_of_attributes_are_kept(fs: Filesystem) -> None:
    ino = file(fs, b"a")
    for name in (b"system.posix_acl_access", b"system.posix_acl_default", b"os2.x", b"x"):
        for call in (
            lambda name=name: fs.setxattr(ino, name, b"1"),
            lambda name=name: fs.getxattr(ino, name),
            lambda name=name: fs.removexattr(ino, name),
        ):
            with fails(errno.EOPNOTSUPP):
                call()
    for name in (b"user.", b"trusted.", b"security."):
        with fails(errno.EINVAL):
            fs.setxattr(ino, name, b"1")
        fs.setxattr(ino, name + b"x", b"1")
    assert fs.listxattr(ino) == [b"user.x", b"trusted.x", b"security.x"]


def test_a_truncate_that_takes_a_mode_bit_is_one_change(medium: RecordingMedium) -> None:
    """At whatever fence the power goes: both have happened, or neither."""
    fs = open_medium(medium)
    ino = fs.mknod(ROOT, b"a", stat.S_IFREG | 0o4755, 0, 0, 0).ino
    fs.write(ino, 0, bytes(10_000))
    fs.close()
    seen = set()
    for size in (100, 20_000):
        for cut_at in range(1, 40):
            cut = RecordingMedium(medium.durable, cut_at=cut_at)
            with contextlib.suppress(PowerCut):
                open_medium(cut).setattr(ino, size_bytes=size, mode=0o755)
            attr = open_medium(RecordingMedium(cut.durable)).getattr(ino)
            seen.add((attr.size_bytes, stat.S_IMODE(attr.mode)))
    assert seen == {(10_000, 0o4755), (100, 0o755), (20_000, 0o755)}


def test_accesses_move_atime_as_relatime_does(fs: Filesystem, clock: ManualClock) -> None:
    day_ns = 24 * 3600 * 10**9
    clock.advance(1000)
    ino = file(fs, b"a")
    made = fs.getattr(ino)

    def accessed(after_ns: int) -> bool:
        clock.advance(after_ns)
        before = fs.getattr(ino)
        fs.accessed(ino)
        after = fs.getattr(ino)
        assert (after.mtime_ns, after.ctime_ns) == (before.mtime_ns, before.ctime_ns)
        return after.atime_ns > before.atime_ns

    assert accessed(10)
    assert fs.getattr(ino).atime_ns == made.atime_ns + 10
    assert not accessed(10)
    assert not accessed(day_ns - 11)
    assert accessed(1)
    fs.setattr(ino, mode=0o600)
    assert accessed(10)
    assert not accessed(10)


def test_statfs_counts_to_the_block(fs: Filesystem) -> None:
    facts = fs.statfs()
    assert (facts.block_size, facts.name_max) == (4096, 255)
    assert facts.blocks_total == 400 - 1 - 11
    assert facts.blocks_free == facts.blocks_total - 1
    ino = file(fs, b"a")
    assert fs.statfs().blocks_free == facts.blocks_free - 1  # the root's leaf
    fs.write(ino, 0, bytes(10 * 4096))
    assert fs.statfs().blocks_free == facts.blocks_free - 12
    assert fs.getattr(ino).blocks_512 == 88
    assert fs.statfs().inodes_total - fs.statfs().inodes_free == 2


def test_a_read_only_image_refuses_every_change(medium: RecordingMedium, fs: Filesystem) -> None:
    ino = file(fs, b"a")
    fs.write(ino, 0, b"text")
    fs.close()
    frozen = RecordingMedium(medium.durable, writable=False)
    fs = open_medium(frozen)
    for call in (
        lambda: fs.mknod(ROOT, b"x", REG, 0, 0, 0),
        lambda: fs.mkdir(ROOT, b"x", 0o755, 0, 0),
        lambda: fs.symlink(ROOT, b"x", b"t", 0, 0),
        lambda: fs.link(ino, ROOT, b"x"),
        lambda: fs.unlink(ROOT, b"a"),
        lambda: fs.rename(ROOT, b"a", ROOT, b"x"),
        lambda: fs.setattr(ino, mode=0),
        lambda: fs.setattr(ino, size_bytes=0),
        lambda: fs.write(ino, 0, b"x"),
        lambda: fs.setxattr(ino, b"user.a", b""),
        lambda: fs.removexattr(ino, b"user.a"),
        lambda: fs.promote(ino, 0),
        lambda: fs.demote(ino, 0),
    ):
        with fails(errno.EROFS):
            call()
    assert bytes(fs.read(ino, 0, 10)) == b"text"
    fs.hold(ino)
    fs.drop(ino)
    fs.fsync(ino)
    fs.sync()
    fs.close()
    assert bytes(frozen.now) == bytes(medium.durable)
