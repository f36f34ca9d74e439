"""Everything at once, by a seed: programs map, touch, fork and die while pages move under them.

What each fault is charged as cannot be written out here; that the books balance, that every PTE is
given back and that no byte is lost can.
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts
from t5_accounting import check_books, fill

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

FILES = 6
PAGES = 61
ROUNDS = 12
FILLER = 0xEE
#: To replay a failure: XIPFS_TEST_SEED=N pytest tests/t5_accounting_stress.py
SEED = int(os.environ.get("XIPFS_TEST_SEED") or secrets.randbelow(1 << 32))


def script(choose: random.Random, mount: LiveMount) -> list[str]:
    """A random program for touch that is legal from beginning to end."""
    words: list[str] = []
    for _ in range(choose.randint(1, 3)):
        name = mount / f"f{choose.randrange(FILES)}"
        sharing = choose.choice(["private", "shared"])
        words += ["map", str(name), sharing, "rw"]
        words += _touches(choose, choose.randint(1, 4))
        if choose.random() < 0.5:
            words += ["fork", "{", *_touches(choose, 2), "}"]
        if choose.random() < 0.3:
            words += ["thread", "{", *_touches(choose, 2), "}", *_touches(choose, 1), "join"]
        last = choose.choice(["unmap", "advise", "protect", "remap", "nothing"])
        if last == "unmap":
            words += ["unmap", _pages(choose)]
        elif last == "advise":
            words += ["advise", _pages(choose), "dontneed", *_touches(choose, 1)]
        elif last == "protect":
            words += ["protect", f"0-{PAGES - 1}", "r", "read", _pages(choose)]
        elif last == "remap":
            words += ["remap", str(choose.randint(1, PAGES))]
    return words


def _pages(choose: random.Random) -> str:
    first = choose.randrange(PAGES)
    return f"{first}-{choose.randrange(first, PAGES)}"


def _touches(choose: random.Random, count: int) -> list[str]:
    words = []
    for _ in range(count):
        words += [choose.choice(["read", "write"]), _pages(choose)]
    return words


def disturb(choose: random.Random, mount: LiveMount) -> None:
    """Move, rewrite or synchronise pages under the programs."""
    name = f"f{choose.randrange(FILES)}"
    what = choose.randrange(4)
    if what <= 1:
        mount.migrate(name, choose.choice(["xip", "pagecache"]), _pages(choose))
    elif what == 2:
        (mount / name).read_bytes()
    else:
        with open(mount / name, "r+b") as file:
            os.fsync(file.fileno())


@pytest.mark.parametrize("ram", ["64K", "64M"])
def test_the_books_balance_whatever_happens(live: Mounts, touch: Path, ram: str) -> None:
    print(f"XIPFS_TEST_SEED={SEED}")
    choose = random.Random(SEED)
    image = live.image()
    kinds = [PageKind.XIP, PageKind.PAGECACHE]
    fill(
        image,
        {f"f{number}": kinds[number % 2] for number in range(FILES)},
        pages=PAGES,
        byte=FILLER,
    )
    mount = live.mount(image, "observe=tracefs", f"ram={ram}", "policy=threshold,promote=3")
    written: set[tuple[str, int]] = set()
    for _ in range(ROUNDS):
        scripts = [script(choose, mount) for _ in range(3)]
        written = written.union(*(stored(words) for words in scripts))
        programs = [
            subprocess.Popen([str(touch), *words], stderr=subprocess.PIPE, text=True)
            for words in scripts
        ]
        disturb(choose, mount)
        disturb(choose, mount)
        for program in programs:
            _, complained = program.communicate(timeout=40)
            assert (program.returncode, complained) == (0, "")
        check_books(mount.cat_stats())
    stats = mount.cat_stats()
    vmstat = stats["vmstat"]
    assert vmstat["pgfault"] == stats["kernel"]["faults"] > 100
    assert [vmstat[f"nr_{name}"] for name in ("special_ptes", "normal_ptes", "anon_pages")] == [
        0
    ] * 3
    assert vmstat["nr_xip_pages"] + vmstat["nr_pagecache_pages"] == FILES * PAGES
    assert vmstat["pgmigrate_success"] == vmstat["pgpromote_success"] + vmstat["pgdemote_success"]
    assert vmstat["pgmigrate_fail"] == 0
    for number in range(FILES):
        for letter, first, _, refcount, mapcount in mount.pages(f"f{number}"):
            assert (refcount, mapcount) == ((1, 0) if letter == "P" else (None, None)), first
    contents = {f"f{number}": (mount / f"f{number}").read_bytes() for number in range(FILES)}
    for name, data in contents.items():
        check_bytes(name, data, written)
    after = live.remount(mount, "ro")
    for name, data in contents.items():
        assert (after / name).read_bytes() == data


def stored(words: list[str]) -> set[tuple[str, int]]:
    """Return the (file, page) pairs that a script writes through shared mappings."""
    found = set()
    name = sharing = ""
    for at, word in enumerate(words):
        if word == "map":
            name, sharing = Path(words[at + 1]).name, words[at + 2]
        elif word == "write" and sharing == "shared":
            first, last = words[at + 1].split("-")
            found |= {(name, page) for page in range(int(first), int(last) + 1)}
    return found


def check_bytes(name: str, data: bytes, written: set[tuple[str, int]]) -> None:
    """A write by touch stores the page's number, at that offset of the page; else as filled."""
    assert len(data) == PAGES * PAGE
    for page in range(PAGES):
        expected = bytearray([FILLER]) * PAGE
        if (name, page) in written:
            expected[page] = page
        assert data[page * PAGE : (page + 1) * PAGE] == expected, (name, page)
