"""The allocator: no block twice, none outside the data area, none reused within a transaction."""

from __future__ import annotations

import random

import pytest
from media import RecordingMedium, new_medium

from xipfs.errors import FsError, ImageError
from xipfs.image.volume import Volume

#: A 64-block image: superblock, state, 8 of journal, 1 of bitmap; then [11, 63); one is the table.
FIRST, END = 11, 63


def volume_of(medium: RecordingMedium) -> Volume:
    return Volume(medium, "image")


def take(volume: Volume, count: int) -> list[int]:
    with volume.transaction():
        runs = volume.allocator.allocate(count)
    return [block for start, length in runs for block in range(start, start + length)]


def free(volume: Volume, blocks: list[int]) -> None:
    with volume.transaction():
        volume.allocator.free(blocks)


def test_a_fresh_image_gives_out_every_block_of_the_data_area_once() -> None:
    volume = volume_of(new_medium(64))
    assert volume.counters.free_blocks == END - FIRST - 1  # one holds the root's inode
    blocks = [take(volume, 1)[0] for _ in range(END - FIRST - 1)]
    assert blocks == list(range(FIRST + 1, END))
    assert volume.counters.free_blocks == 0
    with pytest.raises(FsError) as caught:
        take(volume, 1)
    assert caught.value.errno == 28


def test_the_search_goes_on_where_it_stopped_and_comes_round() -> None:
    volume = volume_of(new_medium(64))
    first = take(volume, 10)
    assert first == list(range(12, 22))
    free(volume, first)
    assert take(volume, 5) == list(range(22, 27))  # not the ones just freed
    assert take(volume, 40) == [*range(27, 63), *range(12, 16)]


def test_scattered_holes_come_as_runs() -> None:
    volume = volume_of(new_medium(64))
    take(volume, 51)
    free(volume, [20, 21, 22, 40, 50, 51])
    with volume.transaction():
        assert volume.allocator.allocate(6) == [(20, 3), (40, 1), (50, 2)]


def test_what_a_transaction_frees_it_does_not_give_out_again() -> None:
    volume = volume_of(new_medium(64))
    mine = take(volume, 51)

    def free_and_take() -> None:
        with volume.transaction():
            volume.allocator.free(mine[:5])
            volume.allocator.allocate(1)

    with pytest.raises(FsError):
        free_and_take()
    # The aborted transaction freed nothing.
    assert volume.counters.free_blocks == 0
    free(volume, mine[:5])
    assert take(volume, 5) == mine[:5]


def test_an_aborted_transaction_takes_nothing() -> None:
    medium = new_medium(64)
    before = bytes(medium.now)
    volume = volume_of(medium)

    def take_and_fail() -> None:
        with volume.transaction():
            volume.allocator.allocate(7)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        take_and_fail()
    assert volume.counters.free_blocks == 51
    assert bytes(medium.now) == before


@pytest.mark.parametrize("wrong", [[0], [1], [2], [9], [10], [63], [64], [1 << 39]])
def test_blocks_outside_the_data_area_cannot_be_freed(wrong: list[int]) -> None:
    volume = volume_of(new_medium(64))
    with pytest.raises(ImageError, match="is not in the data area"):
        free(volume, wrong)


def test_a_block_freed_twice_is_damage() -> None:
    volume = volume_of(new_medium(64))
    block = take(volume, 1)[0]
    with pytest.raises(ImageError, match=r"block 12 at offset 49152 is owned twice"):
        free(volume, [block, block])
    free(volume, [block])
    with pytest.raises(ImageError, match="bitmap at offset 40961 says that block 12 is free"):
        free(volume, [block])
    assert volume.counters.free_blocks == 51


def test_a_counter_that_promises_too_much_is_no_block() -> None:
    volume = volume_of(new_medium(64))
    volume.counters.free_blocks = 60
    with pytest.raises(FsError):
        take(volume, 52)


@pytest.mark.parametrize("blocks", [64, 32769, 33000])
def test_images_whose_last_bits_fall_anywhere(blocks: int) -> None:
    """The bits behind the last block are never given out; both ends of each bitmap block are."""
    volume = volume_of(new_medium(blocks))
    start = volume.superblock.data_start
    got: list[int] = []
    while volume.counters.free_blocks:
        got += take(volume, min(5000, volume.counters.free_blocks))
    assert got == list(range(start + 1, blocks - 1))


@pytest.mark.parametrize("seed", range(4))
def test_random_allocation_against_a_set(seed: int) -> None:
    """Replay: random.Random(seed)."""
    chance = random.Random(seed)
    medium = new_medium(300)
    volume = volume_of(medium)
    everything = set(range(12, 299)) - {volume.superblock.data_start}
    used: set[int] = set()
    for _ in range(200):
        if used and chance.random() < 0.5:
            back = set(chance.sample(sorted(used), chance.randint(1, len(used))))
            free(volume, sorted(back))
            used -= back
        else:
            wanted = chance.randint(1, 60)
            if wanted > len(everything - used):
                with pytest.raises(FsError):
                    take(volume, wanted)
                continue
            got = take(volume, wanted)
            assert len(set(got)) == wanted
            assert not used & set(got)
            assert set(got) <= everything
            used |= set(got)
        assert volume.counters.free_blocks == len(everything) - len(used)
        if chance.random() < 0.05:
            volume = volume_of(RecordingMedium(medium.durable))
            medium = volume.medium  # type: ignore[assignment]
    assert used
