"""The kernel's column alone: what each event leaves mapped.

f = file page, a = private copy, ? = unknown, . = nothing.
"""

from __future__ import annotations

import numpy as np
import pytest
from t3_accounting import BASE, MM, PAGE, PID, READ, RW, Scene, fs

from xipfs.accounting import verify
from xipfs.accounting.kernel_states import ANON, BEFORE, CALLS_UNSEEN, FILE, NONE, SETTLED_NS
from xipfs.accounting.verify import Comparison
from xipfs.trace import events as ev

__all__ = ["fs"]  # a fixture

CHILD = MM + 1


@pytest.fixture
def scene(fs: object) -> Scene:
    made = Scene(fs)  # type: ignore[arg-type]
    made.file("XXXXXXXX")
    return made


def picture(scene: Scene, mm: int = MM, at: int = BASE) -> str:
    letters = {NONE: ".", FILE: "f", ANON: "a"}
    states = (scene.books.kernel.state(mm, at + page * PAGE) for page in range(8))
    return "".join(letters.get(state, "?") for state in states)


def test_faults(scene: Scene) -> None:
    scene.run(scene.map(8, RW), scene.fault(0), scene.fault(1, write=True))
    scene.run(scene.fault(2), scene.fault(2, write=True), scene.fault(9, verdict=ev.SIGBUS, at=7))
    assert picture(scene) == "faa....."


def test_a_read_beside_another_thread_s_write_keeps_the_copy(scene: Scene) -> None:
    scene.run(scene.map(8, RW), scene.fault(0, write=True), scene.fault(0)._replace(tid=PID + 1))
    assert picture(scene) == "a......."


def test_a_shared_write_maps_the_file_page(scene: Scene) -> None:
    scene.run(scene.map(8, RW, shared=True), scene.fault(0, write=True))
    assert picture(scene) == "f......."


def test_fault_around_maps_cached_settled_pages_that_are_not_mapped(scene: Scene) -> None:
    late = SETTLED_NS + 10
    scene.run(scene.map(8, RW), scene.fault(1, write=True))
    scene.run(ev.CacheAdd(5, scene.ino, 0, 4), ev.CacheAdd(late - 1, scene.ino, 5, 2))
    scene.run(scene.fault(6))  # a fault on a page that is over shows that it is uptodate
    scene.run(ev.Around(late, MM, PID, BASE, scene.ino, 0, 7))
    #   0 cached long ago, 1 a copy, 2 and 3 as 0, 4 and 7 not cached, 5 just added, 6 faulted
    assert picture(scene) == "faff.?f."
    # What is sure once stays so, and is left to compiled code from then on.
    times = [scene.books.kernel.cached.get(scene.ino, index) for index in range(8)]
    assert times == [0, 5, 0, 0, None, late - 1, 0, None]


def test_the_page_cache_takes_file_pages_away_and_the_end_of_file_copies_too(scene: Scene) -> None:
    scene.run(scene.map(8, RW), *(scene.fault(page) for page in range(8)))
    scene.run(scene.fault(5, write=True))
    scene.run(ev.CacheDelete(0, scene.ino, 4, 2))
    assert picture(scene) == "ffff.aff"
    scene.books.cut(scene.ino, 3)
    assert picture(scene) == "fff....."


def test_zap_unmap_and_move(scene: Scene) -> None:
    scene.run(scene.map(8, RW), *(scene.fault(page) for page in range(8)))
    scene.run(scene.fault(6, write=True))
    scene.run(ev.Zap(0, MM, BASE, BASE + 2 * PAGE))
    scene.run(ev.Unmap(0, MM, BASE + 3 * PAGE, BASE + 4 * PAGE))
    assert picture(scene) == "..f.ffaf"
    new = BASE + 64 * PAGE
    scene.run(ev.Move(0, MM, BASE + 4 * PAGE, BASE + 8 * PAGE, new, new + 4 * PAGE, False))
    assert (picture(scene), picture(scene, at=new)) == ("..f.....", "ffaf....")


@pytest.mark.parametrize(("copies", "child"), [((), "........"), ((3,), "fffaf...")])
def test_fork_copies_mappings_that_ever_had_a_private_copy(
    scene: Scene, copies: tuple[int, ...], child: str
) -> None:
    scene.run(scene.map(8, RW), ev.Extent(0, MM, BASE, BASE + 8 * PAGE))
    scene.run(*(scene.fault(page) for page in range(5)))
    scene.run(*(scene.fault(page, write=True) for page in copies))
    scene.run(ev.Fork(0, MM, CHILD, PID, PID + 1, ()))
    assert picture(scene, CHILD) == child
    scene.run(ev.Exit(0, CHILD))
    assert picture(scene, CHILD) == "........"


def test_what_is_not_known_is_unknown(scene: Scene) -> None:
    scene.run(scene.map(4, READ)._replace(fresh=False), scene.fault(1))
    assert picture(scene) == "?f??....", "mapped before we watched, but for what faulted since"
    scene.run(ev.Doubt(0, MM, BASE, BASE + 2 * PAGE))
    assert picture(scene) == "????...."
    scene.books.kernel.learn(MM, BASE, FILE)
    assert picture(scene) == "f???...."
    scene.run(ev.Lost(0, 1))
    assert picture(scene) == "????...."


def test_after_a_loss_it_is_not_known_which_pages_are_cached(scene: Scene) -> None:
    """Their records may be among the lost: of those that came, and of those that went."""
    ino, late = scene.ino, 3 * SETTLED_NS
    other = BASE + 64 * PAGE
    scene.run(scene.map(8, RW), ev.CacheAdd(5, ino, 0, 4), scene.fault(1))
    scene.run(ev.Lost(10, 1), ev.CacheAdd(20, ino, 2, 2), ev.CacheDelete(30, ino, 3, 1))
    mapped = scene.map(8, RW)._replace(start=other, end=other + 8 * PAGE)
    scene.run(mapped, ev.Around(late, MM, PID, other, ino, 0, 7))
    #   2 was added since, 3 was too and went again; of the others nothing is known
    assert picture(scene, at=other) == "??f.????"
    assert verify.unknown_ranges(scene.books, MM) == [
        (BASE, BASE + 8 * PAGE),
        (other, other + 8 * PAGE),
    ]
    # What pagemap has mapped is cached.
    learned = Comparison(PID, learned=[(other, FILE), (other + PAGE, NONE)])
    verify.learn(scene.books, MM, learned)
    scene.run(ev.Zap(late, MM, other, other + 8 * PAGE))
    scene.run(ev.Around(late, MM, PID, other, ino, 0, 7))
    assert picture(scene, at=other) == "f?f.????"
    scene.run(ev.CacheDelete(late, ino, 0, 1), ev.Around(late, MM, PID, other, ino, 0, 0))
    assert picture(scene, at=other) == ".?f.????"


def test_zaps_beside_other_threads_are_not_believed(scene: Scene) -> None:
    scene.run(scene.map(8, RW), scene.fault(0), scene.fault(1)._replace(tid=PID + 1))
    scene.run(ev.Zap(0, MM, BASE, BASE + PAGE))
    assert picture(scene) == "?f......"


def test_a_thread_that_has_ended_is_beside_nobody(scene: Scene) -> None:
    scene.run(scene.map(8, RW), scene.fault(0), scene.fault(1)._replace(tid=PID + 1))
    scene.run(ev.ThreadExit(0, MM, PID + 1), ev.Zap(0, MM, BASE, BASE + PAGE))
    assert picture(scene) == ".f......"


def test_a_range_too_large_to_doubt_blurs_its_address_space(scene: Scene) -> None:
    kernel = scene.books.kernel
    kernel.doubt(MM, BASE, BASE + (5 << 20) * PAGE, BEFORE)
    assert kernel.blurred == {MM: BEFORE}
    assert picture(scene) == "........"


def test_an_answered_request_says_which_cached_pages_are_up_to_date(scene: Scene) -> None:
    kernel, ino = scene.books.kernel, scene.ino
    scene.run(scene.map(8, RW), ev.CacheAdd(100, ino, 0, 8))
    kernel.cached.answered(ino, range(2), 200)  # a READ
    kernel.cached.answered(ino, range(2, 4), 400)  # a READ that was answered after the fault-around
    kernel.cached.answered(ino, range(4, 5), 200, whole=False)  # a WRITE of some bytes of page 4
    kernel.cached.answered(ino, range(5, 6), 200, whole=False)
    kernel.cached.answered(ino, range(5, 6), 250)  # and then a READ
    scene.run(ev.Around(300, MM, PID, BASE, ino, 0, 7))
    assert picture(scene) == "ff???f??"
    scene.run(ev.Zap(500, MM, BASE, BASE + 8 * PAGE))
    scene.run(ev.Around(SETTLED_NS + 500, MM, PID, BASE, ino, 0, 7))
    assert picture(scene) == "ffff?fff", "the part of page 4 is still but a part"
    scene.run(ev.CacheDelete(0, ino, 4, 1), ev.CacheAdd(600, ino, 4, 1))
    scene.run(ev.Zap(700, MM, BASE, BASE + 8 * PAGE))
    scene.run(ev.Around(2 * SETTLED_NS, MM, PID, BASE, ino, 0, 7))
    assert picture(scene) == "ffffffff", "the page went, and the part with it"


def test_answers_are_not_kept_for_ever(scene: Scene) -> None:
    kernel, ino = scene.books.kernel, scene.ino
    scene.run(scene.map(8, RW), ev.CacheAdd(100, ino, 0, 2))
    kernel.cached.answered(ino, range(1), 200)
    kernel.cached.answered(ino, range(7, 8), SETTLED_NS + 300)
    kernel.cached.answered(ino, range(1), SETTLED_NS + 300, whole=False)
    scene.run(ev.Around(SETTLED_NS + 400, MM, PID, BASE, ino, 0, 0))
    assert picture(scene) == "f.......", "a READ long ago made it whole; a WRITE leaves it so"


def test_fork_goes_by_the_kernel_s_vmas_as_they_were_merged(scene: Scene) -> None:
    scene.run(scene.map(8, RW), ev.Extent(0, MM, BASE, BASE + 8 * PAGE))
    scene.run(*(scene.fault(page) for page in range(8)))
    scene.run(ev.Extent(0, MM, BASE + 2 * PAGE, BASE + 5 * PAGE))  # an mprotect of pages 2 to 4
    scene.run(scene.fault(6, write=True))
    scene.run(ev.Fork(0, MM, CHILD, PID, PID + 1, ()))
    assert picture(scene, CHILD) == ".....faf"
    scene.run(ev.Exit(0, CHILD), ev.Extent(0, MM, BASE + 2 * PAGE, BASE + 8 * PAGE))
    scene.run(ev.Extent(0, MM, BASE + 2 * PAGE, BASE + 4 * PAGE))  # merged, then split again
    scene.run(ev.Fork(0, MM, CHILD + 1, PID, PID + 1, ()))
    assert picture(scene, CHILD + 1) == "..ffffaf"


def test_a_moved_mapping_keeps_having_had_copies(scene: Scene) -> None:
    new = BASE + 64 * PAGE
    scene.run(scene.map(8, RW), ev.Extent(0, MM, BASE, BASE + 8 * PAGE))
    scene.run(
        scene.fault(0), scene.fault(1, write=True), ev.Zap(0, MM, BASE + PAGE, BASE + 2 * PAGE)
    )
    scene.run(ev.Move(0, MM, BASE, BASE + 8 * PAGE, new, new + 8 * PAGE, False))
    scene.run(ev.Extent(0, MM, new, new + 8 * PAGE), ev.Fork(0, MM, CHILD, PID, PID + 1, ()))
    assert picture(scene, CHILD, at=new) == "f......."


def test_fork_of_a_mapping_from_before_we_watched_is_unknown_unless_a_copy_was_seen(
    scene: Scene,
) -> None:
    old = scene.map(8, RW)._replace(fresh=False)
    scene.run(old, ev.Extent(0, MM, BASE, BASE + 8 * PAGE))
    for page in range(8):
        scene.books.kernel.learn(MM, BASE + page * PAGE, FILE if page < 4 else NONE)
    scene.run(ev.Fork(0, MM, CHILD, PID, PID + 1, ()))
    assert picture(scene, CHILD) == "????...."
    scene.run(scene.fault(5, write=True), ev.Fork(0, MM, CHILD + 1, PID, PID + 1, ()))
    assert picture(scene, CHILD + 1) == "ffff.a.."


def test_nothing_is_claimed_of_programs_whose_calls_are_unseen_nor_of_their_children(
    scene: Scene,
) -> None:
    kernel = scene.books.kernel
    scene.run(scene.map(8, RW), ev.Doubt(0, MM, 0, 1 << 64, calls_unseen=True))
    scene.run(ev.Fork(0, MM, CHILD, PID, PID + 1, ()))
    assert kernel.blurred == {MM: CALLS_UNSEEN, CHILD: CALLS_UNSEEN}


@pytest.mark.parametrize(
    ("why", "shared", "shaded"),
    [
        (ev.COPIED, False, "?a?....."),
        (ev.COPIED, True, "fff....."),
        (ev.FOREIGN, False, "????????"),
        (ev.CROSSED, False, "????????"),
    ],
)
def test_a_cloud_is_over_what_may_have_changed(
    scene: Scene, why: str, shared: bool, shaded: str
) -> None:
    scene.run(scene.map(8, RW, shared=shared), scene.fault(0), scene.fault(1, write=True))
    scene.run(scene.fault(2), ev.Cloud(0, MM, why))
    assert shades(scene) == shaded
    assert list(scene.books.kernel.doubtful) == [MM]


def test_reclaim_is_a_cloud_over_every_file_page(scene: Scene) -> None:
    scene.run(scene.map(8, RW), scene.fault(0), scene.fault(1, write=True), ev.Reclaim(0))
    assert shades(scene) == "?a......"


def shades(scene: Scene) -> str:
    states = np.array([scene.books.kernel.state(MM, BASE + page * PAGE) for page in range(8)])
    vma = scene.books.mms[MM].find_vma(BASE)
    assert vma is not None
    scene.books.kernel.shade(vma, states)
    return "".join({NONE: ".", FILE: "f", ANON: "a"}.get(state, "?") for state in states.tolist())
