"""The two columns against the kernel and against each other.

``compare`` sets what the events led us to believe (``kernel_ptes``) against what /proc said at the
same moment; ``recount`` sets the model's PTEs against its own counters (T1 to T9) and against the
first column: a private copy is one in both. Both only count. What the first column does not know is
unknown and compared with nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.kernel_states import ANON, FILE, NONE, REASONS, UNKNOWN
from xipfs.mm.access import MAPS_ANON, maps_what
from xipfs.mm.bug import KernelBug
from xipfs.mm.fault import handle_mm_fault
from xipfs.mm.flags import FAULT_FLAG_WRITE, VM_FAULT_ERROR
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.zap import zap_page_range
from xipfs.trace import pagemap
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

#: Differences that are told one by one; all are counted.
TOLD_MAX: Final = 20
_NAMES: Final = {NONE: "none", FILE: "file", ANON: "anon"}

Ranges = dict[tuple[int, int], pagemap.Words]
"""(start, end) of a mapping -> what pagemap says of its pages."""


@dataclass(frozen=True)
class Look:
    """What /proc said of one process: its mappings, PTEs by frame number, Rss of the mount."""

    ranges: Ranges
    mapcounts: dict[int, int]
    rss_pages: int


@dataclass
class Comparison:
    """What came out for one address space, in pages."""

    pid: int
    pages_compared: int = 0
    pages_differ: int = 0
    pages_unknown: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, object]] = field(default_factory=list)
    learned: list[tuple[int, int]] = field(default_factory=list)
    """(address, state as /proc has it) of every page that was unknown or differed."""
    file_pages: list[tuple[int, int, int]] = field(default_factory=list)
    """(inode, page index, pfn) of the file pages on which both agree."""
    resident_pages: int = 0
    """Pages that /proc has mapped in the mappings we know."""


def mappings(mm: MmStruct) -> list[tuple[int, int]]:
    """Return [start, end) of the mappings that are known."""
    return [(vma.start, vma.end) for vma in mm]


def look_at(pid: int, dev: int | None, ranges: list[tuple[int, int]]) -> Look | None:
    """Read what /proc says of process ``pid``; None when it is gone. May block.

    ``dev`` is the mount's kernel device number; without it PTEs are read and nothing else.
    """
    found: Ranges = {}
    counts: dict[int, int] = {}
    for start, end in ranges:
        words = pagemap.read_pagemap(pid, start, end)
        if words is None:
            return None
        found[start, end] = words
        if dev is None:
            continue
        frames = np.unique(pagemap.pfns(words[pagemap.is_file(words)]))
        counts.update(pagemap.mapcounts(frames[frames > 0]))
    if dev is None:
        return Look(found, counts, 0)
    rss = pagemap.rss_bytes(pid, dev)
    return None if rss is None else Look(found, counts, rss // PAGE_SIZE)


def compare(books: Accountant, number: int, look: Look) -> Comparison:
    """Compare address space ``number`` with a look at it of the same moment."""
    result = Comparison(books.kernel.pids[number])
    mm = books.mms[number]
    for (start, end), words in look.ranges.items():
        states: npt.NDArray[np.int64] = np.zeros(len(words), np.int64)
        for address, state in books.kernel.populated(number, start, end):
            states[address - start >> PAGE_SHIFT] = state
        vma = mm.find_vma(start)
        assert vma is not None, (number, hex(start))
        assert vma.file is not None
        books.kernel.shade(vma, states)
        actual = np.where(pagemap.is_file(words), FILE, NONE)
        actual[pagemap.is_private(words)] = ANON
        result.resident_pages += int(np.count_nonzero(actual))
        unknown = states >= UNKNOWN
        differ = ~unknown & (states != actual)
        result.pages_compared += int(np.count_nonzero(~unknown))
        result.pages_differ += int(np.count_nonzero(differ))
        for reason, count in zip(*np.unique(states[unknown], return_counts=True), strict=True):
            result.pages_unknown[REASONS[int(reason) - UNKNOWN]] += int(count)
        for slot in np.flatnonzero(differ | unknown).tolist():
            address = start + (slot << PAGE_SHIFT)
            result.learned.append((address, int(actual[slot])))
            if differ[slot] and len(result.differences) < TOLD_MAX:
                result.differences.append(
                    {
                        "address": address,
                        "ino": vma.file.name,
                        "index": vma.pgoff_of(address),
                        "shadow": _NAMES[int(states[slot])],
                        "kernel": _NAMES[int(actual[slot])],
                    }
                )
        frames = pagemap.pfns(words)
        for slot in np.flatnonzero(~differ & ~unknown & (states == FILE)).tolist():
            address = start + (slot << PAGE_SHIFT)
            assert isinstance(vma.file.name, int)
            result.file_pages.append((vma.file.name, vma.pgoff_of(address), int(frames[slot])))
    return result


def learn(books: Accountant, number: int, result: Comparison) -> None:
    """Take over what /proc said where we knew nothing or were wrong.

    A private copy that came or went unseen comes or goes in the model too. Nothing is charged for
    it, since when and by what is not known; it is counted. What clouded the address space is over:
    ``result`` must be of all of it then.
    """
    books.kernel.clouds.pop(number, None)
    for address, state in result.learned:
        mm = books.mms[number]
        books.kernel.learn(number, address, state)
        if state == FILE and not books.kernel.cached.whole:
            _learn_cached(books, mm, address)
        if (maps_what(mm, address) == MAPS_ANON) == (state == ANON):
            continue
        books.unfollowed["private copies found or missed in pagemap, not charged"] += 1
        vma = mm.find_vma(address)
        assert vma is not None
        if state != ANON:
            zap_page_range(vma, address, address + PAGE_SIZE)
            continue
        try:
            # Not as an access, which the mapping may refuse by now: as whoever forced it did. A raw
            # page that was mapped for reading takes two.
            while maps_what(mm, address) != MAPS_ANON:
                if handle_mm_fault(mm, address, FAULT_FLAG_WRITE) & VM_FAULT_ERROR:
                    break
        except KernelBug as bug:
            books.unfollowed[f"kernel BUG by the rules: {bug.condition}"] += 1


def _learn_cached(books: Accountant, mm: MmStruct, address: int) -> None:
    """Note that a page which is mapped is cached, if nothing has told whether it is."""
    vma = mm.find_vma(address)
    assert vma is not None, hex(address)
    assert vma.file is not None, vma
    assert isinstance(vma.file.name, int), vma
    page = vma.file.name, vma.pgoff_of(address)
    if books.kernel.cached.unsure(*page):
        books.kernel.cached.settle(*page)


def unknown_ranges(books: Accountant, number: int) -> list[tuple[int, int]]:
    """Return the mappings that have pages of which nothing is known, cut to these pages."""
    if number in books.kernel.clouds:
        return mappings(books.mms[number])
    ranges = []
    for start, end in mappings(books.mms[number]):
        unknown = [at for at, state in books.kernel.populated(number, start, end) if state > ANON]
        if unknown:
            ranges.append((min(unknown), max(unknown) + PAGE_SIZE))
    return ranges


def compare_mapcounts(results: list[Comparison], looks: list[Look]) -> tuple[int, int]:
    """Return (pages compared, pages that differ): kpagecount against the PTEs of all ``results``.

    They must be all address spaces that map the files, of one moment, with nothing unknown.
    """
    ours: Counter[tuple[int, int]] = Counter()
    frame: dict[tuple[int, int], int] = {}
    for result in results:
        for ino, index, pfn in result.file_pages:
            ours[ino, index] += 1
            frame[ino, index] = pfn
    counts = {pfn: count for look in looks for pfn, count in look.mapcounts.items()}
    pages = [page for page, pfn in frame.items() if pfn in counts]
    return len(pages), sum(counts[frame[page]] != ours[page] for page in pages)


def recount(books: Accountant, numbers: list[int]) -> tuple[int, int]:
    """Recount the second column from the first; return (copies compared, copies that differ).

    A page of which either column has a private copy must have one in the other.
    """
    compared = differ = 0
    for number in numbers:
        if number in books.kernel.blurred or number in books.kernel.clouds:
            continue
        mm = books.mms[number]
        for vma in mm:
            pages = dict(books.kernel.populated(number, vma.start, vma.end))
            pages.update(
                (address, pages.get(address, NONE))
                for address, _ in mm.tables.populated(vma.start, vma.end)
            )
            for address, state in pages.items():
                copied = maps_what(mm, address) == MAPS_ANON
                if state >= UNKNOWN or not (copied or state == ANON):
                    continue
                compared += 1
                differ += copied != (state == ANON)
    return compared, differ
