"""Policies and their replay: known small cases, the bound, and what a policy's text claims."""

from __future__ import annotations

import ast
import collections
import functools
import gc
import json
import signal
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pytest
from live import ROOT
from media import new_medium, open_medium

from xipfs.accounting.charges import Charge, PteKind
from xipfs.errors import UsageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.fuse.deciding import Deciding
from xipfs.fuse.patience import Patience
from xipfs.migrate.decider import Decider, done, merged
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.parts import REMEMBERED_PAGES, Remembered, Residents, Watermarks
from xipfs.migrate.policy import (
    EVICTED,
    FAULT,
    HINT,
    MOVED,
    READ,
    REFUSED,
    WRITE,
    Move,
    Seen,
    Signal,
)
from xipfs.migrate.registry import (
    BUILT_IN,
    PolicyTimeout,
    Value,
    about,
    make_policy,
    policies,
)
from xipfs.migrate.steering import Steering
from xipfs.options import parse_options
from xipfs.replay.simulate import (
    TRACES,
    Access,
    optimum,
    replay,
    seeded_trace,
    where_all_is,
)

MS = 1_000_000
INO = 7
POLICY_FILES = sorted((ROOT / "xipfs" / "migrate" / "policies").glob("[a-z]*.py"))


def stream(pages: str) -> list[Access]:
    return [Access(place, int(page), write=False) for place, page in enumerate(pages)]


def made(name: str, *values: tuple[str, Value], ram_pages: int = 200) -> Decider:
    return make_policy(name, values, ram_pages)


def touch(
    time_ms: int,
    page: int,
    source: str = FAULT,
    *,
    kind: PteKind = PteKind.XIP,
    write: bool = False,
) -> Signal:
    return Signal(time_ms * MS, source, 1, INO, page, kind, write)


def hear(decider: Decider, *signals: Signal, used: int = 0) -> list[tuple[int, str]]:
    """Return the pages that the signals move, each with its new kind."""
    moves = [move for signal in signals for move in decider.hear(signal, used)]
    return [(move.index, move.to.value) for move in moves]


# The simulation


def test_fifo_and_the_optimum_on_a_stream_worked_out_by_hand() -> None:
    # FIFO, 2 frames: 1 2 | 1 hit | 3 puts 1 out | 1 puts 2 out | 2 puts 3 out.
    assert replay(stream("121312"), made("fifo"), 2).hits == 1
    assert replay(stream("121312"), made("fifo"), 2).pingpong == 0, "nothing is demoted by it"
    # Best: keep 1 throughout and let 3 pass by: hits at the third, fifth and sixth access.
    assert optimum(stream("121312"), 2) == 3


def profile_of(trace: list[Access], pages: int) -> str:
    counts = collections.Counter(access.page for access in trace)
    hottest = [{"ino": 1, "index": page} for page, _ in counts.most_common(pages)]
    return json.dumps({"hottest": hottest})


@functools.cache
def outcome(name: str, kind: str, seed: int, frames: int = 200) -> Any:
    trace = seeded_trace(kind, seed)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(profile_of(trace, frames))
        file.flush()
        values: dict[str, list[tuple[str, Value]]] = {
            "threshold": [("promote", 2)],
            "profile": [("file", file.name)],
        }
        return replay(trace, made(name, *values.get(name, []), ram_pages=frames), frames)


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_policy_beats_the_optimum(name: str) -> None:
    for kind in TRACES:
        assert outcome(name, kind, 1).hits <= best(kind)


@functools.cache
def best(kind: str) -> int:
    return optimum(seeded_trace(kind, 1), 200)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("threshold", "scan"), ("clock", "zipf"), ("tpp", "scan"), ("profile", "zipf")],
)
@pytest.mark.parametrize("frames", [50, 200, 600])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_policy_that_claims_more_hits_than_fifo_has_them(
    name: str, kind: str, seed: int, frames: int
) -> None:
    assert "than FIFO" in about(BUILT_IN[name]).replace("\n", " ")
    assert outcome(name, kind, seed, frames).hits > outcome("fifo", kind, seed, frames).hits


@pytest.mark.parametrize("frames", [50, 200, 600])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_write_hot_keeps_writes_from_the_region(seed: int, frames: int) -> None:
    kept = outcome("write-hot", "writes", seed, frames).writes_to_region
    assert kept < outcome("fifo", "writes", seed, frames).writes_to_region


def moves_back(trace: list[Access], within_ms: int, *values: tuple[str, Value]) -> int:
    """Return how many of clock's moves are of a page that moved less than ``within_ms`` before."""
    last_ns: dict[int, int] = {}
    count = 0
    run = DryRun(made("clock", *values, ram_pages=50), 50, where_all_is)
    for time_ns, page, write in trace:
        run.hear(Signal(time_ns, FAULT, 1, 1, page, PteKind.XIP, write), 0)
        for move in run.carry_out(0):
            count += time_ns - last_ns.get(move.index, -(10**12)) < within_ms * MS
            last_ns[move.index] = time_ns
    return count


@pytest.mark.parametrize("kind", TRACES)
def test_clock_moves_no_page_back_within_10_ms_unless_told_to(kind: str) -> None:
    trace = seeded_trace(kind, 1)
    assert moves_back(trace, 10) == 0
    assert moves_back(trace, 10, ("stay_ms", 0)) > 150
    # What that costs is little.
    hits = replay(trace, made("clock", ("stay_ms", 0), ram_pages=50), 50).hits
    assert 0.98 * hits < outcome("clock", kind, 1, 50).hits < hits


# Each policy by itself


def test_off_hears_nothing() -> None:
    assert made("off").signals == frozenset()
    assert hear(made("off"), touch(1, 1)) == []


def test_threshold_counts_faults_and_hint_faults_of_xip_pages() -> None:
    threshold = made("threshold", ("promote", 3))
    cow = touch(1, 1, kind=PteKind.COW)
    assert hear(threshold, touch(1, 1), cow, touch(2, 1, HINT), touch(2, 1, READ)) == []
    assert hear(threshold, touch(9000, 1)) == [(1, "pagecache")]


def test_tpp_wants_two_faults_within_its_window_and_keeps_its_rate() -> None:
    tpp = made("tpp", ("window_ms", 10), ("pages_per_s", 1))
    faults = [(0, 1), (11, 1), (21, 1), (22, 2), (23, 2), (1000, 2)]
    assert hear(tpp, *(touch(*fault) for fault in faults)) == [(1, "pagecache")]
    assert tpp.statistics().held_back["rate"] == 1
    assert hear(tpp, touch(1005, 2, HINT)) == [(2, "pagecache")]


def test_tpp_demotes_ahead_of_need_what_was_untouched_longest() -> None:
    tpp = made("tpp", ("high", 90), ("low", 70), ram_pages=10)
    came = [
        done(ms * MS, MOVED, Move(INO, page, PageKind.PAGECACHE, ""))
        for page, ms in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 600])
    ]
    assert hear(tpp, *came[:8], used=8) == []
    assert hear(tpp, touch(500, 0, kind=PteKind.PAGECACHE), used=8) == []
    # 9 of 10 frames: page 0 was touched, so 1 and 2 are the coldest; down to 7.
    assert hear(tpp, came[8], used=9) == [(1, "xip"), (2, "xip")]
    assert hear(tpp, touch(601, 3, kind=PteKind.PAGECACHE), used=9) == [], "two are on their way"


def test_clock_gives_a_second_chance() -> None:
    clock = made("clock", ("high", 75), ("low", 50), ("stay_ms", 0), ram_pages=4)
    assert hear(clock, touch(1, 1)) == [(1, "pagecache")]
    assert hear(clock, touch(1, 2, READ)) == [(2, "pagecache")]
    hear(clock, *(done(2 * MS, MOVED, Move(INO, page, PageKind.PAGECACHE, "")) for page in (1, 2)))
    hear(clock, touch(3, 1, HINT, kind=PteKind.PAGECACHE), used=2)
    # Page 1 came first but was touched since: the hand passes it and takes 2.
    assert hear(clock, touch(4, 3), used=3) == [(3, "pagecache"), (2, "xip")]


def test_write_hot_counts_write_faults_and_write_requests() -> None:
    write_hot = made("write-hot")
    request = touch(3, 1, WRITE, write=True)
    assert hear(write_hot, touch(1, 1), touch(2, 1), request) == []
    assert hear(write_hot, request) == [(1, "pagecache")]


def test_write_hot_takes_a_store_and_its_write_back_for_one_write() -> None:
    fault, request, other = (
        touch(1, page, source, write=True) for page, source in ((1, FAULT), (1, WRITE), (2, FAULT))
    )
    assert hear(made("write-hot"), fault, other, request) == []
    # A second request is another write, and so is a second fault; the write-back of both is one.
    assert hear(made("write-hot"), fault, request, request) == [(1, "pagecache")]
    assert hear(made("write-hot", ("writes", 3)), fault, fault, request) == []
    assert hear(made("write-hot"), fault, fault) == [(1, "pagecache")]
    # The fault may be known only after the request that it led to.
    late = touch(2, 1, WRITE, write=True)
    assert hear(made("write-hot"), late, fault) == []
    assert hear(made("write-hot"), late, fault, late) == [(1, "pagecache")]
    assert hear(made("write-hot"), late, touch(3, 1, write=True)) == [(1, "pagecache")]
    assert hear(made("write-hot"), fault, request, fault, request) == [(1, "pagecache")]


def test_profile_follows_its_file(tmp_path: Path) -> None:
    file = tmp_path / "hot.json"
    file.write_text('{"hottest": [{"ino": 7, "index": 3, "pgfault": 9}]}')
    profile = made("profile", ("file", str(file)))
    assert hear(profile, touch(1, 2), touch(1, 3)) == [(3, "pagecache")]
    for text, message in (
        ("[]", "is not one"),
        ('{"hottest": [{"ino": 7}]}', "is not one"),
        ("{", "is not one"),
        ("[" * 100_000, "is not one: RecursionError"),
        ('{"hottest": [{"ino": 7, "index": Infinity}]}', r"one: ValueError\('ino 7, index inf'\)"),
        ('{"hottest": [{"ino": 7, "index": -1}]}', "index -1"),
        ('{"hottest": [{"ino": 0, "index": 1}]}', "ino 0, "),
        ('{"hottest": [{"ino": 7, "index": true}]}', "index True"),
        ('{"hottest": [{"ino": 7, "index": 1.5}]}', "index 1.5"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            made("profile", ("file", str(file)))
    with pytest.raises(UsageError, match="cannot be read"):
        made("profile", ("file", str(tmp_path / "absent")))
    with pytest.raises(UsageError, match="not absolute"):
        made("profile", ("file", "hot.json"))


# Shared parts


def test_what_is_remembered_is_bounded() -> None:
    remembered = Remembered(pages_max=3)
    assert [remembered.count((1, page)) for page in (0, 0, 1, 2, 3)] == [1, 2, 1, 1, 1]
    assert (len(remembered), remembered.get((1, 0))) == (3, None), "set longest ago"
    assert remembered.count((1, 1)) == 2
    remembered.put((1, 4), 9)
    assert (remembered.get((1, 1)), remembered.get((1, 2))) == (2, None)


@pytest.mark.parametrize("name", ["threshold", "tpp", "write-hot", "clock"])
def test_a_policy_s_memory_does_not_grow_with_the_pages_that_fault(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REMEMBERED_PAGES == 1 << 16
    monkeypatch.setattr(Remembered.__init__, "__defaults__", (256,))
    values: list[tuple[str, Value]] = [("promote", 2)] if name == "threshold" else []
    decider = made(name, *values, ram_pages=16)
    for page in range(1000):
        hear(decider, touch(page, page, write=True))
        hear(decider, done(page * MS, REFUSED, Move(INO, page, PageKind.PAGECACHE, "")))
    before = objects_in(decider)
    for page in range(1000, 5000):
        hear(decider, touch(page, page, write=True))
        hear(decider, done(page * MS, REFUSED, Move(INO, page, PageKind.PAGECACHE, "")))
    assert objects_in(decider) <= before + 100


def objects_in(root: object) -> int:
    return len(reached(root))


def reached(*roots: object) -> list[object]:
    """Return what these objects refer to, code and classes not."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen: dict[int, object] = {}
    todo = list(roots)
    while todo:
        each = todo.pop()
        if id(each) not in seen and not isinstance(each, code):
            seen[id(each)] = each
            todo += gc.get_referents(each)
    return list(seen.values())


def test_pages_in_ram_are_never_more_than_frames() -> None:
    residents = Residents()
    for page in range(9):
        came = done(0, MOVED, Move(INO, page, PageKind.PAGECACHE, ""))
        residents.hear(came, Seen(4, 4))
    assert len(residents) == 4
    residents.hear(Signal(0, EVICTED, 0, INO, 8, PteKind.PAGECACHE), Seen(4, 4))
    residents.hear(done(0, MOVED, Move(INO, 7, PageKind.XIP, "")), Seen(4, 4))
    assert residents.longest_untouched(9) == [(INO, 5), (INO, 6)]
    assert residents.longest_untouched(1) == [(INO, 5)], "after a whole turn"


def test_watermarks_are_checked() -> None:
    for high, low in ((80, 80), (101, 5), (5, 0)):
        with pytest.raises(UsageError, match="percent, low below high"):
            Watermarks(high, low)
    with pytest.raises(UsageError, match="high=5 and low=90"):
        made("tpp", ("high", 5))
    for name, values, least in (("threshold", ("promote", 0), 1), ("tpp", ("stay_ms", -1), 0)):
        with pytest.raises(UsageError, match=f"expected a whole number of {least} or more"):
            made(name, values)


def test_what_the_decider_holds_back() -> None:
    fifo = made("fifo", ("pages_per_s", 2), ("stay_ms", 50))
    assert hear(fifo, touch(1, 1), touch(1, 1)) == [(1, "pagecache")]
    hear(fifo, done(2 * MS, MOVED, Move(INO, 1, PageKind.PAGECACHE, "")))
    hear(fifo, done(3 * MS, MOVED, Move(INO, 1, PageKind.XIP, "")))
    assert hear(fifo, touch(52, 1)) == [], "49 ms after its last move"
    assert hear(fifo, touch(53, 1)) == [(1, "pagecache")]
    assert hear(fifo, touch(54, 2)) == [], "the third in this second"
    hear(fifo, done(55 * MS, REFUSED, Move(INO, 1, PageKind.PAGECACHE, "")))
    assert hear(fifo, touch(1000, 1)) == [(1, "pagecache")], "a refused move is over"
    counted = fifo.statistics()
    assert (counted.asked, counted.planned) == (6, 3)
    assert counted.held_back == {"under_way": 1, "rate": 1, "stay": 1}


def test_the_end_of_a_plan_refuses_no_move_of_the_next_one() -> None:
    """A page moved, somebody moved it back, and the same is planned anew before the plan ends."""
    decider = made("fifo")
    (first,) = decider.hear(touch(1, 5), 0)
    decider.hear(done(2 * MS, MOVED, first), 1)
    decider.hear(done(3 * MS, MOVED, Move(INO, 5, PageKind.XIP, "by hand")), 0)
    (again,) = decider.hear(touch(4, 5), 0)
    assert (again.index, again.to, again.reason) == (5, PageKind.PAGECACHE, "first fault")
    assert not decider.is_under_way(first)
    assert decider.is_under_way(again)


def test_what_a_policy_sees_counts_moves_under_way_as_made() -> None:
    clock = made("clock", ram_pages=9)
    seen: list[Seen] = []
    policy = vars(clock)["_policy"]
    plan = policy.plan

    def spy(signal: Signal, now: Seen) -> list[Move]:
        seen.append(now)
        return list(plan(signal, now))

    policy.plan = spy
    page = Move(INO, 1, PageKind.PAGECACHE, "")
    evicted = Signal(4 * MS, EVICTED, 0, INO, 1, PteKind.PAGECACHE)
    hear(clock, touch(1, 1), touch(2, 9, READ, kind=PteKind.PAGECACHE), used=3)
    hear(clock, done(3 * MS, MOVED, page), used=4)
    hear(clock, evicted, touch(5, 2), done(6 * MS, REFUSED, page), used=3)
    assert [tuple(each) for each in seen] == [
        (3, 9, 0, 0, 0, 0),
        (4, 9, 0, 0, 0, 0),
        (4, 9, 1, 0, 0, 0),
        (3, 9, 1, 0, 0, 1),
        (3, 9, 1, 0, 0, 1),
        (4, 9, 1, 0, 1, 1),
    ]


def test_requests_and_faults_are_merged_by_time() -> None:
    requests = [touch(1, 1, READ), touch(5, 2, WRITE)]
    charges = [
        Charge(ms * MS, 1, INO, page, PteKind.XIP, False, False, 0, hint)
        for ms, page, hint in ((1, 10, False), (4, 11, True), (9, 12, False))
    ]
    order = [(signal.source, signal.index) for signal in merged(requests, charges)]
    assert order == [(READ, 1), (FAULT, 10), (HINT, 11), (WRITE, 2), (FAULT, 12)]


# What a policy can and cannot do


@pytest.mark.parametrize("path", POLICY_FILES, ids=lambda path: path.stem)
def test_a_policy_is_one_short_file_that_names_its_signals(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 100
    assert "\nSignals used: " in (ast.get_docstring(ast.parse(text)) or "")
    imported = {
        node.module
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xipfs")
    }
    assert imported <= {"xipfs.errors", "xipfs.migrate.policy", "xipfs.migrate.parts"}


SPY = """
from dataclasses import dataclass
HEARD = []

@dataclass
class Spy:
    SIGNALS = frozenset({"fault", "read", "write", "evicted", "moved"})

    def plan(self, signal, seen):
        HEARD.append((self, signal, seen))
        return ()

POLICY = Spy
"""


def test_nothing_that_a_policy_is_given_leads_to_the_filesystem(tmp_path: Path) -> None:
    file = tmp_path / "spy.py"
    file.write_text(SPY)
    fs = open_medium(new_medium())
    ino = fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino
    fs.write(ino, 0, bytes(4096))
    deciding = Deciding(fs, parse_options([f"policy={file}"]), None)
    deciding.page_io(1, 1, ino, 0, 0, write=True)
    deciding.charged([Charge(1, 1, ino, 0, PteKind.XIP, False, False, 0)])
    deciding.moved(ino, [0], PageKind.PAGECACHE, 5)
    deciding.evicted(ino, 0)
    (decider,) = [each for each in reached(deciding) if isinstance(each, Decider)]
    policy: Any = vars(decider)["_policy"]
    heard = policy.plan.__func__.__globals__["HEARD"]
    assert sorted(signal.source for _, signal, _ in heard) == ["evicted", "fault", "moved", "write"]
    assert any(isinstance(each, Filesystem) for each in reached(deciding))
    for each in heard:
        assert not any(isinstance(found, Filesystem) for found in reached(each))
        for given in each[1:]:
            with pytest.raises(AttributeError):
                given.time_ns = 0  # frozen: neither known fields nor new ones


@pytest.mark.expects_log
def test_a_policy_that_fails_is_off_from_then_on(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(SPY.replace("return ()", "return 1 / 0"))
    deciding = Deciding(open_medium(new_medium()), parse_options([f"policy={file}"]), None)
    deciding.charged([Charge(1, 1, 2, 0, PteKind.XIP, False, False, 0)])
    told = deciding.describe()
    assert (told["policy"], told["failure"]) == (
        "off",
        f"{file}: ZeroDivisionError('division by zero')",
    )


WRONG_REPR = """
    class Odd(Exception):
        def __repr__(self):
            raise KeyError
    raise Odd
""".replace("\n    ", "\n        ")


@pytest.mark.expects_log
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise KeyboardInterrupt", "KeyboardInterrupt()"),
        ("raise GeneratorExit", "GeneratorExit()"),
        ("raise BaseException(1)", "BaseException(1)"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("while True: pass", "PolicyTimeout('it took more than 0.05 s for one decision')"),
        (WRONG_REPR, "Odd"),
    ],
)
def test_whatever_a_policy_raises_is_its_failure(tmp_path: Path, body: str, why: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(SPY.replace("return ()", body))
    deciding = Deciding(open_medium(new_medium()), parse_options([f"policy={file}"]), None)
    deciding.patience = Patience(0.05)
    deciding.charged([Charge(1, 1, 2, 0, PteKind.XIP, False, False, 0)])
    told = deciding.describe()
    assert (told["policy"], told["failure"]) == ("off", f"{file}: {why}")


def test_an_interrupt_ends_a_replay(tmp_path: Path) -> None:
    """There it is Ctrl-C, wherever it comes; a mount's signals raise nothing in a policy."""
    file = tmp_path / "slow.py"
    file.write_text(SPY.replace("return ()", "raise KeyboardInterrupt"))
    fs = open_medium(new_medium())
    steering = Steering(fs, str(file), {}, dry=False, profile=None)
    with pytest.raises(KeyboardInterrupt):
        steering.charged([Charge(1, 1, 2, 0, PteKind.XIP, False, False, 0)])


PAGES_MAX = 68_719_476_736  # 256 TiB


@pytest.mark.expects_log
@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("5", "plan returned 5; expected an iterable of moves"),
        ("None", "plan returned None; expected an iterable of moves"),
        ("[(1, 2)]", "plan holds (1, 2); expected a Move"),
        (
            "[promote(signal.page, 7)]",
            "plan holds a move with reason 7; expected 1 to 200 printable characters",
        ),
        ("[promote(signal.page, None)]", "reason None;"),
        ("[promote(signal.page, ['a'])]", "reason ['a'];"),
        ("[promote(signal.page, '')]", "reason '';"),
        ("[promote(signal.page, chr(0xd800))]", "reason '\\\\ud800';"),
        ("[promote(signal.page, 'two\\nlines')]", "reason 'two\\\\nlines';"),
        ("[promote(signal.page, 201 * 'x')]", "reason '" + 99 * "x" + ";"),
        (
            "[promote(('a', 1), 'why')]",
            "plan holds a move with ino 'a'; expected a whole number from 1 to 2199023255551",
        ),
        ("[promote((True, 1), 'why')]", "ino True;"),
        ("[promote((0, 1), 'why')]", "ino 0;"),
        (
            "[promote((2, 1.5), 'why')]",
            f"index 1.5; expected a whole number from 0 to {PAGES_MAX - 1}",
        ),
        ("[promote((2, -1), 'why')]", "index -1;"),
        (f"[promote((2, {PAGES_MAX}), 'why')]", f"index {PAGES_MAX};"),
        ("[promote((2, 2**70), 'why')]", "index 1180591620717411303424;"),
        (
            "[promote((2, 1), 'why'), Move(2, 2, PageKind.HOLE, 'why')]",
            "plan holds a move to <PageKind.HOLE: 'hole'>; expected PageKind.PAGECACHE or",
        ),
        ("[Move(2, 2, [], 'why')]", "plan holds a move to [];"),
    ],
)
def test_a_wrong_plan_is_a_failure_and_moves_nothing(tmp_path: Path, plan: str, why: str) -> None:
    file = tmp_path / "bad.py"
    imported = "from xipfs.migrate.policy import Move, PageKind, promote\n"
    file.write_text(imported + SPY.replace("return ()", f"return {plan}"))
    deciding = Deciding(open_medium(new_medium()), parse_options([f"policy={file}"]), None)
    deciding.charged([Charge(1, 1, 2, 0, PteKind.XIP, False, False, 0)])
    told = deciding.describe()
    assert told["policy"] == "off"
    assert why in told["failure"]
    assert told["failure"].isascii()
    assert (told["planned"], deciding._plan) == (0, [])


@pytest.mark.expects_log
@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("7", "victims returned 7; expected an iterable of pages"),
        ("[3]", "victims named 3; expected (inode, index)"),
        ("[(2, 'x')]", "victims named a page with index 'x'; expected a whole number from 0 to"),
        ("[(2, 1), (2.0, 1)]", "victims named a page with ino 2.0;"),
    ],
)
def test_wrong_victims_are_a_failure(tmp_path: Path, chosen: str, why: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        SPY.replace(
            "    def plan", f"    def victims(self, count, seen): return {chosen}\n    def plan"
        )
    )
    deciding = Deciding(open_medium(new_medium()), parse_options([f"policy={file}"]), None)
    assert deciding.victims(2) == []
    assert why in deciding.describe()["failure"]


def test_no_more_victims_are_taken_than_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "many.py"
    victims = "def victims(self, count, seen): return zip(repeat(2), count_on())"
    imported = "from itertools import count as count_on, repeat\n"
    file.write_text(imported + SPY.replace("    def plan", f"    {victims}\n\n    def plan"))
    assert made(str(file)).victims(3, 0) == [(2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise KeyboardInterrupt", "KeyboardInterrupt()"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("while True: pass", "PolicyTimeout('it took more than 0.5 s for one decision')"),
        ("1 / 0", "ZeroDivisionError('division by zero')"),
    ],
)
def test_a_policy_that_cannot_be_begun_is_refused(tmp_path: Path, body: str, why: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        SPY.replace("    def plan", f"    def __post_init__(self):\n        {body}\n\n    def plan")
    )
    deciding = Deciding(open_medium(new_medium()), parse_options(["policy=fifo"]), None)
    deciding.patience = Patience(0.5)  # its file is loaded in that time, on a busy machine too
    with pytest.raises(UsageError) as refused:
        deciding.choose(str(file), {}, dry=False)
    assert str(refused.value) == f"policy {file} cannot be begun: {why}"
    assert deciding.describe()["policy"] == "fifo"


def test_an_alarm_at_the_end_of_a_decision_is_in_time_or_nothing() -> None:
    """Decisions that end around the limit, some while the alarm is being handled."""
    patience, late = Patience(0.003), 0
    for turn in range(800):
        end_ns = time.perf_counter_ns() + 2_985_000 + turn % 40 * 1000
        try:
            with patience:
                while time.perf_counter_ns() < end_ns:
                    pass
        except PolicyTimeout:
            late += 1
        assert not patience.call
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL):
            assert signal.getitimer(timer) == (0.0, 0.0)
    assert late > 0


def test_an_eviction_s_time_is_one_that_a_recording_tells_too() -> None:
    """The end of a plan that was carried out whole is in no recording: it must not be heard."""
    times: list[int] = []
    deciding = Deciding(open_medium(new_medium()), parse_options(["policy=clock"]), None)
    policy = vars(vars(deciding)["_decider"])["_policy"]

    def spy(signal: Signal, _seen: Seen) -> list[Move]:
        times.append(signal.time_ns)
        return []

    policy.plan = spy
    deciding.moved(2, [0], PageKind.PAGECACHE, 1 * MS)
    assert deciding.carried_out([Move(2, 0, PageKind.PAGECACHE, "why")], 9 * MS) == []
    deciding.evicted(2, 0)
    assert times == [1 * MS, 1 * MS]


def test_a_policy_from_a_file_and_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from xipfs.migrate.policies.fifo import Fifo as POLICY\n")
    assert replay(stream("11"), made(str(file)), 1).hits == 1
    with pytest.raises(UsageError, match="one of off, fifo, threshold, clock, tpp, write-hot, p"):
        made("lru")
    with pytest.raises(UsageError, match="policy=threshold without promote="):
        made("threshold")
    with pytest.raises(UsageError, match="policy tpp has no parameter 'rma'"):
        made("tpp", ("rma", 1))
    with pytest.raises(UsageError, match="promote=x; expected a whole number"):
        made("threshold", ("promote", "x"))
    file.write_text(SPY.replace('"fault"', '"fork"'))
    with pytest.raises(UsageError, match="expected a frozenset of evicted, fault, hint, moved"):
        made(str(file))
    file.write_text("POLICY = 5\n")
    with pytest.raises(UsageError, match="a dataclass with a method plan"):
        made(str(file))


def test_a_policy_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages that somebody installed: one has a policy, the other only says so."""
    (tmp_path / "theirs.py").write_text(
        '"""Promotes like fifo."""\nfrom xipfs.migrate.policies.fifo import Fifo\n'
    )
    for package, target in (("theirs", "theirs:Fifo"), ("broken", "absent:Policy")):
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[xipfs.policies]\n{package} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(policies().items())[-2:] == [("broken", "absent:Policy"), ("theirs", "theirs:Fifo")]
    assert replay(stream("11"), made("theirs"), 1).hits == 1
    with pytest.raises(UsageError, match="policy broken cannot be loaded: ModuleNotFoundError"):
        made("broken")


def test_the_readme_s_policy_works(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = [
        block.partition("```")[0]
        for block in readme.split("```python\n")[1:]
        if "POLICY" in block.partition("```")[0]
    ]
    assert len(code.splitlines()) <= 30
    file = tmp_path / "mine.py"
    file.write_text(code)
    decider = made(str(file), ("pages", 4))
    assert hear(decider, touch(1, 9)) == [(index, "pagecache") for index in (8, 9, 10, 11)]
    fifo, mine = made("fifo"), made(str(file))
    zipf = seeded_trace("zipf", 1)
    assert replay(zipf, mine, 200).promotions > 0 < replay(zipf, fifo, 200).promotions
