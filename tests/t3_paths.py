"""What a file is called: by the name it was reached by last, whatever happens to its names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import new_image

from xipfs.clock import SystemClock
from xipfs.errors import FsError
from xipfs.fuse.recording import RecordedFilesystem

ROOT = 1
EXCHANGE = 2


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[RecordedFilesystem]:
    image = new_image(tmp_path / "image")
    fs = RecordedFilesystem.open(image, ram_bytes=1 << 20, clock=SystemClock())
    yield fs
    fs.close()


def directory(fs: RecordedFilesystem, parent: int, name: bytes) -> int:
    ino = int(fs.mkdir(parent, name, 0o755, 0, 0).ino)
    fs.hold(ino)
    return ino


def file(fs: RecordedFilesystem, parent: int, name: bytes) -> int:
    ino = int(fs.mknod(parent, name, 0o100644, 0, 0, 0).ino)
    fs.hold(ino)
    return ino


def test_renames_of_files_and_of_what_is_above_them(fs: RecordedFilesystem) -> None:
    a = directory(fs, ROOT, b"a")
    b = directory(fs, a, b"b")
    one, two = file(fs, b, b"one"), file(fs, ROOT, b"two")
    assert (fs.paths.of(one), fs.paths.of(two), fs.paths.of(b)) == ("a/b/one", "two", "a/b")
    fs.rename(ROOT, b"two", a, b"three")
    assert fs.paths.of(two) == "a/three"
    fs.rename(ROOT, b"a", ROOT, b"c")
    assert (fs.paths.of(one), fs.paths.of(two)) == ("c/b/one", "c/three")
    fs.rename(b, b"one", a, b"three", EXCHANGE)
    assert (fs.paths.of(one), fs.paths.of(two)) == ("c/three", "c/b/one")
    # One that takes another's name: the other is reached by none.
    fs.rename(a, b"three", b, b"one")
    assert (fs.paths.of(one), fs.paths.of(two)) == ("c/b/one", "c/b/one (deleted)")


def test_removed_files_keep_their_last_name(fs: RecordedFilesystem) -> None:
    a = directory(fs, ROOT, b"a")
    one = file(fs, a, b"one")
    fs.unlink(a, b"one")
    assert fs.paths.of(one) == "a/one (deleted)"
    again = file(fs, a, b"one")
    assert (fs.paths.of(again), fs.paths.of(one)) == ("a/one", "a/one (deleted)")
    fs.unlink(a, b"one")
    fs.rmdir(ROOT, b"a")
    fs.drop(a)
    assert fs.paths.of(one) in ("a/one (deleted)", "?/one (deleted)")
    fs.drop(one)
    assert fs.paths.of(one) == ""


def test_a_failed_change_changes_no_name(fs: RecordedFilesystem) -> None:
    a = directory(fs, ROOT, b"a")
    one, two = file(fs, ROOT, b"one"), file(fs, a, b"two")
    with pytest.raises(FsError):
        fs.rename(ROOT, b"one", ROOT, b"a")
    with pytest.raises(FsError):
        fs.rename(ROOT, b"none", ROOT, b"one")
    with pytest.raises(FsError):
        fs.rmdir(ROOT, b"a")
    with pytest.raises(FsError):
        fs.unlink(ROOT, b"none")
    assert [fs.paths.of(ino) for ino in (a, one, two)] == ["a", "one", "a/two"]


def test_of_several_names_the_latest_counts(fs: RecordedFilesystem) -> None:
    one = file(fs, ROOT, b"one")
    fs.link(one, ROOT, b"two")
    assert fs.paths.of(one) == "two"
    fs.unlink(ROOT, b"one")
    assert fs.paths.of(one) == "two"
    fs.link(one, ROOT, b"three")
    fs.lookup(ROOT, b"two")
    assert fs.paths.of(one) == "two"
    fs.unlink(ROOT, b"two")
    assert fs.paths.of(one) == "two (deleted)"
    fs.lookup(ROOT, b"three")
    assert fs.paths.of(one) == "three"
    # A rename of a link to another of the same file does nothing, as rename(2) says.
    fs.link(one, ROOT, b"four")
    fs.rename(ROOT, b"three", ROOT, b"four")
    assert {name for name, _, _ in fs.readdir(ROOT, 0)} == {b"three", b"four"}


def test_listing_a_directory_tells_names_too(tmp_path: Path) -> None:
    image = new_image(tmp_path / "image")
    with_names = RecordedFilesystem.open(image, ram_bytes=1 << 20, clock=SystemClock())
    inos = [file(with_names, ROOT, name) for name in (b"x", b"y")]
    with_names.close()
    fs = RecordedFilesystem.open(image, ram_bytes=1 << 20, clock=SystemClock())
    assert [fs.paths.of(ino) for ino in inos] == ["", ""]
    listed = fs.readdir(ROOT, 0)
    first = next(listed)[1].ino
    # The kernel has taken an entry when the next one is asked for.
    assert fs.paths.of(first) == ""
    rest = [attr.ino for _, attr, _ in listed]
    assert sorted(fs.paths.of(ino) for ino in (first, *rest)) == ["x", "y"]
    fs.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (b"with space", "with space"),
        ("\u00fcml\u00e4ut".encode(), "\u00fcml\u00e4ut"),
        (b"tab\tline\nend", r"tab\tline\nend"),
        (b"\xff\xfe", r"\xff\xfe"),
        (rb"\xff", r"\\xff"),
        (b"\x1b[31m", r"\x1b[31m"),
        ("\u2028".encode(), r"\u2028"),
    ],
)
def test_any_name_is_told_in_one_line(fs: RecordedFilesystem, name: bytes, told: str) -> None:
    assert fs.paths.of(file(fs, ROOT, name)) == told
