"""Hint faults: which faults answer one, and that they count in no other total.

The file is drawn a letter a page: X = XIP, P = pagecache.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from t3_accounting import BASE, MM, PAGE, PID, RW, Scene, fs, holders

from xipfs.accounting.causes import HINT
from xipfs.mm import audit
from xipfs.trace import events as ev

__all__ = ["fs"]  # a fixture


@pytest.fixture
def scene(fs: object) -> Iterator[Scene]:
    made = Scene(fs)  # type: ignore[arg-type]
    yield made
    audit.check(made.books.machine, holders=holders(made))


def hints(scene: Scene, *events: ev.Event) -> list[bool]:
    return [charge.hint for charge in scene.books.consume(events)]


def test_a_touch_after_a_hint_counts_as_nothing_else(scene: Scene) -> None:
    scene.file("XPX")
    scene.run(scene.map(3), scene.fault(0), scene.fault(1), scene.fault(2))
    ptes = scene.ptes()
    assert scene.books.mark_hints(10) == [(scene.ino, 0), (scene.ino, 1), (scene.ino, 2)]
    assert scene.ptes() == ptes, "the modelled machine lost nothing"
    # The real kernel reads the page again, which is major there.
    assert hints(scene, scene.fault(1, verdict=ev.MAJOR), scene.fault(0)) == [True, True]
    assert hints(scene, scene.fault(0)) == [False], "one hint, one answer"
    total = scene.books.ledger.total
    assert (total.pgfault, total.pgfault_hint, total.pgmajfault) == (4, 2, 0)
    assert (total.pgfault_xip, total.pgfault_pagecache, total.pgfault_extra) == (3, 1, 0)
    assert scene.books.ledger.lines()[0].faults.pgfault_hint == 2


def test_a_first_write_would_have_faulted_anyway(scene: Scene) -> None:
    scene.file("PP")
    scene.run(scene.map(2, RW), scene.fault(0), scene.fault(1))
    scene.books.mark_hints(10)
    assert scene.run(scene.fault(0, write=True)) == [("cow", False, 0)]
    assert hints(scene, scene.fault(1)) == [True]
    assert (scene.books.ledger.total.pgfault, scene.books.ledger.total.pgfault_hint) == (3, 1)


def test_private_copies_are_not_hinted(scene: Scene) -> None:
    """An invalidation does not take them, so no fault would tell of them."""
    scene.file("XP")
    scene.run(scene.map(2, RW), scene.fault(0, write=True), scene.fault(1))
    assert scene.books.mark_hints(10) == [(scene.ino, 1)]


def test_a_page_is_marked_wherever_it_is_mapped_and_told_once(scene: Scene) -> None:
    scene.file("X")
    other = MM + 1
    scene.run(scene.map(1), scene.fault(0), scene.map(1, mm=other), scene.fault(0, mm=other))
    assert scene.books.mark_hints(10) == [(scene.ino, 0)]
    assert len(scene.books.hints) == 2
    assert hints(scene, scene.fault(0), scene.fault(0, mm=other)) == [True, True]


def test_the_scan_goes_on_where_it_ended_and_begins_again(scene: Scene) -> None:
    scene.file("XXXXX")
    scene.run(scene.map(5), *(scene.fault(page) for page in range(5)))
    rounds = [[page for _, page in scene.books.mark_hints(2)] for _ in range(4)]
    assert rounds == [[0, 1], [2, 3], [4], [0, 1]]


def test_marks_go_with_the_address_space_the_mapping_and_fault_around(scene: Scene) -> None:
    scene.file("PPXX")
    scene.run(scene.map(4), *(scene.fault(page) for page in range(4)))
    scene.books.mark_hints(10)
    scene.run(ev.CacheDelete(1, scene.ino, 0, 2), ev.CacheAdd(2, scene.ino, 0, 2))
    scene.run(ev.Around(2 * 10**9, MM, PID, BASE, scene.ino, 0, 1))
    assert len(scene.books.hints) == 2, "pages 0 and 1 were mapped without a fault"
    # Unmapped and mapped anew: the model has no PTE there, the fault is an ordinary one.
    scene.run(ev.Unmap(0, MM, BASE, BASE + 4 * PAGE), scene.map(4))
    assert hints(scene, scene.fault(2)) == [False]
    scene.run(ev.Exit(0, MM))
    assert len(scene.books.hints) == 0


def test_a_page_mapped_around_before_its_invalidation_answers_the_hint_all_the_same(
    scene: Scene,
) -> None:
    """Pages are marked together and invalidated one after another; faults come in between."""
    scene.file("PP")
    scene.run(scene.map(2), ev.CacheAdd(0, scene.ino, 0, 2), scene.fault(0), scene.fault(1))
    scene.books.mark_hints(10)
    invalidation = scene.books.causes.begin(scene.ino, 0, 2, HINT, 10)
    answers = hints(
        scene,
        ev.CacheDelete(11, scene.ino, 0, 1),
        scene.fault(0),
        ev.Around(12, MM, PID, BASE, scene.ino, 0, 1),
        ev.CacheDelete(13, scene.ino, 1, 1),
        scene.fault(1),
    )
    invalidation.ended_ns = 14
    assert answers == [True, True]
    assert scene.books.ledger.total.pgfault == 2


def test_a_page_that_another_process_is_reading_is_not_mapped_around(scene: Scene) -> None:
    """Both miss it: one reads, and until it has a processor the other's fault-around passes by."""
    scene.file("XX")
    other = MM + 1
    for mm in (MM, other):
        scene.run(scene.map(2, mm=mm), scene.fault(0, mm=mm), scene.fault(1, mm=mm))
    scene.books.mark_hints(10)
    invalidation = scene.books.causes.begin(scene.ino, 0, 2, HINT, 10)
    scene.run(ev.CacheDelete(11, scene.ino, 0, 2))
    invalidation.ended_ns = 12
    scene.run(ev.CacheAdd(13, scene.ino, 0, 2))
    scene.books.kernel.cached.answered(scene.ino, range(2), 14)
    # The other's own window comes first: it had to wait for page 0, so its fault goes on after it.
    window = ev.Around(15, other, PID + 1, BASE, scene.ino, 0, 1)
    later = [scene.fault(page, mm=mm) for mm in (other, MM) for page in (0, 1)]
    assert hints(scene, window, *later) == [True] * 4
    assert (scene.books.ledger.total.pgfault, scene.books.ledger.total.pgfault_hint) == (4, 4)
