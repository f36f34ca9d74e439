"""What observing costs: the program observed, its opens, programs that are not observed.

The file is mapped and its pages are touched pass by pass, warm: MADV_DONTNEED unmaps them between
two passes, and each pass takes minor faults only and sends no request, so the daemon has no part
in the fault itself. *One page a fault*: every 16th page is touched, and only those are in the
kernel's page cache, so that a fault maps one page: the worst case, each touch pays for the records
of one fault. *Fault-around*: all pages are cached and touched, a fault maps 16 of them, which is
what programs meet by default. Exact mode (``xipfs run --exact``) gives that up, for 16 faults in
place of one: that costs without any tracing too, and is measured with and without. What tracing
adds, and the processor time the daemon takes from the program while it charges the faults, is in
the program's time; what the daemon still had to do when the loop was over is told beside it, and so
is what was lost.

The peer is ``perf trace -F all``, which prints each fault of the program: it knows neither files
nor what is mapped, and models nothing.

The other two comparisons run something that makes no fault: opens of a file by a program that is
not followed yet (its first open waits for the kernel's pid filter) and is (the later ones); and
system calls of a program that has nothing to do with the mount, since enabled system-call events
slow every call of every process.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support import files, mounts
from benchmarks.support.context import Context
from benchmarks.support.measure import Sample, compare
from benchmarks.support.system import BenchError, cpu_seconds
from benchmarks.support.system import run as run_command
from xipfs.cli.run import exact_environment
from xipfs.fuse.mounts import mount_at

NAME = "observe"
HELP = "warm faults, opens and system calls: untraced, under xipfs, under perf trace"

BASELINE = "untraced"
TRACED = "xipfs"
PEER = "perf trace -F all"
EXACT_BASELINE = "exact mode, untraced"
EXACT_TRACED = "exact mode, xipfs"
OBSERVE = {BASELINE: "off", TRACED: "tracefs"}
EXACT_OBSERVE = {EXACT_BASELINE: "off", EXACT_TRACED: "tracefs"}
LOOPED = "looped.bin"
_MIB = 1 << 20
#: Pages of one fault-around window (fault_around_bytes, 64 KiB by default).
WINDOW_PAGES = 16
_PERF = ("perf", "trace", "-F", "all", "--no-syscalls", "-o")
_PERF_LOST = re.compile(r"LOST (\d+) events")


def run(context: Context) -> dict[str, Any]:
    """Measure everything in alternation."""
    file_bytes, passes = (4 * _MIB, 20) if context.quick else (64 * _MIB, 100)
    opens, calls = (50, 100_000) if context.quick else (1000, 2_000_000)
    _, image = files.make_files(context, {LOOPED: file_bytes})
    program = context.build_c("bench_io.c")
    context.settings |= {
        "file_bytes": file_bytes,
        "window_pages": WINDOW_PAGES,
        "passes": passes,
        "opens": opens,
        "calls": calls,
        "xipfs": "xipfs mount -f -o observe=OBSERVER,readahead=0 IMAGE DIR (untraced: off)",
        "exact mode": "the program is preloaded with the library of xipfs run --exact",
        "perf": " ".join([*_PERF, "FILE", "bench_io ..."]) + " (on a mount with observe=off)",
    }
    bench = _Observed(context, image, program)
    pages = file_bytes // 4096
    bench.loop(
        f"{pages // WINDOW_PAGES * passes} warm faults, one page a fault", WINDOW_PAGES, passes
    )
    bench.loop(f"{pages * passes} touches of warm pages, fault-around", 1, passes)
    bench.opens(opens)
    bench.calls(calls)
    return context.results()


class _Observed:
    """The comparisons over one image; each adds itself to the context."""

    def __init__(self, context: Context, image: Path, program: Path) -> None:
        self._context = context
        self._image = image
        self._program = program

    def _mount(self, name: str) -> Any:
        options = [f"observe={(OBSERVE | EXACT_OBSERVE).get(name, 'off')}"]
        return mounts.xipfs(self._context, self._image, 0, options)

    def loop(self, title: str, stride: int, passes: int) -> None:
        """Touch every ``stride``th page, ``passes`` times, untraced, under xipfs and perf."""
        names = [BASELINE, TRACED, PEER]
        if stride == 1:
            names += EXACT_OBSERVE  # of single pages there is nothing that it could change
        candidates = {name: functools.partial(self._loop, name, stride, passes) for name in names}
        self._context.comparisons.append(
            compare(
                title,
                self._context.alternate(title, candidates),
                metric="ns_per_page",
                baseline=BASELINE,
                command=f"bench_io loop DIR/{LOOPED} {stride} {passes}",
                also=(
                    "faults",
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

    def _loop(self, name: str, stride: int, passes: int, _seed: int) -> Sample:
        """Run the loop once on a new mount."""
        with self._mount(name) as mounted:
            loop = [str(self._program), "loop", str(mounted.directory / LOOPED), str(stride)]
            run_command([*loop, "1"])  # what this leaves in the page cache stays there
            before = mounted.xipfs_stats()
            cpu_before_s = cpu_seconds(mounted.pid)
            command = [*loop, str(passes)]
            if name in EXACT_OBSERVE:
                exact = exact_environment(mount_at(mounted.directory), os.environ)
                own = [f"{key}={exact[key]}" for key in ("LD_PRELOAD", "XIPFS_DEV")]
                command = ["env", *own, *command]
            if name == PEER:
                said, figures = self._under_perf(command)
            else:
                said, figures = run_command(command), {}
            start_s = time.monotonic()
            after = mounted.xipfs_stats()
            drained_s = time.monotonic() - start_s
            cpu_s = cpu_seconds(mounted.pid) - cpu_before_s
        told = json.loads(said)
        touches = told["touches"]
        faults, major = told["loop"]["minflt"] + told["loop"]["majflt"], told["loop"]["majflt"]
        one_a_page = stride == WINDOW_PAGES or name in EXACT_OBSERVE
        expected = touches if one_a_page else touches // WINDOW_PAGES
        # A stray one is the program's own (its text or libc's, reclaimed by a busy machine).
        if faults < expected or major > touches // 1000:
            raise BenchError(f"{faults} faults, {major} major; expected {expected}, all minor")
        sample = {
            "ns_per_page": told["loop"]["ns"] / touches,
            "faults": faults,
            "major_faults": major,
        }
        if name not in (TRACED, EXACT_TRACED):
            return sample | figures
        return sample | {
            "daemon_cpu_us_per_fault": cpu_s * 1e6 / faults,
            "charging_after_the_loop_s": drained_s,
            # The program touches each page once more, before its loop.
            "faults_made": expected + expected // passes,
            "faults_charged": after["vmstat"]["pgfault"] - before["vmstat"]["pgfault"],
            "events": after["observer"]["events"] - before["observer"]["events"],
            "events_lost": after["observer"]["lost"] - before["observer"]["lost"],
        }

    def _under_perf(self, command: Sequence[str]) -> tuple[str, dict[str, float]]:
        """Run ``command`` under perf; return its output, and the events told and lost."""
        told = self._context.work / "perf.txt"
        said = run_command([*_PERF, str(told), *command])
        lines = told.read_text(errors="replace").splitlines()
        lost = sum(int(found[1]) for line in lines if (found := _PERF_LOST.search(line)))
        return said, {"events": sum("fault [" in line for line in lines), "events_lost": lost}

    def opens(self, count: int) -> None:
        """Open a file as a program that is not followed yet, and then as one that is."""
        samples = self._context.alternate(
            "opens", {name: functools.partial(self._opens, name, count) for name in OBSERVE}
        )
        for metric, title in (
            ("us_first_open", "the first open of a program, new to the observer"),
            ("us_per_open", f"its next {count} opens"),
        ):
            self._context.comparisons.append(
                compare(
                    title,
                    samples,
                    metric=metric,
                    baseline=BASELINE,
                    command=f"bench_io open DIR/{LOOPED} {count}",
                )
            )

    def _opens(self, name: str, count: int, _seed: int) -> Sample:
        with self._mount(name) as mounted:
            # Nobody has opened a file of this mount yet, so neither we nor our child is followed.
            file = mounted.directory / LOOPED
            told = json.loads(run_command([self._program, "open", file, str(count)]))
        return {
            "us_first_open": told["first_ns"] / 1000,
            "us_per_open": told["ns"] / told["count"] / 1000,
        }

    def calls(self, count: int) -> None:
        """Make system calls in a program that never opens the mount."""
        samples = self._context.alternate(
            "system calls", {name: functools.partial(self._calls, name, count) for name in OBSERVE}
        )
        self._context.comparisons.append(
            compare(
                f"{count} calls of getppid by a program that is not observed",
                samples,
                metric="ns_per_call",
                baseline=BASELINE,
                command=f"bench_io calls {count}",
            )
        )

    def _calls(self, name: str, count: int, _seed: int) -> Sample:
        with self._mount(name):
            told = json.loads(run_command([self._program, "calls", str(count)]))
        return {"ns_per_call": told["ns"] / told["calls"]}
