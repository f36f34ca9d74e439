"""The history of migrations: its ring, ping-pong, refaults, histograms."""

from __future__ import annotations

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.history import ChunkEvent, Histogram, History

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
    assert history.describe()["moved_by_reason"] == {"manual": 5000}


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
