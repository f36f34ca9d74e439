"""Placement: kinds, residency, eviction, promotion and demotion, and the hooks around them."""

from __future__ import annotations

import errno

import pytest
from media import RecordingMedium, new_medium, open_medium

from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.pagecache import nothing
from xipfs.fs.types import PageKind, PageRun, PageState
from xipfs.units import PageIndex

ROOT = 1
PAGE = 4096
X, P, HOLE = PageKind.XIP, PageKind.PAGECACHE, PageKind.HOLE


@pytest.fixture
def medium() -> RecordingMedium:
    return new_medium(200)


@pytest.fixture
def fs(medium: RecordingMedium) -> Filesystem:
    return open_medium(medium, ram_pages=4)


def fails(code: int) -> pytest.RaisesExc[FsError]:
    return pytest.raises(FsError, check=lambda error: error.errno == code)


def make(fs: Filesystem, kind: PageKind, pages: int, name: bytes = b"file") -> int:
    ino = fs.mknod(ROOT, name, 0o100644, 0, 0, 0).ino
    fs.set_default_kind(ino, kind)
    fs.write(ino, 0, b"".join(bytes([i + 1]) * PAGE for i in range(pages)))
    return ino


def letters(fs: Filesystem, ino: int) -> str:
    """Draw the file as ``xipfs pages`` does."""
    drawn = ""
    for run in fs.runs(ino):
        letter = {HOLE: ".", X: "X", P: "P" if run.resident else "p"}[run.kind]
        drawn += letter * run.count
    return drawn


def test_an_xip_page_has_its_block_s_frame_and_a_hole_none(fs: Filesystem) -> None:
    ino = make(fs, X, 2)
    pfns = [fs.page(ino, i).pfn for i in range(2)]
    assert pfns[0] is not None
    assert pfns[1] == pfns[0] + 1
    assert fs.memory.is_nvram(pfns[0])
    assert not fs.memory.pfn_valid(pfns[0])
    assert fs.fault_in(ino, 0) == (pfns[0], False)
    assert fs.page(ino, 2) == PageState(HOLE, False, False, None)
    with fails(errno.ENXIO):
        fs.fault_in(ino, 2)
    fs.setattr(ino, size_bytes=3 * 4096)
    assert fs.fault_in(ino, 2) is None
    assert (fs.nr_xip_pages, fs.nr_pagecache_pages, fs.nr_resident_pages) == (2, 0, 0)
    with fails(errno.EINVAL):
        fs.page(ino, -1)
    with fails(errno.EINVAL):
        fs.page(ino, 1 << 36)
    with fails(errno.EISDIR):
        fs.page(ROOT, 0)


def test_the_first_touch_fills_a_frame(fs: Filesystem, medium: RecordingMedium) -> None:
    ino = make(fs, P, 3)
    fs.close()
    fs = open_medium(RecordingMedium(medium.durable), ram_pages=4)
    assert letters(fs, ino) == "ppp"
    first = fs.fault_in(ino, 1)
    assert first is not None
    pfn, filled = first
    assert filled
    assert fs.memory.pfn_valid(pfn)
    assert fs.memory.refcount[pfn] == 1
    assert fs.page(ino, 1) == PageState(P, True, False, pfn)
    assert fs.fault_in(ino, 1) == (pfn, False)
    assert letters(fs, ino) == "pPp"
    assert bytes(fs.memory.ram_bytes_of(pfn)) == b"\x02" * PAGE


def test_a_read_leaves_its_mark_once(fs: Filesystem, medium: RecordingMedium) -> None:
    ino = make(fs, P, 3)
    fs.close()
    fs = open_medium(RecordingMedium(medium.durable), ram_pages=4)
    fs.read(ino, 0, PAGE)
    fs.fault_in(ino, 1)
    assert fs.take_fill_mark(ino, 0)
    assert not fs.take_fill_mark(ino, 0)
    assert not fs.take_fill_mark(ino, 1)  # filled by the fault itself
    fs.read(ino, 0, PAGE)
    assert not fs.take_fill_mark(ino, 0)  # it was resident


def test_the_coldest_page_goes_first(fs: Filesystem, medium: RecordingMedium) -> None:
    ino = make(fs, P, 6)
    fs.close()
    fs = open_medium(RecordingMedium(medium.durable), ram_pages=4)
    for index in (0, 1, 2, 3):
        fs.fault_in(ino, index)
    fs.touch(ino, 0)
    fs.read(ino, PAGE, 1)
    fs.fault_in(ino, 4)
    assert letters(fs, ino) == "PPpPPp"
    fs.fault_in(ino, 5)
    assert letters(fs, ino) == "PPppPP"
    assert fs.cache_statistics().evictions == 2


def test_a_dirty_page_goes_home_before_its_frame_goes(
    fs: Filesystem, medium: RecordingMedium
) -> None:
    ino = make(fs, P, 5)
    assert letters(fs, ino) == "pPPPP"
    assert b"\x01" * PAGE in medium.now
    assert b"\x02" * PAGE not in medium.now
    fs.fsync(ino)
    assert b"\x01" * PAGE in medium.durable
    assert fs.cache_statistics().written_home == 5
    assert bytes(fs.read(ino, 0, 5 * PAGE))[:PAGE] == b"\x01" * PAGE


def test_the_hooks_see_each_page_that_loses_its_frame(fs: Filesystem) -> None:
    heard: list[tuple[str | int, ...]] = []
    fs.set_hooks(
        on_unmap=lambda ino, first, count: heard.append(("unmap", ino, first, count)),
        on_evict=lambda ino, index: heard.append(("evict", ino, index)),
        on_cut=lambda ino, first: heard.append(("cut", ino, first)),
    )
    ino = make(fs, P, 5)
    # What stood for the holes, and the victim.
    assert heard == [("unmap", ino, 0, 5), ("unmap", ino, 0, 1), ("evict", ino, 0)]
    heard.clear()
    fs.demote(ino, 2)
    assert heard == [("unmap", ino, 2, 1)]
    heard.clear()
    fs.setattr(ino, size_bytes=3 * PAGE + 1)
    assert heard == [("cut", ino, 4), ("unmap", ino, 4, 1)]
    heard.clear()
    fs.unlink(ROOT, b"file")
    assert heard == [("cut", ino, 0), ("unmap", ino, 1, 1), ("unmap", ino, 3, 1)]


def test_a_pinned_page_is_passed_over(fs: Filesystem) -> None:
    ino = make(fs, P, 4)
    pinned = fs.page(ino, 0).pfn
    assert pinned is not None
    fs.memory.get_page(pinned)
    fs.write(ino, 4 * PAGE, b"x" * PAGE)
    assert letters(fs, ino) == "PpPPP"
    with fails(errno.EAGAIN):
        fs.demote(ino, 0)
    assert fs.page(ino, 0).kind is P
    fs.memory.put_page(pinned)
    assert fs.demote(ino, 0)


def test_with_every_frame_pinned_bytes_still_come_and_go(fs: Filesystem) -> None:
    ino = make(fs, P, 5)
    xip = make(fs, X, 1, b"xip")
    pins = [fs.page(ino, i).pfn for i in range(1, 5)]
    for pfn in pins:
        assert pfn is not None
        fs.memory.get_page(pfn)
    assert bytes(fs.read(ino, 0, PAGE)) == b"\x01" * PAGE
    fs.write(ino, 100, b"straight home")
    assert bytes(fs.read(ino, 100, 13)) == b"straight home"
    assert letters(fs, ino) == "pPPPP"
    with fails(errno.ENOMEM):
        fs.fault_in(ino, 0)
    before = fs.page(xip, 0)
    with fails(errno.ENOMEM):
        fs.promote(xip, 0)
    assert fs.page(xip, 0) == before


def test_a_page_mapped_by_the_model_is_unmapped_before_it_goes(fs: Filesystem) -> None:
    ino = make(fs, P, 4)
    mapped = fs.page(ino, 0).pfn
    assert mapped is not None
    fs.memory.get_page(mapped)
    fs.memory.mapcount[mapped] += 1
    zapped: list[int] = []

    def unmap(_ino: int, index: int, count: int) -> None:
        zapped.extend(range(index, index + count))
        if index == 0 and fs.memory.mapcount[mapped]:
            fs.memory.mapcount[mapped] -= 1
            fs.memory.put_page(mapped)

    fs.set_hooks(on_unmap=unmap, on_evict=lambda *_: None, on_cut=lambda *_: None)
    fs.write(ino, 4 * PAGE, b"x" * PAGE)
    assert zapped == [4, 0]
    assert letters(fs, ino) == "pPPPP"


@pytest.mark.parametrize("start", [X, P])
def test_moving_a_page_moves_no_byte_no_size_no_time_and_no_block(
    fs: Filesystem, medium: RecordingMedium, start: PageKind
) -> None:
    ino = make(fs, start, 3)
    fs.write(ino, 3 * PAGE, b"end")
    before, free = fs.getattr(ino), fs.statfs().blocks_free
    content = bytes(fs.read(ino, 0, 4 * PAGE))
    there, back = (fs.promote, fs.demote) if start is X else (fs.demote, fs.promote)
    assert [there(ino, i) for i in range(4)] == [True] * 4
    assert not there(ino, 0)
    assert not there(ino, 9)  # a hole
    assert letters(fs, ino) == ("PPPP" if start is X else "XXXX")
    assert bytes(fs.read(ino, 0, 4 * PAGE)) == content
    assert (fs.getattr(ino), fs.statfs().blocks_free) == (before, free)
    assert back(ino, 1)
    assert (fs.nr_xip_pages, fs.nr_pagecache_pages) == ((1, 3) if start is X else (3, 1))
    fs.close()
    again = open_medium(RecordingMedium(medium.durable))
    assert letters(again, ino) == ("pXpp" if start is X else "XpXX")
    assert bytes(again.read(ino, 0, 4 * PAGE)) == content
    assert again.getattr(ino) == before


def test_promoting_with_ram_full_evicts_the_coldest(fs: Filesystem) -> None:
    cold = make(fs, P, 4, b"cold")
    ino = make(fs, X, 1)
    assert fs.promote(ino, 0)
    assert letters(fs, ino) == "P"
    assert letters(fs, cold) == "pPPP"


def test_a_demoted_dirty_page_is_durable(fs: Filesystem, medium: RecordingMedium) -> None:
    ino = make(fs, P, 1)
    fs.write(ino, 5, b"late change")
    assert fs.demote(ino, 0)
    assert b"\x01\x01\x01late change\x01" in medium.durable
    assert fs.nr_resident_pages == 0


def test_new_files_take_the_kind_of_their_directory(medium: RecordingMedium) -> None:
    fs = open_medium(new_medium(200, pagecache=True))
    ino = fs.mknod(ROOT, b"a", 0o100644, 0, 0, 0).ino
    fs.write(ino, 0, b"x")
    assert fs.page(ino, 0).kind is P
    sub = fs.mkdir(ROOT, b"sub", 0o755, 0, 0).ino
    fs.set_default_kind(sub, X)
    ino = fs.mknod(sub, b"b", 0o100644, 0, 0, 0).ino
    fs.write(ino, 0, b"x")
    assert fs.page(ino, 0).kind is X
    with fails(errno.EINVAL):
        fs.set_default_kind(sub, HOLE)


def test_runs_cover_the_file_to_its_end(fs: Filesystem) -> None:
    ino = make(fs, X, 3)
    fs.write(ino, 5 * PAGE, b"x")
    fs.set_default_kind(ino, P)
    fs.write(ino, 600 * PAGE, b"x" * 2 * PAGE)
    fs.promote(ino, 1)
    fs.setattr(ino, size_bytes=(1 << 40) + 1)
    assert list(fs.runs(ino)) == [
        PageRun(PageIndex(0), 1, X, False),
        PageRun(PageIndex(1), 1, P, True),
        PageRun(PageIndex(2), 1, X, False),
        PageRun(PageIndex(3), 2, HOLE, False),
        PageRun(PageIndex(5), 1, X, False),
        PageRun(PageIndex(6), 594, HOLE, False),
        PageRun(PageIndex(600), 2, P, True),
        PageRun(PageIndex(602), (1 << 28) + 1 - 602, HOLE, False),
    ]
    empty = fs.mknod(ROOT, b"empty", 0o100644, 0, 0, 0).ino
    assert list(fs.runs(empty)) == []


def test_a_range_moves_but_for_its_pinned_pages_and_holes(fs: Filesystem) -> None:
    ino = make(fs, P, 4)
    fs.write(ino, 6 * PAGE, b"far")
    fs.move(ino, range(7), P)
    pfn = fs.fault_in(ino, 2)
    assert pfn is not None
    fs.memory.get_page(pfn[0])
    result = fs.move(ino, range(7), X)
    assert (result.moved, result.already, result.refused) == ([0, 1, 3, 6], 0, {errno.EAGAIN: [2]})
    assert letters(fs, ino) == "XXPX..X"
    fs.memory.put_page(pfn[0])
    result = fs.move(ino, range(7), X)
    assert (result.moved, result.already, result.refused) == ([2], 4, {})
    assert bytes(fs.read(ino, 0, 4 * PAGE)) == b"".join(bytes([i + 1]) * PAGE for i in range(4))


def test_a_range_wider_than_ram_goes_through_it(fs: Filesystem) -> None:
    ino = make(fs, X, 10)
    assert fs.move(ino, range(10), P).moved == list(range(10))
    assert letters(fs, ino) == "ppppppPPPP"
    assert fs.move(ino, range(1, 9), X).moved == list(range(1, 9))
    assert letters(fs, ino) == "pXXXXXXXXP"
    assert bytes(fs.read(ino, 0, 10 * PAGE)) == b"".join(bytes([i + 1]) * PAGE for i in range(10))


def test_a_range_is_one_transaction(fs: Filesystem, medium: RecordingMedium) -> None:
    ino = make(fs, X, 4)
    before = medium.fences
    fs.move(ino, range(4), P)
    assert medium.fences - before == 4
    before = medium.fences
    fs.move(ino, range(4), X)
    assert medium.fences - before == 4, "clean frames are not written"


def test_promotion_where_frames_are_pinned_moves_what_fits(fs: Filesystem) -> None:
    cached = make(fs, P, 3, b"cached")
    ino = make(fs, X, 4)
    for index in range(3):
        pfn = fs.fault_in(cached, index)
        assert pfn is not None
        fs.memory.get_page(pfn[0])
    result = fs.move(ino, range(4), P)
    assert (result.moved, result.refused) == ([0], {errno.ENOMEM: [1, 2, 3]})
    assert letters(fs, ino) == "PXXX"
    with fails(errno.ENOMEM):
        fs.memory.get_page(fs.page(ino, 0).pfn or 0)
        fs.promote(ino, 1)


def test_write_back_takes_the_longest_dirty_and_keeps_them_resident(
    fs: Filesystem, medium: RecordingMedium
) -> None:
    ino = make(fs, P, 3)
    assert fs.nr_dirty_pages == 3
    assert fs.write_back(2) == 2
    assert [fs.page(ino, index).dirty for index in range(3)] == [False, False, True]
    assert bytes([2]) * PAGE in bytes(medium.now)
    assert fs.write_back(5, older_ns=1 << 60) == 0
    assert (fs.write_back(5), fs.nr_dirty_pages, letters(fs, ino)) == (1, 0, "PPP")
    fs.write(ino, 0, b"again")
    fs.setattr(ino, size_bytes=0)
    assert fs.nr_dirty_pages == 0


def test_runs_with_bytes_are_those_of_the_range_and_the_file(fs: Filesystem) -> None:
    ino = make(fs, X, 3)
    fs.write(ino, 5 * PAGE, b"x")
    fs.set_default_kind(ino, P)
    fs.write(ino, 511 * PAGE, b"x" * 2 * PAGE)  # over the end of a leaf
    fs.promote(ino, 1)
    fs.setattr(ino, size_bytes=(1 << 40) + 1)
    assert list(fs.runs_with_bytes(ino, range(1 << 30))) == [
        range(3),
        range(5, 6),
        range(511, 513),
    ]
    assert list(fs.runs_with_bytes(ino, range(1, 512))) == [
        range(1, 3),
        range(5, 6),
        range(511, 512),
    ]
    assert list(fs.runs_with_bytes(ino, range(512, 513))) == [range(512, 513)]
    assert list(fs.runs_with_bytes(ino, range(4, 5))) == []
    assert list(fs.runs_with_bytes(ino, range(1 << 28, 1 << 29))) == []


def test_the_policy_chooses_who_goes_first_and_the_coldest_follow(
    fs: Filesystem, medium: RecordingMedium
) -> None:
    ino = make(fs, P, 4)
    wanted: list[tuple[int, int]] = []
    asked: list[int] = []

    def choose(count: int) -> list[tuple[int, int]]:
        asked.append(count)
        return wanted

    fs.set_hooks(on_unmap=lambda *_: None, on_evict=nothing, on_cut=nothing, chooser=choose)
    wanted = [(ino, 2)]
    fs.write(ino, 4 * PAGE, b"5" * PAGE)
    assert letters(fs, ino) == "PPpPP"
    assert b"\x03" * PAGE in medium.now, "what was dirty went home first"
    # Not resident, no file, twice: passed over; then comes the coldest.
    wanted = [(ino, 2), (99, 0), (ino, 3), (ino, 3)]
    other = make(fs, X, 2, b"other")
    fs.move(other, range(2), P)
    assert letters(fs, ino) == "pPppP"
    statistics = fs.cache_statistics()
    assert (statistics.evictions, statistics.evictions_chosen) == (3, 2)
    assert asked == [1, 2]
    # A pinned one stays, whoever names it.
    pinned = fs.page(ino, 1).pfn
    assert pinned is not None
    fs.memory.get_page(pinned)
    wanted = [(ino, 1)]
    fs.write(ino, 5 * PAGE, b"6" * PAGE)
    assert letters(fs, ino) == "pPpppP"
    assert (letters(fs, other), fs.cache_statistics().evictions_chosen) == ("PP", 2)
