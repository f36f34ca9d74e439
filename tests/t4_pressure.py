"""Every frame of RAM held fast and the image full: writers get ENOSPC, and nothing is lost.

On a live mount no program can hold a modelled frame for long, so the daemon, which is xipfs as it
is, takes a reference to each by a signal, as a driver would that does I/O there, and lets go later.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from imagecheck import check
from live import PAGE, LiveMount, new_image, xipfs
from scripted import ScriptedMount

pytestmark = [needs("root", "fuse", "tracefs")]

FRAMES = 16
#: Of them those of a file that is removed while they are pinned; the others are one file's.
GONE = 4
HELD = FRAMES - GONE
WRITERS = 4
PAGES = 120

_SCRIPT = """
import signal, sys
from pathlib import Path
import trio
from xipfs.fuse.live import Live

order = Path(sys.argv[0]).with_suffix(".order")
pinned = []
start = Live.start

def begin(live, *arguments):
    start(live, *arguments)
    memory = live.fs.memory

    def obey():
        # Between two requests, as whoever pins a page of Linux holds the page's lock.
        if order.read_text() == "pin":
            pinned.extend(live.fs.resident_frames())
            for pfn in pinned:
                memory.get_page(pfn)
        while order.read_text() == "unpin" and pinned:
            memory.put_page(pinned.pop())
        order.unlink()

    token = trio.lowlevel.current_trio_token()
    signal.signal(signal.SIGUSR2, lambda number, frame: token.run_sync_soon(obey))

Live.start = begin
"""

#: Writes pages of its own file in every way; prints what each page may hold, the last word that
#: was acknowledged and those that were not since, and how often each way was taken and refused.
WRITER = """
import collections, errno, json, mmap, os, random, sys
path, number, pages, turns, seed = sys.argv[1], *map(int, sys.argv[2:])
chance = random.Random(seed)
file = os.open(path, os.O_RDWR | os.O_CREAT)
direct = os.open(path, os.O_RDWR | os.O_DIRECT)
if os.fstat(file).st_size == 0:
    os.ftruncate(file, pages * 4096)
memory = mmap.mmap(file, pages * 4096)
buffer = mmap.mmap(-1, 4096)
holds = {}
done, refused = collections.Counter(), collections.Counter()
for turn in range(turns):
    page = chance.randrange(pages)
    at = slice(page * 4096, page * 4096 + 4096)
    way = chance.choice(["write", "store", "direct"])
    word = "%d%07d" % (number, turn)
    data = word.encode() * 512
    try:
        if way == "write":
            assert os.pwrite(file, data, page * 4096) == 4096
            if turn % 5 == 0:
                os.fsync(file)
        elif way == "store":
            memory[at] = data
            memory.flush(at.start, 4096)
        else:
            buffer[:] = data
            assert os.pwritev(direct, [buffer], page * 4096) == 4096
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        refused[way] += 1
        holds.setdefault(page, [""]).append(word)
    else:
        done[way] += 1
        holds[page] = [word]
        assert memory[at] == data
        assert os.pread(file, 4096, page * 4096) == data
print(json.dumps({"holds": holds, "done": done, "refused": refused}))
"""

Json = dict[str, Any]


class PinningMount(ScriptedMount):
    """A mount whose frames of RAM can be pinned, all at once."""

    SCRIPT = _SCRIPT

    def pin(self, how: str) -> None:
        """``pin`` every resident frame, or ``unpin`` them."""
        self.obey(signal.SIGUSR2, how)


@pytest.fixture
def pinning(tmp_path: Path) -> Iterator[PinningMount]:
    image = new_image(tmp_path / "image", size_bytes=1 << 20, pagecache=True)
    options = (
        "observe=tracefs",
        f"ram={FRAMES * PAGE}",
        "dirty_background_ratio=99,dirty_ratio=100,dirty_expire_ms=600000",
    )
    mount = PinningMount(image, tmp_path / "mnt", options)
    try:
        yield mount
    finally:
        mount.close()


def write_at_once(mount: LiveMount, turns: int, chance: random.Random) -> list[Json]:
    """Run the writers beside each other; return what each told. Each has a minute."""
    running = []
    for number in range(WRITERS):
        words = [mount / f"w{number}", number, PAGES, turns, chance.randrange(10**6)]
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", WRITER, *map(str, words)], stdout=subprocess.PIPE
            )
        )
    told = []
    for each in running:
        try:
            output, _ = each.communicate(timeout=60)
        finally:
            each.kill()
        assert each.returncode == 0
        told.append(json.loads(output))
    return told


def sums(told: list[Json], what: str) -> dict[str, int]:
    ways = ("write", "store", "direct")
    return {way: sum(each[what].get(way, 0) for each in told) for way in ways}


def check_words(path: Path, holds: dict[str, list[str]]) -> None:
    """Compare what xipfs, not the kernel's cache, has of each page with what it may hold."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = file.read()
    for page in range(PAGES):
        here = data[page * PAGE : (page + 1) * PAGE]
        allowed = holds.get(str(page), [""])
        assert here in [word.encode() * 512 if word else bytes(PAGE) for word in allowed], page


def after(old: dict[str, list[str]], new: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return what the pages may hold after both runs: "" in ``new`` is what was there before."""
    merged = dict(old)
    for page, words in new.items():
        merged[page] = old.get(page, [""]) + words[1:] if words[0] == "" else words
    return merged


def test_writers_with_no_frame_and_no_block_left(pinning: PinningMount, tmp_path: Path) -> None:
    mount = pinning
    seed = random.randrange(10**6)
    print(f"seed {seed}: chance = random.Random({seed}) plays it again")
    chance = random.Random(seed)
    (mount / "placed").write_bytes(bytes(range(256)) * 16)
    mount.migrate("placed", "xip")
    held = bytearray(chance.randbytes(HELD * PAGE))
    (mount / "held").write_bytes(held)
    (mount / "gone").write_bytes(chance.randbytes(GONE * PAGE))
    assert mount.cat_stats()["writeback"]["nr_dirty"] >= FRAMES - 1
    mount.pin("pin")
    os.unlink(mount / "gone")

    told = write_at_once(mount, 200, chance)
    assert min(sums(told, "done").values()) > 20
    assert min(sums(told, "refused").values()) > 20, "the image was full"
    assert os.statvfs(mount.directory).f_bfree == 0

    # No page moves; what is dirty goes home all the same, from frames that nobody may take.
    refused = mount.migrate("held", "xip")
    assert (refused["moved"], refused["failed"]) == (0, {"pinned": HELD})
    refused = mount.migrate("placed", "pagecache")
    assert (refused["moved"], refused["failed"]) == (0, {"no_ram": 1})
    assert mount.cat_stats()["writeback"]["nr_dirty"] >= HELD - 1
    with open(mount / "held", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[:] == held
        os.fsync(file.fileno())
        assert mount.cat_stats()["writeback"]["nr_dirty"] == 0
        mapped[5 * PAGE : 6 * PAGE] = held[5 * PAGE : 6 * PAGE] = chance.randbytes(PAGE)
        mapped.flush()
    assert mount.letters("held") == "P" * HELD
    vmstat = mount.vmstat()
    assert (vmstat["nr_resident_pages"], vmstat["pgevict"]) == (HELD, 0)
    for number, each in enumerate(told):
        check_words(mount / f"w{number}", each["holds"])

    mount.pin("unpin")
    for number, each in enumerate(told):
        check_words(mount / f"w{number}", each["holds"])
    assert mount.vmstat()["pgevict"] > 0, "frames can go again"
    assert mount.vmstat()["nr_resident_pages"] == FRAMES, "those of the removed file too"
    assert mount.migrate("held", "xip")["moved"] == HELD
    os.unlink(mount / "w3")
    more = write_at_once(mount, 40, chance)
    assert sum(sums(more, "done").values()) > 100
    told[3]["holds"] = {}
    expected = [after(old["holds"], new["holds"]) for old, new in zip(told, more, strict=True)]
    figures = mount.cat_stats()
    assert figures["background"]["failures"] == {}
    assert figures["vmstat"]["nr_resident_pages"] <= FRAMES
    xipfs("verify", mount.directory)  # ends with 1 if anything differs
    unfollowed = figures["observer"]["unfollowed"]
    failed = unfollowed["faults while every frame of RAM was pinned"]
    assert failed == figures["vmstat"]["pgfault_sigbus"] > 0
    mount.umount()
    check((tmp_path / "image").read_bytes())
    again = LiveMount(tmp_path / "image", tmp_path / "again", ["ro", "observe=off"])
    try:
        assert (again / "held").read_bytes() == held
        for number, holds in enumerate(expected):
            check_words(again / f"w{number}", holds)
    finally:
        again.close()
