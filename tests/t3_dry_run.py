"""Dry runs: what would move, what that would cost and save, compared with what moves then cost."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from media import new_medium, open_medium

from xipfs.accounting.charges import PteKind
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.memory.profiles import load_profile
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.engine import IDLE_PAGES, Engine, cut
from xipfs.migrate.estimate import Would, would_move
from xipfs.migrate.policy import EVICTED, FAULT, MOVED, Signal
from xipfs.migrate.registry import make_policy
from xipfs.stats.cost import cost

PAGE = 4096
MS = 1_000_000


def file_of(fs: Filesystem, pages: int) -> int:
    ino = int(fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino)
    fs.write(ino, 0, bytes(pages * PAGE))
    return ino


def spent(fs: Filesystem, before: dict[str, Any]) -> dict[str, int]:
    """Return what the medium was used for since ``before``."""
    after = cost(fs, None)
    names = ("nvram_read_bytes", "nvram_written_bytes", "nvram_fences")
    return {name: after[name] - before[name] for name in names}


def test_what_a_migration_would_do_and_what_it_then_does() -> None:
    fs = open_medium(new_medium())
    ino = file_of(fs, 8)
    for to in (PageKind.PAGECACHE, PageKind.XIP):
        would, told = would_move(fs, [(ino, [range(8)])], to)
        before = cost(fs, None)
        assert len(fs.move(ino, range(8), to).moved) == told["would_move"] == 8
        assert told["moves"] == [
            {"ino": ino, "first": 0, "count": 8, "to": to.value, "reason": "manual"}
        ]
        assert would.cost(None, 64)["cost"] == spent(fs, before), to
        fs.write(ino, 0, bytes([1]) * 8 * PAGE)  # dirty frames: the way back writes them home
    assert would.written_home == 8


def test_the_fences_of_a_demotion_that_writes_pages_home() -> None:
    """Four: the dirty pages are durable with the journal's first, before the mark's."""
    medium = new_medium()
    fs = open_medium(medium)
    ino = file_of(fs, 8)
    fs.move(ino, range(8), PageKind.PAGECACHE)
    fs.write(ino, 0, bytes([1]) * 8 * PAGE)
    fences = medium.fences
    assert len(fs.move(ino, range(8), PageKind.XIP).moved) == 8
    assert medium.fences - fences == 4
    assert not medium.pending(), "all of it is durable"


def test_an_estimate_of_any_move_is_what_the_move_then_costs() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}: chance = random.Random({seed}) plays it again")
    chance = random.Random(seed)
    fs = open_medium(new_medium(4096), ram_pages=3000)
    engine = Engine(fs)
    ino = int(fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino)
    for _ in range(12):
        first = chance.randrange(2300)
        fs.write(ino, first * PAGE, chance.randbytes(chance.randrange(1, 200) * PAGE))
    end = fs.getattr(ino).size_bytes // PAGE
    moved = 0
    for turn in range(60):
        to = chance.choice((PageKind.PAGECACHE, PageKind.XIP))
        first = chance.randrange(end)
        pages = range(first, min(first + chance.choice((1, 2, 9, 300, 2400)), end))
        wanted = engine.pages_with_bytes(ino, pages)
        would, told = would_move(fs, [(ino, wanted)], to)
        before = cost(fs, None)
        for run in wanted:
            for chunk in cut(run, IDLE_PAGES):
                engine.move_pages(ino, chunk, to)
        assert would.cost(None, 64)["cost"] == spent(fs, before), (turn, to, pages)
        moved += told["would_move"]
        first = chance.randrange(end)
        fs.write(
            ino, first * PAGE, chance.randbytes(PAGE) * min(chance.randrange(1, 40), end - first)
        )
    assert moved > 1000


def test_what_is_there_already_what_is_pinned_and_what_would_be_evicted() -> None:
    fs = open_medium(new_medium())
    ino = file_of(fs, 8)
    fs.move(ino, range(2, 5), PageKind.PAGECACHE)
    _, told = would_move(fs, [(ino, [range(8)])], PageKind.PAGECACHE)
    assert (told["would_move"], told["already"], told["failed"]) == (5, 3, {})
    assert [(move["first"], move["count"]) for move in told["moves"]] == [(0, 2), (5, 3)]
    pfn = fs.page(ino, 3).pfn
    assert pfn is not None
    fs.memory.refcount[pfn] += 1
    _, told = would_move(fs, [(ino, [range(8)])], PageKind.XIP)
    assert (told["would_move"], told["already"], told["failed"]) == (2, 5, {"pinned": 1})
    fs.memory.refcount[pfn] -= 1


def test_the_arithmetic_of_costs_and_savings() -> None:
    would = Would(
        promoted=10, demoted=2, written_home=1, commits=1, commit_lines=12, evicted=3,
        reads_in_ram=7, writes_in_ram=5, touches_of_medium=2,
    )  # fmt: skip
    profile = dataclasses.replace(
        load_profile("optane"),
        read_latency_ns=1081,
        read_bytes_per_s=64_000_000_000,
        write_latency_ns=2057,
        write_bytes_per_s=64_000_000_000,
    )
    answer = would.cost(profile, 56)
    assert answer["cost"]["nvram_read_bytes"] == 40960
    assert answer["cost"]["nvram_written_bytes"] == 4096 + 12 * 64
    assert answer["cost"]["nvram_fences"] == 4
    assert answer["cost"]["ns_estimated"] == 10 * 1081 + 630 + 4 * 2057 + 72
    assert (answer["ram_bytes_more"], answer["struct_page_bytes_more"]) == (5 * PAGE, 5 * 56)
    # A line of DRAM: 101 ns and 57 ns.
    assert answer["saved"]["load_ns_estimated"] == 980
    assert answer["saved"]["store_ns_estimated"] == 2000
    assert answer["saved"]["ns_estimated"] == 5 * 980 + 5 * 2000
    assert answer["saved"]["nvram_written_bytes"] == 5 * 64
    assert answer["modelled"] is True


def touch(ms: int, page: int, *, kind: PteKind = PteKind.XIP, write: bool = False) -> Signal:
    return Signal(ms * MS, FAULT, 1, 7, page, kind, write)


def test_a_dry_policy_goes_on_as_if_its_moves_were_made() -> None:
    dry = DryRun(make_policy("fifo", [], 4), 4)
    made = [
        [(move.index, move.to.value) for move in dry.hear(signal, 2)]
        for signal in (touch(1, 1), touch(2, 1), touch(3, 2, write=True), touch(4, 2, write=True))
    ]
    assert made == [[(1, "pagecache")], [], [(2, "pagecache")], []]
    assert (dry.would.reads_in_ram, dry.would.writes_in_ram) == (1, 1)
    # Two frames are really in use, so a third page takes the oldest one's place.
    dry.hear(touch(5, 3), 2)
    assert (list(dry.resident), dry.would.evicted) == ([(7, 2), (7, 3)], 1)
    dry.hear(touch(6, 4), 2)
    assert dry.would.written_home == 1, "page 2 was written while it was there"
    assert dry.moves == {("pagecache", "first fault"): 4}
    # What really happens to a page ends what was imagined of it.
    dry.hear(Signal(7 * MS, MOVED, 0, 7, 3, PteKind.PAGECACHE), 3)
    dry.hear(Signal(7 * MS, EVICTED, 0, 7, 4, PteKind.PAGECACHE), 3)
    assert list(dry.resident) == []


def test_a_page_demoted_in_imagination_is_touched_on_the_medium() -> None:
    dry = DryRun(make_policy("clock", [("high", 75), ("low", 50), ("stay_ms", 0)], 4), 4)
    for page in range(3):
        dry.hear(Signal(MS, MOVED, 0, 7, page, PteKind.PAGECACHE), page + 1)
    assert (dry.would.demoted, dry.would.promoted) == (1, 0), "at the third of four frames"
    made = dry.hear(touch(3, 0, kind=PteKind.PAGECACHE), 3)
    assert [(move.index, move.to.value) for move in made] == [(0, "pagecache"), (1, "xip")]
    assert (dry.would.touches_of_medium, dry.would.promoted) == (1, 1)
