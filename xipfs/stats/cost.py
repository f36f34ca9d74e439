"""What the mount's use of the region would have cost on another medium: modelled, not measured.

Counted is what the modelled machine does to the region: a frame filled from a page's home is one
read of a page; lines that are flushed reach the medium before the next fence returns. Not counted
are loads that programs make through XIP mappings, which no observer sees, and READ requests for
XIP pages: they come from the real kernel's page cache, which the modelled machine does not have
for these pages.
"""

from __future__ import annotations

from typing import Any

from xipfs.fs.filesystem import Filesystem
from xipfs.memory.profiles import Profile
from xipfs.memory.wear import LINE_SIZE, LINES_PER_BLOCK
from xipfs.units import PAGE_SIZE

#: A share of the endurance below this prints as 0.
_SHARE_DIGITS = 9


def cost(fs: Filesystem, profile: Profile | None) -> dict[str, Any]:
    """Return counts, wear by block and, where a medium was named, its estimated times.

    Everything is since the mount. ``*_ns_estimated`` are sums over accesses one after another;
    ``cell_writes_block_mean`` is a block's line writes spread over its 64 lines: one line may
    have had them all, 64 times the mean.
    """
    cache, stored = fs.cache_statistics(), fs.medium.statistics()
    wear = fs.medium.wear.statistics()
    read_bytes = cache.filled * PAGE_SIZE
    written_bytes = wear.line_writes * LINE_SIZE
    answer: dict[str, Any] = {
        "modelled": True,
        "medium": None if profile is None else profile.name,
        "medium_source": None if profile is None else profile.source,
        "nvram_read_bytes": read_bytes,
        "nvram_written_bytes": written_bytes,
        "nvram_fences": stored.fences,
        "ram_frame_seconds": round(cache.ram_frame_ns / 10**9, 3),
        "struct_page_bytes_total": fs.memory.statistics().memmap_bytes,
        "wear": {
            "blocks_written": wear.blocks_written,
            "blocks_by_line_writes": {f"{n}-{2 * n - 1}": c for n, c in wear.histogram.items()},
            "hottest": [
                {
                    "block": block,
                    "line_writes": writes,
                    "cell_writes_block_mean": writes / LINES_PER_BLOCK,
                }
                for block, writes in wear.hottest
            ],
        },
    }
    if profile is not None:
        answer["read_ns_estimated"] = profile.read_ns(cache.filled, read_bytes)
        answer["write_ns_estimated"] = profile.write_ns(stored.fences, written_bytes)
        if profile.endurance_writes:
            most = wear.hottest[0][1] / LINES_PER_BLOCK if wear.hottest else 0.0
            share = most / profile.endurance_writes
            answer["wear"]["endurance_used_hottest_block_mean"] = round(share, _SHARE_DIGITS)
    return answer
