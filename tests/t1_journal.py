"""The journal: a transaction cut at each of its fences is there wholly or not at all."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from media import PowerCut, RecordingMedium, new_medium

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.journal import Journal, Record
from xipfs.image.superblock import load
from xipfs.units import PAGE_SIZE

#: Two lines of the state block, the last line of a data block, a whole data block.
RECORDS: list[Record] = [
    (PAGE_SIZE + 64, b"\x11" * 128),
    (20 * PAGE_SIZE - 64, b"\x22" * 64),
    (30 * PAGE_SIZE, b"\x33" * PAGE_SIZE),
]
BASE = bytes(new_medium(64).durable)
JOURNAL = 2 * PAGE_SIZE


def journal_of(medium: RecordingMedium) -> Journal:
    return Journal(medium, load(medium, "image"))


def places(image: bytes) -> list[bytes]:
    return [image[offset : offset + len(data)] for offset, data in RECORDS]


OLD = places(BASE)
NEW = [data for _, data in RECORDS]


def test_a_commit_takes_four_fences_and_leaves_an_empty_slot() -> None:
    medium = RecordingMedium(BASE)
    journal_of(medium).commit(RECORDS)
    assert medium.fences == 4
    assert medium.volatile_lines() == set()
    assert places(bytes(medium.durable)) == NEW
    assert medium.durable[JOURNAL : JOURNAL + 8] == bytes(8)
    assert journal_of(RecordingMedium(medium.durable)).pending() == []


@pytest.mark.parametrize("reached", ["nothing", "everything", *range(20)])
@pytest.mark.parametrize("fence", [1, 2, 3, 4])
def test_a_cut_at_any_fence(fence: int, reached: str | int) -> None:
    medium = RecordingMedium(BASE, cut_at=fence)
    with pytest.raises(PowerCut):
        journal_of(medium).commit(RECORDS)
    chance = random.Random(reached) if isinstance(reached, int) else None
    image = medium.after_cut(chance, share=1 if reached == "everything" else 0.5)
    after = RecordingMedium(image)
    recovered = journal_of(after).recover()
    # Only at fence 2 it is open whether the mark, one word, has reached the medium.
    if fence == 1 or (fence == 2 and recovered == 0):
        assert recovered == 0
        assert places(bytes(after.durable)) == OLD
    else:
        # At fence 4 the slot may be cleared already; then everything is in its place.
        assert recovered == 3 or fence == 4
        assert places(bytes(after.durable)) == NEW
    assert journal_of(RecordingMedium(after.durable)).pending() == []


@pytest.mark.parametrize("fence", [1, 2])
def test_a_cut_within_the_recovery_is_recovered(fence: int) -> None:
    medium = RecordingMedium(BASE, cut_at=3)
    with pytest.raises(PowerCut):
        journal_of(medium).commit(RECORDS)
    image = medium.after_cut(None)
    again = RecordingMedium(image, cut_at=fence)
    with pytest.raises(PowerCut):
        journal_of(again).recover()
    for seed in range(10):
        last = RecordingMedium(again.after_cut(random.Random(seed)))
        journal_of(last).recover()
        assert places(bytes(last.durable)) == NEW, f"random.Random({seed})"


def test_what_the_mark_stands_for_is_durable_before_it() -> None:
    medium = RecordingMedium(BASE, cut_at=2)
    with pytest.raises(PowerCut):
        journal_of(medium).commit(RECORDS)
    # All that is not durable now is the mark's own line.
    assert medium.volatile_lines() == {JOURNAL // 64}
    assert bytes(medium.durable[:PAGE_SIZE]) == BASE[:PAGE_SIZE]
    assert places(bytes(medium.now)) == OLD


def test_a_transaction_that_does_not_fit_is_refused_and_nothing_is_stored() -> None:
    medium = RecordingMedium(BASE)
    journal = journal_of(medium)
    assert journal.capacity_bytes == 8 * PAGE_SIZE - 64
    blocks = [((20 + i) * PAGE_SIZE, bytes(PAGE_SIZE)) for i in range(8)]
    with pytest.raises(FsError) as caught:
        journal.commit(blocks)
    assert caught.value.errno == 28
    assert medium.stores == 0
    journal.commit(blocks[:7])


def pending_image() -> bytearray:
    medium = RecordingMedium(BASE, cut_at=3)
    with pytest.raises(PowerCut):
        journal_of(medium).commit(RECORDS)
    return bytearray(medium.durable)


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (0, "damaged header"),  # the mark
        (8, "fails its checksum"),  # the sequence number
        (19, "damaged header"),  # the length, now beyond the journal
        (24, "fails its checksum"),  # the checksum
        (64, "fails its checksum"),  # an offset
        (64 + 16, "fails its checksum"),  # bytes
    ],
)
def test_damage_is_not_replayed(at: int, says: str) -> None:
    image = pending_image()
    image[JOURNAL + at] ^= 0x40
    medium = RecordingMedium(image)
    with pytest.raises(ImageError, match=says):
        journal_of(medium).recover()
    assert medium.stores == 0


@pytest.mark.parametrize(
    "record",
    [
        (0, bytes(64)),  # the superblock
        (63 * PAGE_SIZE, bytes(64)),  # its second copy
        (2 * PAGE_SIZE, bytes(64)),  # the journal
        (20 * PAGE_SIZE + 32, bytes(64)),  # not a whole line
        (20 * PAGE_SIZE, bytes(32)),
        (21 * PAGE_SIZE - 64, bytes(128)),  # beyond its block
        (64 * PAGE_SIZE, bytes(64)),  # beyond the image
    ],
    ids=["superblock", "copy", "journal", "unaligned", "short", "crossing", "outside"],
)
def test_a_record_for_a_place_that_no_transaction_changes_is_refused(record: Record) -> None:
    # A page more than the image has: room for the store that the test itself provokes.
    medium = RecordingMedium(bytes(BASE) + bytes(PAGE_SIZE), cut_at=3)
    journal = journal_of(medium)
    with pytest.raises(PowerCut):
        journal.commit([record])
    image = bytes(medium.durable[: 64 * PAGE_SIZE])
    with pytest.raises(ImageError, match=f"has a record for offset {record[0]}"):
        journal_of(RecordingMedium(image)).recover()


def test_the_header_is_where_the_specification_says() -> None:
    image = pending_image()
    mark, sequence, length = (
        int.from_bytes(image[JOURNAL + at : JOURNAL + at + 8], "little") for at in (0, 8, 16)
    )
    assert image[JOURNAL : JOURNAL + 8] == b"XPCommit"
    assert (mark, sequence) == (layout.JOURNAL_MARK, 1)
    assert length == 3 * 16 + 128 + 64 + 4096
    first = int.from_bytes(image[JOURNAL + 64 : JOURNAL + 72], "little")
    assert first == PAGE_SIZE + 64
    assert image[JOURNAL + 80 : JOURNAL + 208] == b"\x11" * 128


def test_a_marked_slot_with_nothing_in_it_is_emptied() -> None:
    """Else the next commit would overwrite a slot whose mark holds, and a cut would tear it."""
    image = bytearray(BASE)
    header = struct.pack("<QQII", 7, 0, zlib.crc32(b"7 0"), 0)
    image[JOURNAL : JOURNAL + 32] = b"XPCommit" + header
    medium = RecordingMedium(image)
    assert journal_of(medium).pending() == []
    assert journal_of(medium).recover() == 0
    assert medium.durable[JOURNAL : JOURNAL + 8] == bytes(8)


def test_an_unfinished_transaction_is_never_overwritten() -> None:
    """An exception within step 3 leaves the mark: only a recovery may take it away."""
    medium = RecordingMedium(BASE)
    journal = journal_of(medium)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_apply", lambda _records: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            journal.commit(RECORDS)
    before = bytes(medium.now)
    with pytest.raises(ImageError, match="holds an unfinished transaction"):
        journal.commit([(40 * PAGE_SIZE, bytes(64))])
    assert bytes(medium.now) == before
    assert journal.recover() == 3
    assert places(bytes(medium.durable)) == NEW
    journal.commit([(40 * PAGE_SIZE, b"\x44" * 64)])
    assert medium.durable[40 * PAGE_SIZE : 40 * PAGE_SIZE + 64] == b"\x44" * 64
