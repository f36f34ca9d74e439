"""Moving pages: bulk promotion and demotion beside numpy's copy, one page through the control file.

The bulk part runs the filesystem without a mount, on an image in the tmpfs scratch directory: what
is told is what the engine adds to copying the same bytes (frames, journal, checks). The other part
asks a live mount, on which nobody is observed, for one page at a time; the time is from writing
the request to having read the result, the kernel's invalidation included.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import files, mounts
from benchmarks.support.context import Context
from benchmarks.support.measure import Sample, compare
from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

NAME = "migrate"
HELP = "bulk moves beside numpy's copy; one page from request to reply"

BASELINE = "numpy copy"
MOVED = "moved.bin"
_MIB = 1 << 20
_PAGE = 4096


def run(context: Context) -> dict[str, Any]:
    """Measure all of it."""
    size_bytes, singles = (4 * _MIB, 50) if context.quick else (64 * _MIB, 1000)
    _, image = files.make_files(context, {MOVED: size_bytes})
    context.settings |= {"moved_bytes": size_bytes, "single_moves": singles}
    fs = Filesystem.open(image, ram_bytes=2 * size_bytes, clock=SystemClock())
    try:
        ino = fs.lookup(1, MOVED.encode()).ino
        fs.memory.ram_frames[:] = 0  # the host gives the frames now, not while a move is timed
        moves = {"promote": PageKind.PAGECACHE, "demote, clean": PageKind.XIP}
        candidates = {BASELINE: functools.partial(_copy, size_bytes)}
        candidates |= {name: functools.partial(_move, fs, ino, to) for name, to in moves.items()}
        samples = context.alternate("bulk moves", candidates)
    finally:
        fs.close()
    command = f"Filesystem.move of {size_bytes // _PAGE} pages"
    context.comparisons.append(
        compare(
            f"{size_bytes // _MIB} MiB in one call",
            samples,
            metric="ns_per_page",
            baseline=BASELINE,
            command=command,
        )
    )
    singly = context.alternate(
        "one page a request", {"one page": functools.partial(_singly, context, image, singles)}
    )
    context.comparisons.append(
        compare(
            f"{singles} requests of one page on an idle mount",
            singly,
            metric="median_us",
            baseline="one page",
            command="write and read .xipfs/control",
            also=("p99_us",),
        )
    )
    return context.results()


def _copy(size_bytes: int, _seed: int) -> Sample:
    source = np.ones((size_bytes // _PAGE, _PAGE), np.uint8)
    target = np.zeros_like(source)
    target[:] = 2
    start_ns = time.perf_counter_ns()
    target[:] = source
    return {"ns_per_page": (time.perf_counter_ns() - start_ns) / len(source)}


def _move(fs: Filesystem, ino: int, to: PageKind, _seed: int) -> Sample:
    pages = range(fs.getattr(ino).size_bytes // _PAGE)
    fs.move(ino, pages, PageKind.XIP if to is PageKind.PAGECACHE else PageKind.PAGECACHE)
    start_ns = time.perf_counter_ns()
    moved = fs.move(ino, pages, to).moved
    took_ns = time.perf_counter_ns() - start_ns
    assert len(moved) == len(pages), (len(moved), len(pages))
    return {"ns_per_page": took_ns / len(pages)}


def _singly(context: Context, image: Path, count: int, _seed: int) -> Sample:
    took_us = []
    with mounts.xipfs(context, image, 0, ["observe=off"]) as mounted:
        ino = (mounted.directory / MOVED).stat().st_ino
        for number in range(count):
            to = "xip" if number % 2 else "pagecache"
            request = {"op": "migrate", "ino": ino, "to": to, "ranges": [[number // 2, 1]]}
            data = json.dumps(request).encode()
            start_ns = time.perf_counter_ns()
            control = os.open(mounted.directory / ".xipfs" / "control", os.O_RDWR)
            os.write(control, data)
            while b'"result"' not in os.read(control, 65536):
                pass
            took_us.append((time.perf_counter_ns() - start_ns) / 1000)
            os.close(control)
    took_us.sort()
    return {"median_us": statistics.median(took_us), "p99_us": took_us[len(took_us) * 99 // 100]}
