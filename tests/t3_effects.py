"""What a recorded fault tells of both machines: who made the PTE, what it counts, what changed."""

from __future__ import annotations

import pytest
from t3_accounting import MM, READ, RW, Scene, fs, scene

from xipfs.accounting.effects import Effect
from xipfs.trace import events as ev

__all__ = ["fs", "scene"]  # fixtures


@pytest.fixture(autouse=True)
def detailed(scene: Scene) -> None:
    scene.books.detailed = True


def effects(scene: Scene, *events: ev.Event) -> list[Effect | None]:
    return [charge.effect for charge in scene.books.consume(events)]


def test_nobody_reads_nothing_is_told(scene: Scene) -> None:
    scene.file("X")
    scene.books.detailed = False
    assert effects(scene, scene.map(1), scene.fault(0)) == [None]


def test_reads(scene: Scene) -> None:
    scene.file("X" + "P" * 12)  # RAM has 8 frames: the first of these have lost theirs
    told = effects(scene, scene.map(13), scene.fault(0), scene.fault(1, verdict=ev.MAJOR))
    assert told == [
        Effect("mapped", "own", "special", 0, 0, 0, 0),
        # Filled for this fault: the page cache holds a reference beside the PTE's.
        Effect("mapped", "own", "counted", 2, 1, 1, 0),
    ]
    # Another address space maps the page that is resident now: one reference more.
    other = MM + 1
    told = effects(scene, scene.map(13, mm=other), scene.fault(1, mm=other, pid=101))
    assert told == [Effect("mapped", "own", "counted", 1, 1, 1, 0)]


def test_private_writes(scene: Scene) -> None:
    scene.file("XP")
    scene.books.consume([scene.map(2, RW)])
    # Not mapped before; and mapped for reading before, which the write undoes.
    assert effects(scene, scene.fault(0, write=True)) == [
        Effect("cow", "own", "counted", 1, 1, 0, 1)
    ]
    scene.books.consume([scene.fault(1, verdict=ev.MAJOR)])
    write = scene.fault(1, write=True)._replace(protection=True)
    assert effects(scene, write) == [Effect("cow", "before", "counted", 1, 1, -1, 1)]


def test_shared_writes(scene: Scene) -> None:
    scene.file("X")
    scene.books.consume([scene.map(1, RW, shared=True)])
    assert effects(scene, scene.fault(0)) == [Effect("mapped", "own", "special", 0, 0, 0, 0)]
    write = scene.fault(0, write=True)._replace(protection=True)
    assert effects(scene, write) == [Effect("mkwrite", "before", "special", 0, 0, 0, 0)]


def test_beyond_the_end(scene: Scene) -> None:
    scene.file("X")
    assert effects(scene, scene.map(2, READ), scene.fault(1, verdict=ev.SIGBUS)) == [
        Effect("sigbus", "none", "none", 0, 0, 0, 0)
    ]


def test_a_page_that_fault_around_mapped_was_there_before(scene: Scene) -> None:
    scene.file("XX")
    around = ev.Around(9, MM, 100, scene.map(2).start, scene.ino, 0, 1)
    scene.books.consume([scene.map(2, RW), ev.CacheAdd(1, scene.ino, 0, 2)])
    scene.books.kernel.cached.answered(scene.ino, range(2), 3_000_000_000)
    scene.books.consume([scene.fault(0), around._replace(time_ns=9_000_000_000)])
    write = scene.fault(1, write=True)._replace(protection=True)
    (told,) = effects(scene, write)
    assert told is not None
    assert (told.handled, told.pte_made) == ("cow", "before")
