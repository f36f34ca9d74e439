"""What the control directory answers: a mount's snapshot, a file's pages."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from xipfs import __version__
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind, PageRun
from xipfs.migrate.estimate import would_move
from xipfs.migrate.refusals import errnos_of
from xipfs.stats import snapshot
from xipfs.stats.cost import cost
from xipfs.units import PageIndex, pages_of

if TYPE_CHECKING:
    from xipfs.fuse.live import Live

_LETTERS: Final = {PageKind.HOLE: ".", PageKind.XIP: "X", PageKind.PAGECACHE: "p"}


def live_snapshot(live: Live) -> dict[str, Any]:
    """Return the object of ``stats.json``; ``kernel`` is null where the observer cannot know."""
    figures = live.observer.figures()
    engine, history = live.engine.statistics(), live.migrator.history.describe()
    return {
        "schema": snapshot.SCHEMA,
        "version": __version__,
        "vmstat": snapshot.vmstat(live.fs, live.accountant, engine.totals()),
        "kernel": {
            "faults": figures.faults,
            "major": figures.major,
            "minor": figures.minor,
            "around": live.accountant.around_pages,
            "hinted": 0 if live.hinter is None else live.hinter.pages_hinted,
        },
        "observer": {
            "mode": figures.mode,
            "events": figures.events,
            "lost": figures.lost,
            "buffer_bytes": figures.buffer_bytes,
            "undecoded_bytes": figures.undecoded_bytes,
            "unfollowed": snapshot.unfollowed(figures, live.accountant),
            "missing": figures.missing,
            "reason": figures.reason,
            "audit": asdict(live.verifier.audited),
        },
        "memory": snapshot.memory(live.fs),
        "ram_pages_used": live.ram_series.describe(),
        "writeback": vars(live.writeback.statistics()),
        "background": live.background.describe(),
        "cost": cost(live.fs, live.profile),
        "migration": {
            **live.deciding.describe(),
            "fail_reasons": engine.fail_reasons,
            "fail_errno": errnos_of(engine.fail_reasons),
            "kernel_invalidations": live.notifier.invalidations,
            **history,
            "by_process": snapshot.named(live.accountant, history["by_process"]),
        },
        "mount": {
            "image": str(live.fs.image_path),
            "label": live.fs.label,
            "mountpoint": str(live.mount.mountpoint),
            "pid": os.getpid(),
            "read_only": live.fs.read_only,
            "damage": live.fs.damage,
            "rules": live.accountant.machine.rules.name,
            "options": live.options.describe(),
        },
        "processes": snapshot.processes(live.accountant),
    }


def would_migrate(
    live: Live,
    files: list[tuple[int, list[range]]],
    gone: list[tuple[int, list[range]]],
    to: PageKind,
) -> dict[str, Any]:
    """Return what a migration would do now, what it would cost and what a touch would save."""
    would, outcome = would_move(live.fs, files, to)
    if gone:
        outcome["failed"]["gone"] = sum(len(run) for _, runs in gone for run in runs)
        outcome["failed_errno"] = errnos_of(outcome["failed"])
    return outcome | would.cost(live.profile, live.fs.memory.struct_page_bytes)


def file_pages(fs: Filesystem, ino: int) -> dict[str, Any]:
    """Return a file's pages as runs of equal letter and counts.

    refcount and mapcount are null for pages that have no struct page: XIP, not resident, holes.
    """
    size_bytes = fs.getattr(ino).size_bytes
    runs: list[dict[str, Any]] = []
    for run in fs.runs(ino):
        for piece in _pieces(fs, ino, run):
            last = runs[-1] if runs else None
            same = ("letter", "refcount", "mapcount")
            if last is not None and all(last[key] == piece[key] for key in same):
                last["count"] += piece["count"]
            else:
                runs.append(piece)
    return {"ino": ino, "size_bytes": size_bytes, "nr_pages": pages_of(size_bytes), "runs": runs}


def _pieces(fs: Filesystem, ino: int, run: PageRun) -> list[dict[str, Any]]:
    if not run.resident:
        return [_piece(run.first, run.count, _LETTERS[run.kind], None, None)]
    pieces = []
    for index in range(run.first, run.first + run.count):
        pfn = fs.page(ino, index).pfn
        assert pfn is not None, (ino, index)
        counts = int(fs.memory.refcount[pfn]), int(fs.memory.mapcount[pfn])
        pieces.append(_piece(PageIndex(index), 1, "P", *counts))
    return pieces


def _piece(
    first: int, count: int, letter: str, refcount: int | None, mapcount: int | None
) -> dict[str, Any]:
    return {
        "first": first,
        "count": count,
        "letter": letter,
        "refcount": refcount,
        "mapcount": mapcount,
    }
