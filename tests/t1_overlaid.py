"""A pending transaction shown over a medium that may not be written."""

from __future__ import annotations

import pytest
from fuzzing import Memory
from media import new_medium, open_medium

from xipfs.image.journal import Journal
from xipfs.memory.overlaid import Overlaid

PAGE = 4096


def test_what_records_meet_is_shown_with_them_and_nothing_is_written() -> None:
    under = Memory(b"a" * PAGE + b"b" * PAGE + b"c" * PAGE + b"d" * PAGE, writable=True)
    records = [(PAGE + 64, b"X" * 64), (PAGE + 128, b"Y" * 64), (2 * PAGE, b"Z" * 64)]
    shown = Overlaid(under, records)
    assert (shown.size_bytes, shown.writable) == (4 * PAGE, False)
    assert bytes(shown.load(0, PAGE)) == b"a" * PAGE
    assert bytes(shown.load(3 * PAGE, 7)) == b"d" * 7
    assert bytes(shown.load(PAGE + 60, 10)) == b"bbbbXXXXXX"
    assert bytes(shown.load(PAGE + 190, 4)) == b"YYbb"
    assert bytes(shown.load(PAGE - 2, 4)) == b"aabb"
    whole = b"a" * PAGE + b"b" * 64 + b"X" * 64 + b"Y" * 64 + b"b" * (PAGE - 192)
    whole += b"Z" * 64 + b"c" * (PAGE - 64) + b"d" * PAGE
    assert bytes(shown.load(0, 4 * PAGE)) == whole
    assert bytes(shown.load(2 * PAGE - 1, PAGE + 2)) == whole[2 * PAGE - 1 : 3 * PAGE + 1]
    assert under.content == b"a" * PAGE + b"b" * PAGE + b"c" * PAGE + b"d" * PAGE
    with pytest.raises(AssertionError, match="read-only medium"):
        shown.store(0, b"x")
    with pytest.raises(AssertionError, match="read-only medium"):
        shown.store_word(0, 1)
    with pytest.raises(TypeError):
        shown.load(PAGE + 64, 1)[0] = 1


def test_a_reader_sees_what_a_mount_makes_of_a_pending_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of one that lays a structure over a file's page, as only a forged one does."""
    medium = new_medium(64)
    fs = open_medium(medium)
    ino = fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino
    fs.write(ino, 0, b"a" * PAGE + b"b" * PAGE)
    volume = fs._core.volume
    block = bytes(medium.now).index(b"a" * PAGE) // PAGE
    fs.close()

    def cut(*_args: object) -> None:
        raise RuntimeError("power")

    monkeypatch.setattr(Journal, "_apply", cut)
    with pytest.raises(RuntimeError):
        Journal(medium, volume.superblock).commit([(block * PAGE + 4032, b"F" * 64)])
    monkeypatch.undo()
    forged = bytes(medium.now)
    seen = b"a" * 4032 + b"F" * 64 + b"b" * PAGE
    reader = open_medium(Memory(forged, writable=False))
    assert bytes(reader.read(ino, 0, 2 * PAGE)) == seen
    assert bytes(open_medium(Memory(forged, writable=True)).read(ino, 0, 2 * PAGE)) == seen
