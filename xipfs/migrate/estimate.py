"""What moves would cost and save: modelled, by the arithmetic of ``stats/cost.py``.

A promotion reads the page from the region and takes a frame with its struct page; a demotion gives
both back and writes a dirty page home. Each step of up to STEP_PAGES pages commits their kinds by
one transaction. What a page in RAM saves is a medium's access at each later touch: at least one
line of 64 bytes. That is all that is counted, since nobody sees how much of a page a program uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from xipfs.fs.filesystem import Filesystem
from xipfs.fs.moving import STEP_PAGES
from xipfs.fs.types import PageKind
from xipfs.memory.profiles import Profile, load_profile
from xipfs.memory.wear import LINE_SIZE
from xipfs.migrate.engine import runs
from xipfs.units import PAGE_SIZE

#: A transaction that changes kinds: its fences; its lines, and those of each 8 entries (64 bytes
#: of the map, once in the journal and once at home).
_COMMIT_FENCES: Final = 4
_COMMIT_LINES: Final = 8
_ENTRIES_PER_LINE: Final = 8


@dataclass
class Would:
    """Pages that would move, and touches that would have been served elsewhere."""

    promoted: int = 0
    demoted: int = 0
    written_home: int = 0
    commits: int = 0
    """Transactions; of a policy at most so many: what it plans in quick order moves together."""
    evicted: int = 0
    reads_in_ram: int = 0
    writes_in_ram: int = 0
    touches_of_medium: int = 0
    """Touches of pages that would have been demoted: the loss of a demotion."""

    def cost(self, profile: Profile | None, struct_page_bytes: int) -> dict[str, Any]:
        """Return what the moves would cost and save; times where a medium is named."""
        pages = self.promoted + self.demoted
        lines = self.commits * _COMMIT_LINES + 2 * -(-pages // _ENTRIES_PER_LINE)
        fences = self.commits * _COMMIT_FENCES + (self.written_home > 0)
        read_bytes = self.promoted * PAGE_SIZE
        written_bytes = self.written_home * PAGE_SIZE + lines * LINE_SIZE
        frames = self.promoted - self.demoted - self.evicted
        answer: dict[str, Any] = {
            "modelled": True,
            "medium": None if profile is None else profile.name,
            "cost": {"nvram_read_bytes": read_bytes, "nvram_written_bytes": written_bytes},
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

    Nothing moves. Pinned pages are those that are pinned at this moment.
    """
    would, moves, already, pinned = Would(), [], 0, 0
    for ino, ranges in files:
        for pages in ranges:
            wanted = fs.wanted(ino, pages, to)
            other = PageKind.XIP if to is PageKind.PAGECACHE else PageKind.PAGECACHE
            already += len(fs.wanted(ino, pages, other))
            if to is PageKind.XIP:
                frames = {index: fs.page(ino, index) for index in wanted}
                refused = {i for i, state in frames.items() if _is_pinned(fs, state.pfn)}
                pinned += len(refused)
                wanted = [index for index in wanted if index not in refused]
                would.written_home += sum(frames[index].dirty for index in wanted)
            moves += [
                {"ino": ino, "first": first, "count": count, "to": to.value, "reason": "manual"}
                for _, first, count in runs([(ino, index) for index in wanted])
            ]
            would.commits += -(-len(wanted) // STEP_PAGES)
            if to is PageKind.PAGECACHE:
                would.promoted += len(wanted)
            else:
                would.demoted += len(wanted)
    over = fs.nr_resident_pages + would.promoted - fs.memory.ram_pages
    would.evicted = max(over, 0)
    return would, {
        "would_move": would.promoted + would.demoted,
        "already": already,
        "failed": {"pinned": pinned} if pinned else {},
        "would_evict": would.evicted,
        "moves": moves,
    }


def _is_pinned(fs: Filesystem, pfn: int | None) -> bool:
    return pfn is not None and bool(fs.memory.refcount[pfn] != 1 + fs.memory.mapcount[pfn])
