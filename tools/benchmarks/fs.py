"""xipfs beside bindfs: random mmap, cold and warm, and small durable writes.

bindfs is a passthrough filesystem in C, with one thread by default as the xipfs daemon has one. It
passes on plain files of a tmpfs directory; the image of xipfs is a file on the same tmpfs. Both
have the same bytes, are touched by the same program in the same order, with the same read-ahead.

Cold means that the mount is new: the kernel has none of its pages. bindfs has the kernel's
page cache dropped at every open, so warm is measured in the program that made the pages warm.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support import files, mounts
from benchmarks.support.context import SEED, Context
from benchmarks.support.measure import Sample, compare
from benchmarks.support.mounts import DEFAULT_READAHEAD_KIB, Mounted
from benchmarks.support.system import BenchError
from benchmarks.support.system import run as run_command

NAME = "fs"
HELP = "random mmap cold and warm, 4 KiB writes with fsync: xipfs beside bindfs"

BASELINE = "bindfs"
OBSERVERS = ("off", "tracefs")
MAPPED, WRITTEN = "mapped.bin", "written.bin"
_MIB = 1 << 20

#: Given a read-ahead in KiB, the filesystem mounted anew.
Mount = Callable[[int], AbstractContextManager[Mounted]]


@dataclass(frozen=True)
class Sizes:
    """How much is touched and written."""

    mapped_bytes: int = 256 * _MIB
    written_bytes: int = 16 * _MIB
    writes: int = 2000


QUICK = Sizes(mapped_bytes=8 * _MIB, written_bytes=2 * _MIB, writes=100)


def run(context: Context) -> dict[str, Any]:
    """Measure all of it."""
    sizes = QUICK if context.quick else Sizes()
    source, image = files.make_files(
        context, {MAPPED: sizes.mapped_bytes, WRITTEN: sizes.written_bytes}
    )
    program = context.build_c("bench_io.c")
    context.settings |= {
        "mapped_bytes": sizes.mapped_bytes,
        "written_bytes": sizes.written_bytes,
        "writes_per_round": sizes.writes,
        "seed": SEED,
        "bindfs": "bindfs -f --no-allow-other TMPFS_DIR DIR",
        "xipfs": "xipfs mount -f -o observe=OBSERVER,readahead=KIB IMAGE DIR (RAM: its default)",
    }
    filesystems: dict[str, Mount] = {BASELINE: functools.partial(mounts.bindfs, context, source)}
    for observer in OBSERVERS:
        filesystems[f"xipfs {observer}"] = functools.partial(
            mounts.xipfs, context, image, options=[f"observe={observer}"]
        )
    for readahead_kib in (0, DEFAULT_READAHEAD_KIB):
        size = f"{sizes.mapped_bytes // _MIB} MiB"
        _random_mmap(context, program, filesystems, size, readahead_kib)
    _durable_writes(context, program, filesystems, sizes.writes)
    return context.results()


def _random_mmap(
    context: Context,
    program: Path,
    filesystems: Mapping[str, Mount],
    size: str,
    readahead_kib: int,
) -> None:
    """Touch each page once, cold, then again, warm; one comparison for each."""
    checksums: dict[int, int] = {}

    def sample(mount: Mount, seed: int) -> Sample:
        with mount(readahead_kib) as mounted:
            said = run_command([program, "mmap", mounted.directory / MAPPED, str(seed)])
        told = json.loads(said)
        if checksums.setdefault(seed, told["checksum"]) != told["checksum"]:
            raise BenchError(f"{MAPPED} reads differently through two filesystems")
        return {
            f"{when}_{name}": value
            for when in ("cold", "warm")
            for name, value in (
                ("us_per_page", told[when]["ns"] / told["pages"] / 1000),
                ("major_faults", told[when]["majflt"]),
                ("minor_faults", told[when]["minflt"]),
            )
        }

    samples = context.alternate(
        f"random mmap, read-ahead {readahead_kib} KiB",
        {name: functools.partial(sample, mount) for name, mount in filesystems.items()},
    )
    for when in ("cold", "warm"):
        context.comparisons.append(
            compare(
                f"{when} random mmap: each page of {size} touched once, "
                f"read-ahead {readahead_kib} KiB",
                samples,
                metric=f"{when}_us_per_page",
                baseline=BASELINE,
                command=f"bench_io mmap DIR/{MAPPED} SEED",
                also=(f"{when}_major_faults", f"{when}_minor_faults"),
            )
        )


def _durable_writes(
    context: Context, program: Path, filesystems: Mapping[str, Mount], writes: int
) -> None:
    """Overwrite random pages, each with its fsync; on xipfs for both kinds of page."""

    def sample(mount: Mount, kind: str | None, seed: int) -> Sample:
        with mount(DEFAULT_READAHEAD_KIB) as mounted:
            path = mounted.directory / WRITTEN
            if kind is not None:
                mounts.migrate(path, kind)
            told = json.loads(run_command([program, "fsync", path, str(seed), str(writes)]))
        return {"us_per_write": told["fsync"]["ns"] / told["writes"] / 1000}

    candidates = {BASELINE: functools.partial(sample, filesystems[BASELINE], None)}
    for observer, kind in (("off", "xip"), ("off", "pagecache"), ("tracefs", "xip")):
        candidates[f"xipfs {observer}, {kind}"] = functools.partial(
            sample, filesystems[f"xipfs {observer}"], kind
        )
    samples = context.alternate("4 KiB writes with fsync", candidates)
    _check_same_bytes(filesystems)
    context.comparisons.append(
        compare(
            "4 KiB overwrites of random pages, an fsync after each",
            samples,
            metric="us_per_write",
            baseline=BASELINE,
            command=f"bench_io fsync DIR/{WRITTEN} SEED {writes}",
        )
    )


def _check_same_bytes(filesystems: Mapping[str, Mount]) -> None:
    """All were written alike, so all must hold the same now, also after a new mount."""
    digests = {}
    for name, mount in filesystems.items():
        with mount(DEFAULT_READAHEAD_KIB) as mounted:
            digests[name] = files.digest(mounted.directory / WRITTEN)
    if len(set(digests.values())) != 1:
        raise BenchError(f"{WRITTEN} differs after the same writes: {digests}")
