"""Moving pages: what the engine adds to copying, what a page costs, what others notice.

Without a mount, on an image in the tmpfs scratch directory: bulk promotion and demotion beside
numpy's copy of the same bytes (the engine's frames, journal and checks are the difference), and
what a page costs as the file, the image, and the number of its mappings grow. On a mount: bulk
moves, one page from the request on the control file to the reply (the kernel's invalidation
included), and readers of another file while a bulk move is going on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import files, moves_live
from benchmarks.support.context import Context
from benchmarks.support.measure import Sample, compare
from xipfs.accounting.accountant import Accountant
from xipfs.clock import SystemClock
from xipfs.fs.build import make_empty
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.pagecache import nothing, nothing_of_run
from xipfs.fs.types import PageKind
from xipfs.mm.rules import Rules
from xipfs.trace import events as ev

NAME = "migrate"
HELP = "bulk moves beside numpy's copy; one page from request to reply; readers beside it"

BASELINE = "numpy copy"
MOVED, OTHER = "moved.bin", "other.bin"
_MIB = 1 << 20
_PAGE = 4096
_BASE = 0x7F00_0000_0000
#: Of the files and images that differ in size, this much is moved.
_PART_BYTES = 4 * _MIB
_OPPOSITE = {PageKind.PAGECACHE: PageKind.XIP, PageKind.XIP: PageKind.PAGECACHE}


def run(context: Context) -> dict[str, Any]:
    """Measure all of it."""
    size_bytes, singles = (4 * _MIB, 50) if context.quick else (64 * _MIB, 1000)
    _, image = files.make_files(context, {MOVED: size_bytes, OTHER: 4 * _MIB})
    context.settings |= {"moved_bytes": size_bytes, "single_moves": singles}
    _bulk(context, image, size_bytes)
    _sizes(context)
    _mappings(context)
    copy = functools.partial(_copy, size_bytes)
    moves_live.bulk(context, image, MOVED, BASELINE, copy)
    moves_live.singly(context, image, MOVED, singles)
    moves_live.readers(context, image, MOVED, OTHER)
    return context.results()


def _bulk(context: Context, image: Path, size_bytes: int) -> None:
    fs = Filesystem.open(image, ram_bytes=2 * size_bytes, clock=SystemClock())
    try:
        fs.memory.ram_frames[:] = 0  # the host gives the frames now, not while a move is timed
        ino = fs.lookup(1, MOVED.encode()).ino
        whole = range(size_bytes // _PAGE)
        samples = context.alternate(
            "bulk moves",
            {
                BASELINE: functools.partial(_copy, size_bytes),
                "promote": functools.partial(_move, fs, ino, whole, PageKind.PAGECACHE),
                "demote, clean": functools.partial(_move, fs, ino, whole, PageKind.XIP),
                "demote, dirty": functools.partial(_demote_dirty, fs, ino, whole),
            },
        )
    finally:
        fs.close()
    context.comparisons.append(
        compare(
            f"{size_bytes // _MIB} MiB in one call",
            samples,
            metric="ns_per_page",
            baseline=BASELINE,
            command=f"Filesystem.move of {size_bytes // _PAGE} pages",
        )
    )


def _copy(size_bytes: int, _seed: int) -> Sample:
    source = np.ones((size_bytes // _PAGE, _PAGE), np.uint8)
    target = np.zeros_like(source)
    target[:] = 2
    start_ns = time.perf_counter_ns()
    target[:] = source
    return {"ns_per_page": (time.perf_counter_ns() - start_ns) / len(source)}


def _move(fs: Filesystem, ino: int, pages: range, to: PageKind, _seed: int) -> Sample:
    fs.move(ino, pages, _OPPOSITE[to])
    return _timed_move(fs, ino, pages, to)


def _demote_dirty(fs: Filesystem, ino: int, pages: range, _seed: int) -> Sample:
    fs.move(ino, pages, PageKind.PAGECACHE)
    fs.write(ino, pages.start * _PAGE, np.random.default_rng(_seed).bytes(len(pages) * _PAGE))
    assert fs.nr_dirty_pages == len(pages)
    return _timed_move(fs, ino, pages, PageKind.XIP)


def _timed_move(fs: Filesystem, ino: int, pages: range, to: PageKind) -> Sample:
    start_ns = time.perf_counter_ns()
    moved = fs.move(ino, pages, to).moved
    took_ns = time.perf_counter_ns() - start_ns
    assert len(moved) == len(pages), (len(moved), len(pages))
    return {"ns_per_page": took_ns / len(pages)}


def _sizes(context: Context) -> None:
    """Move the same number of pages in files and images of different sizes."""
    sizes = (8, 16) if context.quick else (8, 64, 512)
    image_mib = sizes[-1] + 64
    made = {f"file {each} MiB": (each, image_mib) for each in sizes}
    made[f"image {4 * sizes[-1]} MiB"] = sizes[0], 4 * sizes[-1]
    open_ones: dict[str, tuple[Filesystem, int]] = {}
    try:
        for name, (file_mib, whole_mib) in made.items():
            open_ones[name] = _file_in_image(context, name, file_mib * _MIB, whole_mib * _MIB)
        candidates: dict[str, Callable[[int], Sample]] = {
            name: functools.partial(_there_and_back, fs, ino)
            for name, (fs, ino) in open_ones.items()
        }
        samples = context.alternate("sizes", candidates)
    finally:
        for fs, _ in open_ones.values():
            fs.close()
    context.comparisons.append(
        compare(
            f"{_PART_BYTES // _MIB} MiB at the end of a file, there and back: by file size in an "
            f"image of {image_mib} MiB, and in a larger image",
            samples,
            metric="ns_per_page",
            baseline=next(iter(made)),
            command="Filesystem.move",
        )
    )


def _file_in_image(
    context: Context, name: str, file_bytes: int, image_bytes: int
) -> tuple[Filesystem, int]:
    """Return an open filesystem with a file of that size, and the number of the file."""
    clock = SystemClock()
    image = context.work / f"{name.replace(' ', '-')}.img"
    make_empty(image, size_bytes=image_bytes, label="", pagecache=False, clock=clock)
    fs = Filesystem.open(image, ram_bytes=2 * _PART_BYTES, clock=clock)
    fs.memory.ram_frames[:] = 0
    ino = fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino
    data = bytes(range(256)) * (_MIB // 256)
    for offset in range(0, file_bytes, _MIB):
        fs.write(ino, offset, data)
    return fs, ino


def _there_and_back(fs: Filesystem, ino: int, _seed: int) -> Sample:
    end = fs.getattr(ino).size_bytes // _PAGE
    pages = range(end - _PART_BYTES // _PAGE, end)
    there = _timed_move(fs, ino, pages, PageKind.PAGECACHE)["ns_per_page"]
    return {"ns_per_page": there + _timed_move(fs, ino, pages, PageKind.XIP)["ns_per_page"]}


def _mappings(context: Context) -> None:
    """Demote pages that 1 to 64 modelled processes map: the model zaps a PTE of each."""
    counts = (1, 8) if context.quick else (1, 4, 16, 64)
    size_bytes = 2 * _MIB
    fs, ino = _file_in_image(context, "mappings", size_bytes, 32 * _MIB)
    try:
        names = {count: f"{count} mapping{'s' if count > 1 else ''}" for count in counts}
        samples = context.alternate(
            "mappings",
            {
                name: functools.partial(_demote_mapped, fs, ino, count)
                for count, name in names.items()
            },
        )
    finally:
        fs.close()
    context.comparisons.append(
        compare(
            f"demotion of {size_bytes // _PAGE} pages that so many processes map",
            samples,
            metric="ns_per_page",
            baseline=names[counts[0]],
            command="Filesystem.move, the mappings made by events as an observer reads them",
            also=("ns_per_mapping",),
        )
    )


def _demote_mapped(fs: Filesystem, ino: int, count: int, _seed: int) -> Sample:
    books = Accountant(fs, Rules.parse("6.12"), lambda _pid: "bench")
    fs.set_hooks(on_unmap=books.unmap_pages, on_evict=nothing, on_cut=books.cut)
    end = fs.getattr(ino).size_bytes
    pages = range(end // _PAGE)
    fs.move(ino, pages, PageKind.PAGECACHE)
    for mm in range(1, count + 1):
        books.consume([ev.Map(0, mm, mm, _BASE, _BASE + end, ino, 0, 1, True, True)])
        books.consume(
            ev.Fault(
                0, mm, mm, mm, _BASE + page * _PAGE, ino, page,
                False, False, True, False, ev.MINOR, ev.TRAP,
            )
            for page in pages
        )  # fmt: skip
    mapped = books.machine.statistics().nr_normal_ptes
    assert mapped == count * len(pages), (mapped, count, len(pages))
    took_ns = _timed_move(fs, ino, pages, PageKind.XIP)["ns_per_page"]
    assert books.machine.statistics().nr_normal_ptes == 0
    for mm in range(1, count + 1):
        books.consume([ev.Exit(0, mm)])
    fs.set_hooks(on_unmap=nothing_of_run, on_evict=nothing, on_cut=nothing)
    return {"ns_per_page": took_ns, "ns_per_mapping": took_ns / count}
