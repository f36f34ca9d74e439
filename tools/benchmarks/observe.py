"""What observing costs the program observed: a loop of warm faults with the observer on and off.

The file is mapped and every 16th page is touched, so only one page of each fault-around window is
in the kernel's page cache and one fault maps one page. MADV_DONTNEED then unmaps them all, and the
next pass takes exactly one minor fault a touch and sends no request: the daemon has no part in the
fault itself. What tracing adds to it, and the processor time the daemon takes from the program
while it charges the faults, is in the time per fault; what the daemon still has to do
when the loop is over is told beside it, and so is what was lost.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.support import files, mounts
from benchmarks.support.context import Context
from benchmarks.support.measure import Sample, compare
from benchmarks.support.system import BenchError, cpu_seconds
from benchmarks.support.system import run as run_command

NAME = "observe"
HELP = "a loop of warm faults with the observer on (tracefs) and off"

BASELINE = "observe=off"
LOOPED = "looped.bin"
_MIB = 1 << 20
#: Pages of one fault-around window (fault_around_bytes, 64 KiB by default).
WINDOW_PAGES = 16


def run(context: Context) -> dict[str, Any]:
    """Measure both in alternation."""
    file_bytes, passes = (4 * _MIB, 20) if context.quick else (64 * _MIB, 100)
    _, image = files.make_files(context, {LOOPED: file_bytes})
    program = context.build_c("bench_io.c")
    context.settings |= {
        "file_bytes": file_bytes,
        "window_pages": WINDOW_PAGES,
        "passes": passes,
        "xipfs": "xipfs mount -f -o observe=OBSERVER,readahead=0 IMAGE DIR",
    }
    samples = context.alternate(
        "warm fault loop",
        {
            f"observe={observer}": functools.partial(
                _sample, context, image, program, observer, passes
            )
            for observer in ("off", "tracefs")
        },
    )
    faults = file_bytes // (4096 * WINDOW_PAGES) * passes
    context.comparisons.append(
        compare(
            f"loop of {faults} warm faults, one mapped page each",
            samples,
            metric="ns_per_fault",
            baseline=BASELINE,
            command=f"bench_io loop DIR/{LOOPED} {WINDOW_PAGES} {passes}",
            also=(
                "major_faults",
                "daemon_cpu_us_per_fault",
                "charging_after_the_loop_s",
                "faults_made",
                "faults_charged",
                "events",
                "events_lost",
            ),
        )
    )
    return context.results()


def _sample(
    context: Context, image: Path, program: Path, observer: str, passes: int, _seed: int
) -> Sample:
    """Run the loop once on a new mount."""
    with mounts.xipfs(context, image, 0, [f"observe={observer}"]) as mounted:
        loop: list[str | Path] = [program, "loop", mounted.directory / LOOPED, str(WINDOW_PAGES)]
        run_command([*loop, "1"])  # what this leaves in the page cache stays there
        before = mounted.xipfs_stats()
        cpu_before_s = cpu_seconds(mounted.pid)
        said = run_command([*loop, str(passes)])
        start_s = time.monotonic()
        after = mounted.xipfs_stats()
        drained_s = time.monotonic() - start_s
        cpu_s = cpu_seconds(mounted.pid) - cpu_before_s
    told = json.loads(said)
    touches = told["touches"]
    faults, major = told["loop"]["minflt"] + told["loop"]["majflt"], told["loop"]["majflt"]
    # A stray one is the program's own (its text or libc's, reclaimed by a busy machine).
    if faults < touches or major > touches // 1000:
        raise BenchError(f"{faults} faults, {major} major; expected {touches}, all minor")
    sample = {
        "ns_per_fault": told["loop"]["ns"] / touches,
        "major_faults": major,
        "daemon_cpu_us_per_fault": cpu_s * 1e6 / touches,
    }
    if observer == "off":
        return sample
    return sample | {
        "charging_after_the_loop_s": drained_s,
        # The program touches each page once more, before its loop.
        "faults_made": touches + touches // passes,
        "faults_charged": after["vmstat"]["pgfault"] - before["vmstat"]["pgfault"],
        "events": after["observer"]["events"] - before["observer"]["events"],
        "events_lost": after["observer"]["lost"] - before["observer"]["lost"],
    }
