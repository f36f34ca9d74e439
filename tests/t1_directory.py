"""Directories: names in a trie of hashes; what a change costs, and cookies that stay valid."""

from __future__ import annotations

import dataclasses
import errno
import random

import pytest
from media import RecordingMedium, new_medium

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.directory import DirectoryEntry, leaf_header
from xipfs.image.record import Inode
from xipfs.image.volume import Volume

DIR = 9


def insert(volume: Volume, directory: Inode, name: bytes, ino: int) -> None:
    with volume.transaction():
        volume.directories.insert(directory, name, ino, 8)


def remove(volume: Volume, directory: Inode, name: bytes) -> None:
    with volume.transaction():
        volume.directories.remove(directory, name)


def listing(volume: Volume, directory: Inode, cookie: int = 0) -> list[DirectoryEntry]:
    found: list[DirectoryEntry] = []
    while more := volume.directories.following(directory, found[-1].cookie if found else cookie):
        found += more
    return found


@pytest.fixture
def volume() -> Volume:
    return Volume(new_medium(400), "image")


def test_an_empty_directory_owns_nothing(volume: Volume) -> None:
    directory = Inode(DIR)
    assert volume.directories.lookup(directory, b"a") is None
    assert listing(volume, directory) == []
    insert(volume, directory, b"a", 20)
    assert (directory.blocks, directory.entries) == (1, 1)
    remove(volume, directory, b"a")
    assert (directory.blocks, directory.entries, directory.root) == (0, 0, 0)


def test_names_of_every_length_and_any_bytes(volume: Volume) -> None:
    directory = Inode(DIR)
    names = [bytes([1 + i % 250]) * length for i, length in enumerate([*range(1, 20), 254, 255])]
    for ino, name in enumerate(names, 100):
        insert(volume, directory, name, ino)
    for ino, name in enumerate(names, 100):
        entry = volume.directories.lookup(directory, name)
        assert entry is not None
        assert (entry.name, entry.ino, entry.kind) == (name, ino, 8)
    assert volume.directories.lookup(directory, b"\x01" * 2) is None


def test_a_name_can_mean_another_inode(volume: Volume) -> None:
    directory = Inode(DIR)
    insert(volume, directory, b"a", 20)
    with volume.transaction():
        volume.directories.replace(directory, b"a", 21, 4)
    entry = volume.directories.lookup(directory, b"a")
    assert entry is not None
    assert (entry.ino, entry.kind, directory.entries) == (21, 4, 1)


def test_names_that_are_not_there(volume: Volume) -> None:
    directory = Inode(DIR)
    with pytest.raises(FsError) as caught:
        remove(volume, directory, b"x")
    assert caught.value.errno == 2
    with pytest.raises(FsError) as caught, volume.transaction():
        volume.directories.replace(directory, b"x", 1, 8)
    assert caught.value.errno == 2


def test_a_thousand_names_come_and_go(volume: Volume) -> None:
    free = volume.counters.free_blocks
    directory = Inode(DIR)
    names = [b"file-%04d" % i for i in range(1000)]
    for ino, name in enumerate(names, 1000):
        insert(volume, directory, name, ino)
    assert free - volume.counters.free_blocks == directory.blocks
    # 32 bytes a record in leaves at least a quarter full: between 8 and 32 leaves, and nodes.
    assert 8 <= directory.blocks <= 40
    entries = listing(volume, directory)
    assert {entry.name: entry.ino for entry in entries} == {
        name: ino for ino, name in enumerate(names, 1000)
    }
    cookies = [entry.cookie for entry in entries]
    assert cookies == sorted(set(cookies))
    assert cookies[0] > 0
    assert cookies[-1] < 1 << 62
    random.Random(1).shuffle(names)
    for left, name in zip(range(999, -1, -1), names, strict=True):
        remove(volume, directory, name)
        assert directory.entries == left
        if left % 100 == 0:
            assert len(listing(volume, directory)) == left
    assert (directory.blocks, directory.root) == (0, 0)
    assert volume.counters.free_blocks == free


def test_a_change_writes_a_few_lines_however_large_the_directory() -> None:
    medium = new_medium(2000)
    volume = Volume(medium, "image")
    directory = Inode(DIR)
    written = []
    for number in range(5000):
        before = medium.stored_bytes
        insert(volume, directory, b"file-%05d" % number, 1000 + number)
        written.append(medium.stored_bytes - before)
    # A split rewrites two leaves, through the journal and in place, and zeroes them first.
    assert max(written) < 7 * 4096
    # Most names go into a leaf that has room: a few lines, each written twice.
    assert sorted(written[4000:])[500] < 2048


def test_a_reader_sees_what_stays_exactly_once_while_names_come_and_go(volume: Volume) -> None:
    chance = random.Random(5)
    directory = Inode(DIR)
    stay = {b"stay-%03d" % i for i in range(300)}
    come_and_go = [b"other-%03d" % i for i in range(300)]
    for name in stay:
        insert(volume, directory, name, 50)
    present: set[bytes] = set()
    seen: list[bytes] = []
    cookie = 0
    while entries := volume.directories.following(directory, cookie):
        take = chance.randint(1, len(entries))  # a reply may end anywhere
        seen += [entry.name for entry in entries[:take]]
        cookie = entries[take - 1].cookie
        for name in chance.sample(come_and_go, 40):
            if name in present:
                remove(volume, directory, name)
            else:
                insert(volume, directory, name, 60)
            present ^= {name}
    assert sorted(name for name in seen if name in stay) == sorted(stay)
    assert len(set(seen)) == len(seen)


def test_the_order_is_the_image_s_own_secret() -> None:
    """Nobody outside can choose names that fall into one leaf: the hash is keyed."""
    medium = new_medium(64)
    first = Volume(medium, "image").directories
    second = Volume(new_medium(64), "image").directories
    assert first.hash(b"a") == second.hash(b"a")
    second._hash_key = bytes(16)
    assert first.hash(b"a") != second.hash(b"a")


@pytest.mark.parametrize("at", [0, 4, 6, 8, 16, 24, 32, 40, 48, 49, 50])
def test_a_damaged_leaf_is_named(at: int) -> None:
    medium = new_medium(64)
    volume = Volume(medium, "image")
    directory = Inode(DIR)
    insert(volume, directory, b"name", 20)
    block = directory.root & ((1 << 40) - 1)
    medium.now[block * 4096 + at] ^= 0x80
    with pytest.raises(ImageError, match=f"directory inode 9: the leaf at offset {block * 4096}"):
        volume.directories.lookup(directory, b"name")


@pytest.mark.parametrize("name", [b"twin-1", b"twin-3"])
def test_a_name_that_a_lookup_would_not_find_there_is_damage(name: bytes) -> None:
    """The checksum fits, but the name is another's, or lies under another's hash."""
    medium = new_medium(64)
    volume = Volume(medium, "image")
    directory = Inode(DIR)
    insert(volume, directory, b"twin-1", 20)
    insert(volume, directory, b"twin-2", 21)
    start = (directory.root & ((1 << 40) - 1)) * 4096
    used = layout.LEAF_HEADER.unpack_from(medium.now, start)[2]
    body = bytes(medium.now[start + 32 : start + used]).replace(b"twin-2", name)
    medium.now[start : start + used] = leaf_header(DIR, 0, 2, body) + body
    found = volume.directories.lookup(directory, b"twin-1")
    assert found is not None
    assert found.ino == 20
    with pytest.raises(ImageError, match=f"directory inode 9: the leaf at offset {start} is dam"):
        volume.directories.following(directory, 0)


def test_a_missing_leaf_is_damage_not_absence(volume: Volume) -> None:
    directory = Inode(DIR)
    for number in range(300):
        insert(volume, directory, b"file-%04d" % number, 100)
    leaf = next(start + int(b.nonzero()[0][0]) for start, b in volume.maps.leaves(directory, 0))
    with volume.transaction():
        volume.maps.assign_one(directory, leaf, 0)
    with pytest.raises(ImageError, match="directory inode 9 at offset 0 has no leaf for hash"):
        [volume.directories.lookup(directory, b"file-%04d" % number) for number in range(300)]


@pytest.mark.parametrize("seed", range(3))
def test_random_names_against_a_dict(seed: int) -> None:
    """Replay: random.Random(seed)."""
    chance = random.Random(seed)
    medium = new_medium(400)
    volume = Volume(medium, "image")
    directory, model = Inode(DIR), dict[bytes, int]()
    for step in range(1500):
        grow = step < 900
        name = b"n" * chance.randint(1, 60) + b"%d" % chance.randint(0, 400)
        if name in model and chance.random() < (0.3 if grow else 0.8):
            remove(volume, directory, name)
            del model[name]
        elif name in model:
            with volume.transaction():
                volume.directories.replace(directory, name, step + 10, 8)
            model[name] = step + 10
        elif grow:
            insert(volume, directory, name, step + 10)
            model[name] = step + 10
        elif model:
            gone = chance.choice(sorted(model))
            remove(volume, directory, gone)
            del model[gone]
        assert directory.entries == len(model)
    again = Volume(RecordingMedium(medium.durable), "image")
    assert {e.name: e.ino for e in listing(again, directory)} == model


def fill(volume: Volume, directory: Inode, names: list[bytes]) -> None:
    """Insert names, noting them, until that fails; what failed leaves ``directory`` as it was."""
    while True:
        name = b"%0100d" % len(names)
        before = dataclasses.asdict(directory)
        try:
            insert(volume, directory, name, 20)
        except FsError:
            for field, value in before.items():
                setattr(directory, field, value)
            raise
        names.append(name)


def test_a_full_image_can_be_emptied_name_by_name(volume: Volume) -> None:
    directory = Inode(DIR)
    before = volume.counters.free_blocks
    names: list[bytes] = []
    with pytest.raises(FsError) as caught:
        fill(volume, directory, names)
    assert caught.value.errno == errno.ENOSPC
    left = volume.counters.free_blocks
    with volume.transaction():
        taken = volume.allocator.allocate(left)
    assert volume.counters.free_blocks == 0
    assert directory.blocks > 300, "too few leaves to need more than one map node"
    random.Random(7).shuffle(names)
    for count, name in enumerate(names, 1):
        remove(volume, directory, name)
        assert directory.entries == len(names) - count
    assert (directory.blocks, directory.root) == (0, 0)
    assert volume.counters.free_blocks + sum(length for _, length in taken) == before
