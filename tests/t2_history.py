"""The history of migrations: its ring, ping-pong, refaults, histograms."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from xipfs.accounting.charges import Charge, ChargeBatch, PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.books import MoveCounts, Table
from xipfs.migrate.history import PINGPONG_NS, ChunkEvent, Histogram, History
from xipfs.migrate.page_moves import PageMoves
from xipfs.migrate.policy import Move
from xipfs.mm.access import MAPS_PAGECACHE
from xipfs.stats.series import Series
from xipfs.trace.fault_batch import CELL_COLUMNS, INDEX, INO, PID, TIME

KINDS = (PageKind.XIP, PageKind.PAGECACHE)
SECOND = 1_000_000_000


def event(number: int) -> ChunkEvent:
    return ChunkEvent(number, 2, 0, 0, "xip", "manual", moved=1, durations_ns={"drain": 1000})


def test_the_ring_is_bounded_and_counts_what_it_lost() -> None:
    history = History()
    for number in range(5000):
        history.record(event(number))
    events, lost, next_number = history.since(0)
    assert (len(events), lost, next_number) == (4096, 904, 5000)
    assert (events[0].time_ns, events[-1].time_ns) == (904, 4999)
    assert history.since(5000) == ([], 0, 5000)
    events, lost, _ = history.since(4998)
    assert ([each.time_ns for each in events], lost) == ([4998, 4999], 0)


def test_the_ring_is_bounded_in_runs_and_origins_too() -> None:
    history = History()
    for number in range(20):
        told = event(number)
        # 3999 runs and one origin: 16 events have 64,000 parts, 17 would have 68,000.
        told.moved_runs = [(2 * run, 1) for run in range(3999)]
        told.by = {(None, "manual", 0): MoveCounts(demoted=3999)}
        history.record(told)
    events, lost, next_number = history.since(0)
    assert ([each.time_ns for each in events], lost) == (list(range(4, 20)), 4)
    for number in range(20, 4200):
        history.record(event(number))
    assert history.since(next_number)[1:] == (4200 - 4096 - 20, 4200)


def test_an_event_tells_which_pages_moved_whose_they_were_and_which_came_back() -> None:
    history = History()
    plan = {page: promotion(page, "tpp", "a" if page < 6 else "b", 70) for page in range(9)}
    history.moved(2, [3, 8], PageKind.XIP, 1 * SECOND)
    told = ChunkEvent(2 * SECOND, 2, 1, 8, "pagecache", "a, b", "tpp")
    history.moved(2, [2, 3, 4, 6, 8], PageKind.PAGECACHE, 2 * SECOND, plan, told)
    history.moved(2, [1], PageKind.PAGECACHE, 20 * SECOND, plan, told)
    history.refused(2, [5, 7], PageKind.PAGECACHE, plan, told)
    shown = told.describe()
    assert (shown["moved"], shown["moved_bytes"], shown["pingpong"]) == (6, 6 * 4096, 2)
    assert shown["moved_runs"] == [(2, 3), (6, 1), (8, 1), (1, 1)], "in the order in which they did"
    assert shown["by"] == [
        {"policy": "tpp", "reason": "a", "pid": 70, "moved": 4, "failed": 1, "pingpong": 1},
        {"policy": "tpp", "reason": "b", "pid": 70, "moved": 2, "failed": 1, "pingpong": 1},
    ]


def promotion(index: int, policy: str, reason: str, pid: int) -> Move:
    return Move(2, index, PageKind.PAGECACHE, reason, policy, pid)


def test_moves_are_counted_by_cause_file_and_process() -> None:
    history = History()
    plan = {5: promotion(5, "tpp", "2 faults", 70), 6: promotion(6, "tpp", "2 faults", 71)}
    history.moved(2, [5], PageKind.PAGECACHE, 1 * SECOND, plan)
    history.moved(2, [9], PageKind.PAGECACHE, 1 * SECOND)
    history.refused(2, [6], PageKind.PAGECACHE, plan)
    history.moved(2, [5], PageKind.XIP, 2 * SECOND)
    charge = Charge(3 * SECOND, 72, 2, 9, PteKind.PAGECACHE, False, False, 0)
    history.charged([charge, charge])
    none = {
        "promoted": 0,
        "demoted": 0,
        "moved_bytes": 0,
        "failed": 0,
        "refaults": 0,
        "pingpong": 0,
    }
    one = {"promoted": 1, "moved_bytes": 4096}
    told = history.describe()
    by_cause = {(row["policy"], row["reason"], row["to"]): row for row in told["by_cause"]}
    assert by_cause == {
        key: dict[str, Any](zip(("policy", "reason", "to"), key, strict=True)) | none | counts
        for key, counts in {
            ("tpp", "2 faults", "pagecache"): one | {"failed": 1},
            (None, "manual", "pagecache"): one | {"refaults": 1},
            (None, "manual", "xip"): {"demoted": 1, "moved_bytes": 4096, "pingpong": 1},
        }.items()
    }
    file = {"promoted": 2, "demoted": 1, "moved_bytes": 3 * 4096, "failed": 1, "refaults": 1}
    assert told["by_file"] == [{"ino": 2, **file, "pingpong": 1}]
    assert {row["pid"]: row for row in told["by_process"]} == {
        0: {"pid": 0} | none | one | {"demoted": 1, "moved_bytes": 2 * 4096, "pingpong": 1},
        70: {"pid": 70} | none | one,
        71: {"pid": 71} | none | {"failed": 1},
        72: {"pid": 72} | none | {"refaults": 1},
    }
    assert told["moved_bytes"] == 3 * 4096
    page = {"ino": 2} | none
    assert history.pages.most_moved(2) == [
        page | {"index": 5, "promoted": 1, "demoted": 1, "moved_bytes": 2 * 4096, "pingpong": 1},
        page | {"index": 6, "failed": 1},
    ]
    assert len(history.pages.most_moved(9)) == 3


def test_what_a_dry_policy_would_move_is_told_and_counts_nowhere() -> None:
    history = History()
    history.would(9, [promotion(7, "fifo", "why", 70), promotion(6, "fifo", "why", 70)])
    history.would(9, [promotion(9, "fifo", "why", 70)])
    events, _, _ = history.since(0)
    told = [(each.first, each.last, each.would_move, each.moved, each.policy) for each in events]
    assert told == [(6, 7, 2, 0, "fifo"), (9, 9, 1, 0, "fifo")]
    assert all(event.dry for event in events)
    nothing = {"moved": 0, "failed": 0, "pingpong": 0}
    origin = {"policy": "fifo", "reason": "why", "pid": 70}
    assert [event.describe()["by"] for event in events] == [[origin | nothing]] * 2
    figures = history.describe()
    assert (figures["chunks"], figures["by_cause"], figures["by_file"]) == (0, [], [])


def test_a_table_sums_up_what_it_does_not_keep_apart() -> None:
    table: Table[int] = Table(lines_max=2)
    for key in (1, 2, 1, 3):
        table.line(key).demoted += 1
    rows = [(row["ino"], row["demoted"]) for row in table.describe(("ino",))]
    assert rows == [(1, 2), (3, 1), (None, 1)], "2 was unchanged for longest"


def test_a_snapshot_sums_up_the_files_that_it_does_not_show() -> None:
    history = History()
    for ino in range(2, 62):
        history.moved(ino, list(range(ino)), PageKind.PAGECACHE, 1)
    told = history.describe()
    assert [row["ino"] for row in told["by_file"]] == [*range(61, 11, -1), None]
    # 2 + 3 + ... + 11
    assert (told["by_file"][-1]["promoted"], told["by_file_left_off"]) == (65, 10)
    assert sum(row["promoted"] for row in told["by_file"]) == sum(range(2, 62))
    processes = [(row["pid"], row["promoted"]) for row in told["by_process"]]
    assert (processes, told["by_process_left_off"]) == ([(0, sum(range(2, 62)))], 0)
    table: Table[int] = Table(lines_max=2)
    for key in range(5):
        table.line(key).failed += 1
    assert (table.left_off(2), table.left_off(1)) == (3, 4)
    assert table.total() == MoveCounts(failed=5)


def batch_of(charges: list[Charge]) -> ChargeBatch:
    """Return the charges as arrays; every hint fault, and each fifth, was charged by hand."""
    cells = np.zeros((len(charges), CELL_COLUMNS), np.int64)
    kind = np.full(len(charges), MAPS_PAGECACHE, np.int64)
    by_hand = {}
    for place, charge in enumerate(charges):
        columns = [TIME, PID, INO, INDEX]
        cells[place, columns] = charge.time_ns, charge.pid, charge.ino, charge.page
        if charge.hint or place % 5 == 0:
            by_hand[place], kind[place] = charge, -1
    zeros = np.zeros(len(charges), np.int64)
    return ChargeBatch(cells, kind, zeros, zeros, by_hand)


def test_a_batch_of_faults_counts_as_its_faults_one_by_one() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}: chance = random.Random({seed}) plays it again")
    chance = random.Random(seed)
    one_by_one, at_once = History(), History()
    for history in (one_by_one, at_once):
        history.pages = PageMoves(PINGPONG_NS, blocks_max=5)
    now_ns = 1000
    for _ in range(200):
        now_ns += 1000
        ino, first, to = chance.randrange(2, 5), chance.randrange(600), chance.choice(KINDS)
        pages = list(range(first, first + chance.choice((1, 3, 70))))
        plan = {page: Move(ino, page, to, chance.choice("ab"), "p", 7) for page in pages[::2]}
        charges = []
        for _ in range(chance.randrange(60)):
            page = chance.choice((first + chance.randrange(4), chance.randrange(700)))
            time_ns = now_ns + chance.choice((-1500, -1, 0, 1, 700))
            charges.append(
                Charge(
                    time_ns, chance.randrange(70, 75), chance.randrange(2, 6), page,
                    PteKind.PAGECACHE, False, False, 0, chance.random() < 0.2,
                )
            )  # fmt: skip
        for history in (one_by_one, at_once):
            history.moved(ino, pages[::2], to, now_ns, plan)
            history.moved(ino, pages[1::2], to, now_ns)
        one_by_one.charged(charges)
        at_once.charged(batch_of(charges))
        assert at_once.describe() == one_by_one.describe()
        assert at_once.pages.most_moved(9999) == one_by_one.pages.most_moved(9999)
    assert one_by_one.refaults > 100
    assert one_by_one.pages.forgotten > 100
    assert {row["reason"] for row in one_by_one.describe()["by_cause"]} == {"a", "b", "manual"}


def test_pages_are_forgotten_by_blocks() -> None:
    pages = PageMoves(SECOND, blocks_max=2)
    for number in range(3):
        assert pages.moved(2, [number * 256, number * 256 + 255], PageKind.XIP, 1, 7) == 0
    assert pages.forgotten == 2
    assert pages.moved(2, [0, 256], PageKind.PAGECACHE, 2, 7) == 1, "page 0 is forgotten"
    assert [pages.faulted(2, page, 3) for page in (0, 256, 256, 512)] == [7, 7, None, None]
    assert pages.moved(2, [512], PageKind.PAGECACHE, 2, 7) == 0, "so is 512"
    assert [pages.faulted(2, page, 3) for page in (0, 512)] == [None, 7]


@pytest.mark.parametrize("seed", range(5))
def test_pages_moved_one_by_one_or_together_are_the_same(seed: int) -> None:
    """A single page does not go through the arrays."""
    choose = random.Random(seed)
    singly, together = PageMoves(SECOND), PageMoves(SECOND)
    now_ns = 0
    for cause in range(200):
        now_ns += choose.randrange(SECOND // 2)
        to = choose.choice([PageKind.XIP, PageKind.PAGECACHE])
        pages = sorted(choose.sample(range(4 * 256), choose.randint(2, 5)))
        back = sum(singly.moved(2, [page], to, now_ns, cause) for page in pages)
        assert back == together.moved(2, pages, to, now_ns, cause)
        page = choose.choice(pages)
        assert singly.faulted(2, page, now_ns + 1) == together.faulted(2, page, now_ns + 1)
    assert singly.most_moved(2000) == together.most_moved(2000)


def test_a_run_of_more_blocks_than_are_kept_is_entered_before_it_is_forgotten() -> None:
    pages = PageMoves(SECOND, blocks_max=2)
    pages.moved(2, range(768), PageKind.PAGECACHE, 1, 0)
    assert pages.forgotten == 256
    assert pages.faulted(2, 0, 2) is None
    assert pages.faulted(2, 256, 2) == 0
    assert pages.faulted(2, 767, 2) == 0
    assert [row["promoted"] for row in pages.most_moved(1000)] == [1] * 512


def test_a_series_keeps_the_largest_and_grows_coarser() -> None:
    series = Series(start_ns=0)
    for ms, value in ((0, 5), (500, 2), (3000, 1), (3999, 4), (4000, 0)):
        series.add(ms * SECOND // 1000, value)
    assert series.describe() == {"start_ns": 0, "interval_ns": SECOND, "max": [5, 2, 2, 4, 4]}
    series.add(240 * SECOND, 9)
    told = series.describe()
    assert (told["interval_ns"], len(told["max"])) == (2 * SECOND, 121)
    assert (told["max"][:4], told["max"][-2:]) == ([5, 4, 4, 0], [0, 9])
    series.add(10**6 * SECOND, 1)
    assert len(series.describe()["max"]) <= 240


def test_a_page_moved_back_within_ten_seconds_is_ping_pong() -> None:
    history = History()
    history.moved(2, [5, 6], PageKind.PAGECACHE, 1 * SECOND)
    history.moved(2, [5], PageKind.XIP, 11 * SECOND)
    assert history.pingpong == 1
    history.moved(2, [6], PageKind.XIP, 11 * SECOND + 1)
    assert history.pingpong == 1, "10 s and 1 ns"
    history.moved(3, [5], PageKind.PAGECACHE, 12 * SECOND)
    assert history.pingpong == 1, "another file's page"


def test_the_first_fault_after_a_move_is_its_refault() -> None:
    history = History()
    history.moved(2, [5], PageKind.PAGECACHE, 1000)
    charges = [
        Charge(time_ns, 77, 2, page, PteKind.PAGECACHE, False, False, 0)
        for time_ns, page in ((900, 5), (1100, 6), (1200, 5), (1300, 5))
    ]
    history.charged([charges[2]._replace(hint=True)])
    assert history.refaults == 0, "a hint fault counts in pgfault_hint only"
    history.charged(charges)
    assert history.refaults == 1


def test_histogram_buckets_are_powers_of_two() -> None:
    histogram = Histogram()
    for duration_ns in (0, 1000, 1023, 1024):
        histogram.add(duration_ns)
    assert histogram.describe() == {
        "count": 4,
        "sum_ns": 3047,
        "max_ns": 1024,
        "buckets": [
            {"below_ns": 1, "count": 1},
            {"below_ns": 1024, "count": 2},
            {"below_ns": 2048, "count": 1},
        ],
    }
