"""What moves would cost and save: modelled, by the arithmetic of ``stats/cost.py``.

A promotion reads the page from the region and takes a frame with its struct page. A demotion gives
both back, if the page is resident, and writes a dirty one home, which the first fence of the
transaction makes durable. Each chunk of a move commits its kinds by one transaction. Not counted is
what an eviction writes home: nobody knows yet which page will have to go. What a page in RAM saves
is a medium's access at each later touch: at least one line of 64 bytes. That is all that is
counted, since nobody sees how much of a page a program uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.image.journal import FENCES, flushed_lines
from xipfs.image.layout import FANOUT
from xipfs.memory.profiles import Profile, load_profile
from xipfs.memory.wear import LINE_SIZE
from xipfs.migrate.engine import IDLE_PAGES, cut, runs
from xipfs.migrate.policy import Page
from xipfs.migrate.refusals import errnos_of
from xipfs.units import PAGE_SIZE

#: Entries of the map (8 bytes each) in a line, and the journal's record of the counters: one line.
_ENTRIES_PER_LINE: Final = 8
_COUNTERS: Final = 1


@dataclass
class Would:
    """Pages that would move, and touches that would have been served elsewhere."""

    promoted: int = 0
    demoted: int = 0
    written_home: int = 0
    frames_back: int = 0
    """Frames that demoted pages gave back; those that were not resident had none."""
    commits: int = 0
    """Transactions; of a policy those of plans carried out at once, each before the next one."""
    commit_lines: int = 0
    """Lines of 64 bytes that the transactions flush."""
    evicted: int = 0
    reads_in_ram: int = 0
    writes_in_ram: int = 0
    touches_of_medium: int = 0
    """Touches of pages that would have been demoted: the loss of a demotion."""

    def commit(self, pages: Sequence[int]) -> None:
        """Count the transaction that turns the kinds of ``pages``, which ascend, of one file."""
        if not pages:
            return
        # All entries between the first and the last are written, each leaf's as one record; a leaf
        # in between that does not change is left alone.
        leaves = {page // FANOUT for page in pages}
        lines = 0
        for leaf in leaves:
            low = max(pages[0], leaf * FANOUT)
            high = min(pages[-1], leaf * FANOUT + FANOUT - 1)
            lines += high // _ENTRIES_PER_LINE - low // _ENTRIES_PER_LINE + 1
        self.commits += 1
        self.commit_lines += flushed_lines(len(leaves) + _COUNTERS, lines + _COUNTERS)

    def cost(self, profile: Profile | None, struct_page_bytes: int) -> dict[str, Any]:
        """Return what the moves would cost and save; times where a medium is named."""
        fences = self.commits * FENCES
        read_bytes = self.promoted * PAGE_SIZE
        written_bytes = self.written_home * PAGE_SIZE + self.commit_lines * LINE_SIZE
        frames = self.promoted - self.frames_back - self.evicted
        answer: dict[str, Any] = {
            "modelled": True,
            "medium": None if profile is None else profile.name,
            "cost": {
                "nvram_read_bytes": read_bytes,
                "nvram_written_bytes": written_bytes,
                "nvram_fences": fences,
            },
            "ram_bytes_more": frames * PAGE_SIZE,
            "struct_page_bytes_more": frames * struct_page_bytes,
            "saved": {"nvram_written_bytes": self.writes_in_ram * LINE_SIZE},
        }
        if profile is not None:
            dram = load_profile("dram")
            load_ns = profile.read_ns(1, LINE_SIZE) - dram.read_ns(1, LINE_SIZE)
            store_ns = profile.write_ns(1, LINE_SIZE) - dram.write_ns(1, LINE_SIZE)
            reads = self.reads_in_ram - self.touches_of_medium
            answer["cost"]["ns_estimated"] = profile.read_ns(
                self.promoted, read_bytes
            ) + profile.write_ns(fences, written_bytes)
            answer["saved"]["ns_estimated"] = reads * load_ns + self.writes_in_ram * store_ns
            answer["saved"]["load_ns_estimated"] = load_ns
            answer["saved"]["store_ns_estimated"] = store_ns
        return answer


def would_move(
    fs: Filesystem, files: list[tuple[int, list[range]]], to: PageKind
) -> tuple[Would, dict[str, Any]]:
    """Return what a migration of these pages would do now, and its outcome as ``migrate`` tells it.

    Nothing moves. Pinned pages are those that are pinned at this moment; nobody else asks the mount
    for anything meanwhile, so that each step is a large one.
    """
    would, already, pinned = Would(), 0, 0
    moves: list[Page] = []
    other = PageKind.XIP if to is PageKind.PAGECACHE else PageKind.PAGECACHE
    step = min(IDLE_PAGES, fs.memory.ram_pages)
    for ino, ranges in files:
        for pages in [chunk for each in ranges for chunk in cut(each, IDLE_PAGES)]:
            wanted = fs.wanted(ino, pages, to)
            already += len(fs.wanted(ino, pages, other))
            moving = wanted
            if to is PageKind.XIP:
                frames = {index: fs.page(ino, index) for index in wanted}
                moving = [i for i, state in frames.items() if not _is_pinned(fs, state.pfn)]
                would.written_home += sum(frames[index].dirty for index in moving)
                would.frames_back += sum(frames[index].resident for index in moving)
            pinned += len(wanted) - len(moving)
            for part in cut(range(len(wanted)), step):
                of_step = set(wanted[part.start : part.stop])
                would.commit([index for index in moving if index in of_step])
            moves += [(ino, index) for index in moving]
            if to is PageKind.PAGECACHE:
                would.promoted += len(moving)
            else:
                would.demoted += len(moving)
    over = fs.nr_resident_pages + would.promoted - fs.memory.ram_pages
    would.evicted = max(over, 0)
    failed = {"pinned": pinned} if pinned else {}
    return would, {
        "would_move": would.promoted + would.demoted,
        "already": already,
        "failed": failed,
        "failed_errno": errnos_of(failed),
        "would_evict": would.evicted,
        "moves": [
            {"ino": ino, "first": first, "count": count, "to": to.value, "reason": "manual"}
            for ino, first, count in runs(moves)
        ],
    }


def _is_pinned(fs: Filesystem, pfn: int | None) -> bool:
    return pfn is not None and bool(fs.memory.refcount[pfn] != 1 + fs.memory.mapcount[pfn])
