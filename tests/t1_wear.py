"""Wear: which lines a flush writes, counted by block of 64 lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from xipfs.memory.region import Region
from xipfs.memory.wear import Wear, WearStatistics


def test_nothing_written() -> None:
    assert Wear().statistics() == WearStatistics(0, 0, [], {})


@pytest.mark.parametrize(
    ("offset", "size", "blocks"),
    [
        (0, 1, {0: 1}),
        (63, 2, {0: 2}),
        (64, 64, {0: 1}),
        (0, 4096, {0: 64}),
        (4095, 2, {0: 1, 1: 1}),
        (4032, 128, {0: 1, 1: 1}),
        (4000, 8192, {0: 2, 1: 64, 2: 63}),
        (0, 4 * 4096, {0: 64, 1: 64, 2: 64, 3: 64}),
        (100, 0, {}),
        # Over the border between two stretches of counts, and a stretch as a whole.
        (1023 * 4096, 3 * 4096, {1023: 64, 1024: 64, 1025: 64}),
        ((5 << 40) + 64, 1, {5 << 28: 1}),
    ],
)
def test_the_lines_of_a_range(offset: int, size: int, blocks: dict[int, int]) -> None:
    wear = Wear()
    assert wear.flushed(offset, size) == sum(blocks.values())
    assert dict(wear.statistics().hottest) == blocks


def test_a_range_over_a_whole_stretch() -> None:
    wear = Wear()
    assert wear.flushed(1023 * 4096 + 4032, 1025 * 4096) == 1025 * 64
    found = wear.statistics(hottest=2000)
    # One line of block 1023, the 1,024 blocks of the stretch, all but one of block 2048.
    assert found.blocks_written == 1026
    assert found.histogram == {1: 1, 32: 1, 64: 1024}
    assert found.hottest[-2:] == [(2048, 63), (1023, 1)]


def test_hottest_first_equals_by_place_and_sizes_by_powers_of_two() -> None:
    wear = Wear()
    for block, times in ((5, 7), (1, 1), (6, 8), (2, 1), (3, 4)):
        for _ in range(times):
            wear.flushed(block * 4096, 1)
    assert wear.statistics(hottest=3) == WearStatistics(
        line_writes=21,
        blocks_written=5,
        hottest=[(6, 8), (5, 7), (3, 4)],
        histogram={1: 2, 4: 2, 8: 1},
    )
    assert wear.statistics().hottest[3:] == [(1, 1), (2, 1)]


def test_a_region_counts_what_is_flushed_not_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.write_bytes(bytes(8192))
    region = Region(path, writable=True)
    region.store(4096, bytes(64))
    region.store(4096, bytes(64))
    assert region.wear.statistics().line_writes == 0
    region.flush(4096, 64)
    assert region.wear.statistics().hottest == [(1, 1)]
    region.close()
