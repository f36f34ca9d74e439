"""One consistent snapshot of a mount's figures, as the JSON of ``xipfs stat`` and ``.xipfs``.

The caller has drained the observer and awaits nothing while this runs, so every number is of one
moment. ``vmstat`` is the modelled machine's, ``kernel`` what the real one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from xipfs.accounting.accountant import Accountant
from xipfs.fs.filesystem import Filesystem
from xipfs.units import PAGE_SIZE

SCHEMA: Final = 1


@dataclass(frozen=True)
class ObserverFigures:
    """What the observer of any mode can tell; ``reason``: why it is not the exact one."""

    mode: str
    events: int = 0
    lost: int = 0
    unfollowed: dict[str, int] | None = None
    reason: str = ""
    faults: int | None = None
    major: int | None = None
    minor: int | None = None
    missing: dict[str, str] | None = None
    buffer_bytes: int = 0
    undecoded_bytes: int = 0


def vmstat(fs: Filesystem, accountant: Accountant, migration: Mapping[str, int]) -> dict[str, int]:
    """Return the modelled machine's counters, named as in /proc/vmstat where it has them.

    ``migration`` are the engine's totals, which come between faults and pages.
    """
    machine = accountant.machine.statistics()
    cache = fs.cache_statistics()
    return {
        **vars(accountant.ledger.total),
        **migration,
        "pgevict": cache.evictions,
        "pgevict_policy": cache.evictions_chosen,
        "pgwriteback": cache.written_home,
        "nr_xip_pages": fs.nr_xip_pages,
        "nr_pagecache_pages": fs.nr_pagecache_pages,
        "nr_resident_pages": fs.nr_resident_pages,
        "nr_special_ptes": machine.nr_special_ptes,
        "nr_normal_ptes": machine.nr_normal_ptes,
        "nr_anon_pages": machine.nr_anon_pages,
    }


def memory(fs: Filesystem) -> dict[str, int]:
    """Return sizes of the modelled physical memory in bytes."""
    frames = fs.memory.statistics()
    return {
        "page_size_bytes": PAGE_SIZE,
        "struct_page_bytes": frames.struct_page_bytes,
        "memmap_bytes": frames.memmap_bytes,
        "memmap_saved_bytes": frames.memmap_saved_bytes,
        "ram_bytes": frames.ram_pages * PAGE_SIZE,
        "nvram_bytes": frames.nvram_pages * PAGE_SIZE,
    }


def processes(accountant: Accountant) -> list[dict[str, Any]]:
    """Return one object for each address space that was charged, oldest first."""
    return [
        {
            "pid": line.pid,
            "comm": line.comm,
            "exited": line.exited,
            "incomplete": line.incomplete,
            **vars(line.faults),
        }
        for line in accountant.ledger.lines()
    ]


def unfollowed(observer: ObserverFigures, accountant: Accountant) -> dict[str, int]:
    """Return what is not followed, from both the observer and the model's side."""
    return {**(observer.unfollowed or {}), **accountant.unfollowed}


def named(accountant: Accountant, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows about processes with their names, where these are known."""
    names = {line.pid: line.comm for line in accountant.ledger.lines()} | {0: "(no process)"}
    return [{"pid": row["pid"], "comm": names.get(row["pid"], ""), **row} for row in rows]
