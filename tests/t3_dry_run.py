"""Dry runs: what would move, what that would cost and save, compared with what moves then cost."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import trio
import trio.testing
from media import new_medium, open_medium

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind, PageState
from xipfs.fuse.deciding import Deciding
from xipfs.memory.profiles import load_profile
from xipfs.migrate.decider import COMMON, Decider
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.engine import IDLE_PAGES, Engine, cut
from xipfs.migrate.estimate import Would, would_move
from xipfs.migrate.policy import (
    DONE,
    EVICTED,
    FAULT,
    MOVED,
    READ,
    TOUCHES,
    WRITE,
    Move,
    Page,
    Seen,
    Signal,
    demote,
    promote,
)
from xipfs.migrate.registry import make_policy
from xipfs.options import parse_options
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


def test_a_demotion_gives_back_the_frames_that_there_are() -> None:
    """Of 8 pages 2 are a hole, 4 resident; a fresh mount has none resident."""
    medium = new_medium()
    fs = open_medium(medium)
    ino = file_of(fs, 3)
    fs.write(ino, 5 * PAGE, bytes(3 * PAGE))
    fs.move(ino, range(8), PageKind.PAGECACHE)
    for used in (6, 0):
        would, told = would_move(fs, [(ino, [range(8)])], PageKind.XIP)
        assert (told["would_move"], told["already"], fs.nr_resident_pages) == (6, 0, used)
        answer = would.cost(None, 64)
        assert answer["ram_bytes_more"] == -used * PAGE
        assert answer["struct_page_bytes_more"] == -used * 64
        fs = open_medium(medium)
    before = cost(fs, None)
    assert len(fs.move(ino, range(8), PageKind.XIP).moved) == 6
    assert would.cost(None, 64)["cost"] == spent(fs, before)


def test_the_arithmetic_of_costs_and_savings() -> None:
    would = Would(
        promoted=10, demoted=4, frames_back=2, written_home=1, commits=1, commit_lines=12,
        evicted=3, reads_in_ram=7, writes_in_ram=5, touches_of_medium=2,
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


Where = dict[int, PageState]
FREE = PageState(PageKind.XIP, resident=False, dirty=False, pfn=None)
HOLE = PageState(PageKind.HOLE, resident=False, dirty=False, pfn=None)
ASLEEP = PageState(PageKind.PAGECACHE, resident=False, dirty=False, pfn=None)
CLEAN = PageState(PageKind.PAGECACHE, resident=True, dirty=False, pfn=None)
DIRTY = PageState(PageKind.PAGECACHE, resident=True, dirty=True, pfn=None)


def touch(
    ms: int,
    page: int,
    *,
    kind: PteKind = PteKind.XIP,
    write: bool = False,
    source: str = FAULT,
) -> Signal:
    return Signal(ms * MS, source, 1, 7, page, kind, write)


def dry_run(policy: Decider, ram_pages: int, where: Where | None = None) -> DryRun:
    """Return a dry run over file 7, whose pages are XIP unless ``where`` says otherwise."""
    pages = {} if where is None else where

    def look(page: Page) -> PageState | None:
        return pages.get(page[1], FREE) if page[0] == 7 else None

    return DryRun(policy, ram_pages, look)


def decided(dry: DryRun, ram_pages_used: int, *signals: Signal) -> list[tuple[int, str]]:
    """Return what is moved at a decision point that is told of ``signals``."""
    for signal in signals:
        dry.hear(signal, ram_pages_used)
    return [(move.index, move.to.value) for move in dry.carry_out(ram_pages_used)]


@dataclass
class Scripted:
    """Plans the moves that it is given, at the touch of their number."""

    SIGNALS: ClassVar[frozenset[str]] = DONE | TOUCHES
    plans: list[list[Move]]
    heard: list[tuple[str, int, str]] = field(default_factory=list)

    def plan(self, signal: Signal, _seen: Seen) -> list[Move]:
        self.heard.append((signal.source, signal.index, signal.kind.value))
        return self.plans.pop(0) if signal.source in TOUCHES and self.plans else []


def scripted(*plans: list[Move]) -> tuple[Scripted, Decider]:
    policy = Scripted(list(plans))
    return policy, Decider("scripted", policy, COMMON, 16, "")


def test_a_dry_policy_goes_on_as_if_its_moves_were_made() -> None:
    dry = dry_run(make_policy("fifo", [], 4), 4)
    made = [
        decided(dry, 2, signal)
        for signal in (touch(1, 1), touch(2, 1), touch(3, 2, write=True), touch(4, 2, write=True))
    ]
    assert made == [[(1, "pagecache")], [], [(2, "pagecache")], []]
    assert (dry.would.reads_in_ram, dry.would.writes_in_ram) == (1, 1)
    # Two frames are really in use, so a third page takes the oldest one's place.
    decided(dry, 2, touch(5, 3))
    assert (list(dry.resident), dry.would.evicted) == ([(7, 2), (7, 3)], 1)
    decided(dry, 2, touch(6, 4))
    assert dry.would.written_home == 1, "page 2 was written while it was there"
    assert dry.moves == {("pagecache", "first fault"): 4}
    # What really happens to a page ends what was imagined of it.
    dry.hear(Signal(7 * MS, MOVED, 0, 7, 3, PteKind.PAGECACHE), 3)
    dry.hear(Signal(7 * MS, EVICTED, 0, 7, 4, PteKind.PAGECACHE), 3)
    assert list(dry.resident) == []


def test_a_page_demoted_in_imagination_is_touched_on_the_medium() -> None:
    policy = make_policy("clock", [("high", 75), ("low", 50), ("stay_ms", 0)], 4)
    dry = dry_run(policy, 4, dict.fromkeys(range(3), CLEAN))
    for page in range(3):
        decided(dry, page + 1, Signal(MS, MOVED, 0, 7, page, PteKind.PAGECACHE))
    assert (dry.would.demoted, dry.would.promoted) == (1, 0), "at the third of four frames"
    made = decided(dry, 3, touch(3, 0, kind=PteKind.PAGECACHE))
    assert made == [(0, "pagecache"), (1, "xip")]
    assert (dry.would.touches_of_medium, dry.would.promoted) == (1, 1)


def test_what_cannot_move_is_not_counted_and_told_as_a_real_run_tells_it() -> None:
    """Page 1 is a hole, 2 in RAM already, 3 beyond the end; file 8 is not there; 0 is XIP."""
    plan = [promote((7, index), "all") for index in range(4)]
    plan += [promote((8, 0), "all"), promote((8, 1), "all"), demote((7, 4), "back")]
    policy, decider = scripted(plan)
    dry = dry_run(decider, 16, {1: HOLE, 2: CLEAN, 3: HOLE})
    assert decided(dry, 1, touch(1, 0)) == [(0, "pagecache")]
    assert dry.moves == {("pagecache", "all"): 1}
    assert dry.failed == {"gone": 2}
    assert (dry.would.promoted, dry.would.demoted, dry.would.commits) == (1, 0, 1)
    assert dry.would.cost(None, 64)["cost"]["nvram_read_bytes"] == 4096
    assert dry.would.cost(None, 64)["ram_bytes_more"] == 4096
    assert policy.heard == [
        ("fault", 0, "xip"),
        ("moved", 0, "pagecache"),
        *(("refused", index, "pagecache") for index in (1, 2, 3, 0, 1)),
        ("refused", 4, "xip"),
    ]
    assert decider.statistics().moves_under_way == 0


def test_a_policy_that_asks_for_a_refused_page_for_ever_does_not_keep_the_mount() -> None:
    @dataclass
    class Stubborn:
        SIGNALS: ClassVar[frozenset[str]] = DONE | TOUCHES

        def plan(self, signal: Signal, _seen: Seen) -> list[Move]:
            return [promote(signal.page, "again")]

    decider = Decider("stubborn", Stubborn(), COMMON, 16, "")
    dry = dry_run(decider, 16, {0: HOLE})
    assert decided(dry, 0, touch(1, 0)) == []
    assert decider.statistics().asked == 17, "16 turns, and the next one's plan"
    assert dry.would.promoted == 0


def test_only_resident_pages_give_a_frame_back() -> None:
    """Three of five have a frame, one of them is dirty; two sleep."""
    where = {0: CLEAN, 1: DIRTY, 2: ASLEEP, 3: ASLEEP, 4: CLEAN}
    _, decider = scripted([demote((7, index), "cold") for index in range(5)])
    dry = dry_run(decider, 16, where)
    assert len(decided(dry, 3, touch(1, 0, kind=PteKind.PAGECACHE))) == 5
    assert (dry.would.demoted, dry.would.frames_back, dry.would.written_home) == (5, 3, 1)
    told = dry.would.cost(None, 64)
    assert (told["ram_bytes_more"], told["struct_page_bytes_more"]) == (-3 * 4096, -3 * 64)


def test_frames_in_imagination_through_demotion_and_back() -> None:
    """RAM has two frames, both in use: one page away makes room for one, without an eviction."""
    plans = [[demote((7, 0), "cold")], [promote((7, 5), "hot")], [promote((7, 0), "hot")]]
    _, decider = scripted(*plans)
    dry = dry_run(decider, 2, {0: CLEAN, 1: CLEAN})
    decided(dry, 2, touch(1, 9))
    decided(dry, 2, touch(2, 9))
    assert (dry.would.frames_back, dry.would.promoted, dry.would.evicted) == (1, 1, 0)
    decided(dry, 2, touch(3, 9))
    assert (dry.would.promoted, dry.would.evicted, list(dry.resident)) == (2, 1, [])


def test_a_page_that_left_with_its_file_frees_its_frame() -> None:
    where: Where = {}
    dry = dry_run(make_policy("fifo", [], 2), 2, where)
    decided(dry, 0, touch(1, 0), touch(1, 1))
    assert list(dry.resident) == [(7, 0), (7, 1)]
    where[0] = HOLE
    decided(dry, 0, touch(2, 2))
    assert (list(dry.resident), dry.would.evicted) == ([(7, 1), (7, 2)], 0)
    assert dry.would.cost(None, 64)["ram_bytes_more"] == 2 * 4096


def test_a_touch_counts_once_whatever_signals_it_makes() -> None:
    """The READ and the fault that caused it, told at one decision point or at two."""
    for together in (True, False):
        dry = dry_run(make_policy("clock", [], 64), 64)
        for page in range(16):
            signals = [touch(page, page, source=READ), touch(page, page)]
            for part in [signals] if together else [[each] for each in signals]:
                decided(dry, 0, *part)
        assert (dry.would.promoted, dry.would.reads_in_ram) == (16, 0)
        assert dry.would.cost(load_profile("pcm"), 64)["saved"]["ns_estimated"] == 0
    # Another process touches page 3, which the kernel has; then it had to be read again.
    decided(dry, 0, touch(20, 3))
    assert dry.would.reads_in_ram == 1
    decided(dry, 0, touch(21, 3, source=READ), touch(21, 3))
    assert dry.would.reads_in_ram == 2


def test_a_store_through_a_mapping_counts_once() -> None:
    """Its READ, its fault, and the WRITE that brings it home are one write."""
    dry = dry_run(make_policy("clock", [], 64), 64)
    decided(dry, 0, touch(1, 0))
    store = [touch(2, 0, source=READ), touch(2, 0, write=True)]
    decided(dry, 0, *store, touch(3, 0, source=WRITE, write=True))
    assert (dry.would.reads_in_ram, dry.would.writes_in_ram) == (0, 1)
    decided(dry, 0, touch(4, 0, source=WRITE, write=True))
    assert (dry.would.reads_in_ram, dry.would.writes_in_ram) == (0, 2), "of write(2)"


def test_what_a_decision_point_plans_moves_together() -> None:
    """32 neighbours: 4 lines of entries, 7 with the records, and the counters' line."""
    dry = dry_run(make_policy("fifo", [], 64), 64)
    decided(dry, 0, *(touch(1, page) for page in range(32)))
    # The header, 5 lines and 2 records of 24 bytes as 6 lines, the mark, 5 lines, the mark.
    assert (dry.would.commits, dry.would.commit_lines) == (1, 14)
    assert dry.would.cost(None, 64)["cost"]["nvram_fences"] == 4
    decided(dry, 0, touch(2, 40), touch(2, 42))
    assert dry.would.commits == 3, "no neighbours: two jobs"


def test_a_dry_policy_takes_turns_as_a_real_one_does() -> None:
    """What the drain of a turn's job tells of is planned for the next turn."""
    fs = open_medium(new_medium())
    ino = file_of(fs, 8)
    deciding = Deciding(fs, parse_options(["policy=fifo", "dry"]), None)

    def faults(pages: range) -> None:
        deciding.charged(Charge(1, 1, ino, at, PteKind.XIP, False, False, 0) for at in pages)

    to_come = [range(4, 7), range(7, 8)]

    async def drain() -> None:
        if to_come:
            faults(to_come.pop(0))

    async def move_all(_moves: list[Move]) -> None:
        raise AssertionError("nothing moves")

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deciding.carry_out, move_all, drain)
            faults(range(4))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(live)
    dry = deciding.describe()["dry_run"]
    assert (dry["promoted"], dry["commits"]) == (8, 3), "pages 0-3, 4-6 and 7"
    faults(range(8))
    assert deciding.describe()["dry_run"]["reads_in_ram"] == 8


def test_a_dry_policy_looks_at_the_pages_themselves() -> None:
    """Page 3 is a hole, page 4 in RAM, and inode 99 is not there."""
    fs = open_medium(new_medium())
    ino = file_of(fs, 3)
    fs.write(ino, 4 * PAGE, bytes(PAGE))
    fs.move(ino, range(4, 5), PageKind.PAGECACHE)
    deciding = Deciding(fs, parse_options(["policy=fifo", "dry"]), None)
    pages = [(ino, index) for index in (0, 1, 2, 3, 4, 5, 10**6, (1 << 36) - 1)] + [(99, 0)]
    deciding.charged(Charge(1, 1, *page, PteKind.XIP, False, False, 0) for page in pages)
    told = deciding.describe()
    assert told["would_move"] == [{"to": "pagecache", "reason": "first fault", "count": 3}]
    dry = told["dry_run"]
    assert (dry["failed"], dry["failed_errno"]) == ({"gone": 1}, {"gone": "ENOENT"})
    assert dry["cost"]["nvram_read_bytes"] == dry["ram_bytes_more"] == 12288
    assert told["moves_under_way"] == 0
