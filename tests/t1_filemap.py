"""The file map: pages to homes, at every height and at the edges between heights."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from media import RecordingMedium, new_medium

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.filemap import seal
from xipfs.image.record import Inode
from xipfs.image.volume import Volume

#: Where the tree grows: 1 page, 512, 512^2, 512^3, 512^4 pages.
EDGES = [1, 512, 1 << 18, 1 << 27, 1 << 36]
INO = 7


@pytest.fixture
def volume() -> Volume:
    return Volume(new_medium(200), "image")


def put(volume: Volume, inode: Inode, index: int, body: int) -> None:
    with volume.transaction():
        volume.maps.assign_one(inode, index, body)


def test_a_body_is_a_block_a_kind_and_a_home() -> None:
    raw = Volume(new_medium(), "image").maps.raw_home
    assert raw(100) == 100 | 1 << 41
    assert raw(100, pagecache=True) == 100 | 1 << 40 | 1 << 41


@pytest.mark.parametrize(
    ("index", "height", "nodes"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (511, 1, 1),
        (512, 2, 2),
        ((1 << 18) - 1, 2, 2),
        (1 << 18, 3, 3),
        ((1 << 27) - 1, 3, 3),
        (1 << 27, 4, 4),
        (1 << 32, 4, 4),  # 16 TiB
        ((1 << 36) - 1, 4, 4),  # the last page: 256 TiB
    ],
)
def test_one_page_anywhere(volume: Volume, index: int, height: int, nodes: int) -> None:
    inode = Inode(INO)
    free = volume.counters.free_blocks
    body = volume.maps.raw_home(50)
    put(volume, inode, index, body)
    assert (inode.height, inode.blocks) == (height, nodes)
    assert volume.counters.free_blocks == free - nodes
    assert volume.maps.entry(inode, index) == body
    for other in {0, 1, 511, 512, index - 1, index + 1, (1 << 36) - 1} - {index, -1, 1 << 36}:
        assert volume.maps.entry(inode, other) == 0, other
    put(volume, inode, index, 0)
    assert (inode.root, inode.height, inode.blocks) == (0, 0, 0)
    assert volume.counters.free_blocks == free


def test_growing_keeps_what_is_there(volume: Volume) -> None:
    inode = Inode(INO)
    pages = [0, 1, 511, 512, 513, (1 << 18) - 1, 1 << 18, 1 << 27, (1 << 36) - 1]
    for number, index in enumerate(pages):
        put(volume, inode, index, volume.maps.raw_home(100 + number, pagecache=bool(number % 2)))
        for earlier, place in enumerate(pages[: number + 1]):
            want = volume.maps.raw_home(100 + earlier, pagecache=bool(earlier % 2))
            assert volume.maps.entry(inode, place) == want
    starts = [(start, np.flatnonzero(b).size) for start, b in volume.maps.leaves(inode, 0)]
    assert starts == [
        (0, 3),
        (512, 2),
        ((1 << 18) - 512, 1),
        (1 << 18, 1),
        (1 << 27, 1),
        ((1 << 36) - 512, 1),
    ]


@pytest.mark.parametrize("edge", EDGES[1:-1])
def test_a_range_over_an_edge(volume: Volume, edge: int) -> None:
    inode = Inode(INO)
    bodies = np.array([volume.maps.raw_home(60 + i) for i in range(6)], np.uint64)
    with volume.transaction():
        volume.maps.assign(inode, edge - 3, bodies)
    got = volume.maps.entries(inode, edge - 5, 10).tolist()
    assert got == [0, 0, *bodies.tolist(), 0, 0]
    with volume.transaction():
        taken = volume.maps.take(inode, edge - 1, 100)
        assert taken is not None
        assert taken.tolist() == bodies.tolist()[2:3]  # what its leaf has from there on
        taken = volume.maps.take(inode, edge - 1, 2)
        assert taken is not None
        assert taken.tolist() == bodies.tolist()[3:5]
        taken = volume.maps.take(inode, edge - 1, 2)
        assert taken is not None
        assert taken.tolist() == bodies.tolist()[5:]
        assert volume.maps.take(inode, edge - 1, 2) is None
    assert volume.maps.entries(inode, edge - 5, 10).tolist() == [
        0,
        0,
        *bodies.tolist()[:2],
        *[0] * 6,
    ]


def test_what_lies_beyond_the_format_is_refused(volume: Volume) -> None:
    with pytest.raises(AssertionError):
        put(volume, Inode(INO), 1 << 36, volume.maps.raw_home(50))


def test_changing_a_kind_changes_one_word_of_one_line() -> None:
    medium = new_medium(200)
    volume = Volume(medium, "image")
    inode = Inode(INO)
    with volume.transaction():
        volume.maps.assign(
            inode, 0, np.array([volume.maps.raw_home(60 + i % 99) for i in range(600)], np.uint64)
        )
    before = bytes(medium.now)
    put(volume, inode, 300, volume.maps.raw_home(60 + 300 % 99, pagecache=True))
    journal = range(2 * 4096, 10 * 4096)
    changed = [
        at // 8
        for at in range(0, len(before), 8)
        if at not in journal and before[at : at + 8] != medium.now[at : at + 8]
    ]
    assert len(changed) == 1


@pytest.mark.parametrize("what", ["block", "kind", "home", "reserved", "check"])
def test_a_damaged_entry_is_not_followed(what: str) -> None:
    medium = new_medium(200)
    volume = Volume(medium, "image")
    inode = Inode(INO)
    put(volume, inode, 5, volume.maps.raw_home(77))
    node = inode.root & layout.ENTRY_BLOCK_MASK
    bit = {"block": 0, "kind": 40, "home": 42, "reserved": 45, "check": 60}[what]
    medium.now[node * 4096 + 40 + bit // 8] ^= 1 << bit % 8
    with pytest.raises(ImageError, match=r"inode 7: the entry at offset \d+ \(level 0, position 5"):
        volume.maps.entry(inode, 5)
    with pytest.raises(ImageError, match=r"position 5\) is damaged"):
        volume.maps.entries(inode, 0, 512)


def test_an_entry_is_good_for_its_own_inode_and_place_only(volume: Volume) -> None:
    inode = Inode(INO)
    put(volume, inode, 5, volume.maps.raw_home(77))
    thief = Inode(INO + 1, height=1, root=inode.root)
    with pytest.raises(ImageError, match=r"inode 8: the entry at offset 64 \(level 1, position 0"):
        volume.maps.entry(thief, 5)
    single = Inode(INO)
    put(volume, single, 0, volume.maps.raw_home(78))
    with pytest.raises(ImageError, match="inode 9"):
        volume.maps.entry(Inode(9, root=single.root), 0)


def test_an_entry_outside_the_data_area_is_not_followed(volume: Volume) -> None:
    for block in (0, 1, 2, volume.superblock.data_start - 1, 199, 200, (1 << 40) - 1):
        inode = Inode(INO, root=seal(INO, 0, 0, volume.maps.raw_home(block)))
        with pytest.raises(ImageError, match="is damaged"):
            volume.maps.entry(inode, 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_maps_against_a_dict(seed: int) -> None:
    """Replay: random.Random(seed)."""
    chance = random.Random(seed)
    medium = new_medium(400)
    volume = Volume(medium, "image")
    with volume.transaction():
        first_block, count = volume.allocator.allocate(300)[0]
    free = volume.counters.free_blocks
    inode, model = Inode(INO), dict[int, int]()
    for _ in range(120):
        base = chance.choice([0, *EDGES[:-1], EDGES[-1] - 40])
        first = max(base + chance.randint(-20, 20), 0)
        bodies = [
            chance.choice([0, volume.maps.raw_home(first_block + chance.randrange(count))])
            for _ in range(chance.randint(1, 20))
        ]
        with volume.transaction():
            volume.maps.assign(inode, first, np.array(bodies, np.uint64))
        model.update(enumerate(bodies, first))
        model = {index: body for index, body in model.items() if body}
        found = {
            start + int(at): int(part[at])
            for start, part in volume.maps.leaves(inode, 0)
            for at in np.flatnonzero(part)
        }
        assert found == model
        assert free - volume.counters.free_blocks == inode.blocks
    again = Volume(RecordingMedium(medium.durable), "image")
    assert {i: again.maps.entry(inode, i) for i in model} == model
    with volume.transaction():
        while volume.maps.take(inode, 0, 1000) is not None:
            pass
    assert volume.counters.free_blocks == free


@pytest.mark.parametrize(
    "pages",
    [[0], [511], [0, 511], [512], [0, 1024], [511, 1 << 18], [(1 << 18) - 1], [5, (1 << 36) - 1]],
)
def test_a_walk_starts_where_it_is_told_on_every_height(volume: Volume, pages: list[int]) -> None:
    inode = Inode(INO)
    for index in pages:
        put(volume, inode, index, volume.maps.raw_home(100))
    edges = [*pages, 1, 511, 512, 513, 1024, 1 << 18, (1 << 18) + 512, 1 << 27, (1 << 36) - 1]
    for first in sorted({0, *edges, *(index + 1 for index in pages if index + 1 < 1 << 36)}):
        walked = [
            start + int(slot)
            for start, bodies in volume.maps.leaves(inode, first)
            for slot in np.flatnonzero(bodies)
        ]
        assert walked == [index for index in pages if index >= first], first


def test_nothing_is_taken_behind_the_last_page_of_a_full_leaf(volume: Volume) -> None:
    inode = Inode(INO)
    put(volume, inode, 511, volume.maps.raw_home(100))
    with volume.transaction():
        assert volume.maps.take(inode, 512, 10) is None
        taken = volume.maps.take(inode, 511, 10)
    assert taken is not None
    assert taken.tolist() == [100 | 1 << 41]


def test_a_leaf_is_looked_for_anew_when_leaves_come_and_go(volume: Volume) -> None:
    inode, body = Inode(INO), volume.maps.raw_home(50)
    put(volume, inode, 512, body)
    assert volume.maps.entry(inode, 1024) == 0  # no such leaf, below the same root as later
    put(volume, inode, 1024, volume.maps.raw_home(51))
    assert volume.maps.entry(inode, 1024) == volume.maps.raw_home(51)
    put(volume, inode, 1024, 0)
    assert volume.maps.entry(inode, 1024) == 0


def test_a_leaf_of_an_aborted_transaction_is_not_found(volume: Volume) -> None:
    inode = Inode(INO)
    with volume.transaction():
        homes = [volume.maps.raw_home(volume.allocator.allocate_block()) for _ in range(2)]
    put(volume, inode, 512, homes[0])
    with contextlib.suppress(KeyboardInterrupt), volume.transaction():
        volume.maps.assign_one(inode, 1024, homes[1])
        assert volume.maps.entry(inode, 1024) == homes[1]
        raise KeyboardInterrupt
    with volume.transaction():  # what was the leaf has a file's bytes now
        for block, count in volume.allocator.allocate(volume.allocator.free_blocks):
            volume.medium.store(block << 12, b"\xff" * (count << 12))
    assert volume.maps.entry(inode, 1024) == 0
