"""RAM of one or two frames under locked mappings and direct I/O: writers go on, bytes are kept."""

from __future__ import annotations

import ctypes
import mmap
import os
import random

import pytest
from conftest import needs
from live import PAGE, Mounts

pytestmark = [needs("root", "fuse")]

PAGES = 64


@pytest.mark.parametrize("ram", ["4K", "8K"])
def test_writers_go_on_when_next_to_nothing_fits_into_ram(live: Mounts, ram: str) -> None:
    """All pages are pagecache, locked by a program, dirty; more are written in both other ways."""
    seed = random.randrange(10**6)
    print(f"seed {seed}: chance = random.Random({seed}) plays it again")
    chance = random.Random(seed)
    mount = live.mount(live.image(pagecache=True), f"ram={ram}", "dirty_ratio=100")
    expected = bytearray(chance.randbytes(PAGES * PAGE))
    (mount / "file").write_bytes(expected)
    direct = os.open(mount / "file", os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, PAGE)
    with open(mount / "file", "r+b", buffering=0) as file:
        memory = mmap.mmap(file.fileno(), PAGES * PAGE)
        start = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mlock(ctypes.byref(start), ctypes.c_size_t(PAGES * PAGE)) == 0
        del start
        for turn in range(200):
            page = chance.randrange(PAGES)
            word = f"{turn:8}".encode() * (PAGE // 8)
            where = slice(page * PAGE, (page + 1) * PAGE)
            if turn % 3 == 0:
                memory[where] = word
            elif turn % 3 == 1:
                assert os.pwrite(file.fileno(), word, page * PAGE) == PAGE
            else:
                buffer[:] = word
                assert os.pwritev(direct, [buffer], page * PAGE) == PAGE
            expected[where] = word
            assert memory[where] == word
        os.fsync(file.fileno())
        assert memory[:] == expected
        memory.close()
    os.close(direct)
    vmstat = mount.vmstat()
    assert vmstat["nr_resident_pages"] <= int(ram[0]) // 4
    assert vmstat["pgevict"] > 50
    after = live.remount(mount, "ro")
    assert (after / "file").read_bytes() == expected
