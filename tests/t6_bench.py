"""tools/bench: figures appear, in a table of under 80 columns and as JSON; nothing is left behind.

No times are asserted: they are the machine's. The arithmetic is, on samples written out here.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.support.measure import compare
from benchmarks.support.system import Interrupts
from benchmarks.support.table import as_table
from conftest import needs

BENCH = Path(__file__).resolve().parents[1] / "tools" / "bench"

SAMPLES = {
    "peer": [{"us_per_page": 10.0}, {"us_per_page": 40.0}, {"us_per_page": 20.0}],
    "ours": [
        {"us_per_page": 30.0, "major_faults": 7},
        {"us_per_page": 80.0, "major_faults": 9},
        {"us_per_page": 80.0, "major_faults": 8},
    ],
}


def compared() -> dict[str, Any]:
    return compare(
        "touching",
        SAMPLES,
        metric="us_per_page",
        baseline="peer",
        command="touch it",
        also=("major_faults",),
    )


def test_ratios_are_taken_round_by_round() -> None:
    # 30/10, 80/40, 80/20: the median is 3, where the medians' own ratio would be 80/20 = 4.
    ours = compared()["candidates"]["ours"]
    assert (ours["median"], ours["low"], ours["high"]) == (80.0, 30.0, 80.0)
    assert ours["ratio"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert ours["also"] == {"major_faults": {"median": 8.0, "low": 7.0, "high": 9.0}}
    assert compared()["candidates"]["peer"]["also"] == {}


def test_a_round_that_one_candidate_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="ours has 2 rounds, expected 3"):
        compare(
            "touching",
            SAMPLES | {"ours": SAMPLES["ours"][:2]},
            metric="us_per_page",
            baseline="peer",
            command="touch it",
        )


def test_the_table() -> None:
    assert as_table(compared()).splitlines() == [
        "touching",
        "us per page                 median       low      high                   x peer",
        "peer                            20        10        40                     1.00",
        "ours                            80        30        80         3.00 (2.00-4.00)",
        "  ours: major faults 8",
        "$ touch it",
    ]


def leftovers(pid: int) -> list[str]:
    """Mounts and scratch directories of the tools/bench whose pid that is."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return [
        *(line for line in mounts if f"/xipfs-bench-{pid}-" in line),
        *(str(path) for path in Path("/dev/shm").glob(f"xipfs-bench-{pid}-*")),
    ]


@contextlib.contextmanager
def started(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run tools/bench in ``directory`` for the time of the block."""
    bench = subprocess.Popen(
        [sys.executable, str(BENCH), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
    )
    try:
        yield bench
    finally:
        bench.terminate()
        bench.communicate(timeout=60)


@needs("root", "fuse", "tracefs")
@pytest.mark.timeout(300)
def test_a_quick_run_of_all_gives_figures(tmp_path: Path) -> None:
    with started(tmp_path, "--quick", "--rounds", "1", "--json", "figures.json") as bench:
        said, error = bench.communicate()
    assert bench.returncode == 0, error
    assert leftovers(bench.pid) == []
    assert max(map(len, said.splitlines())) < 80

    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["schema"] == 1
    assert report["rounds"] == 1
    assert report["host"]["kernel"]
    assert {"fs", "migrate", "mount", "observe"} <= set(report["benchmarks"])
    fs = report["benchmarks"]["fs"]["comparisons"]
    assert [comparison["metric"] for comparison in fs] == [
        "cold_us_per_page",
        "warm_us_per_page",
        "cold_us_per_page",
        "warm_us_per_page",
        "us_per_write",
    ]
    # 8 MiB without read-ahead: one major fault for each of its 2048 pages, whoever serves it.
    assert {
        name: row["also"]["cold_major_faults"]["median"]
        for name, row in fs[0]["candidates"].items()
    } == {"bindfs": 2048, "xipfs off": 2048, "xipfs tracefs": 2048}
    observe = report["benchmarks"]["observe"]["comparisons"]
    assert [comparison["metric"] for comparison in observe] == [
        "ns_per_page",
        "ns_per_page",
        "us_first_open",
        "us_per_open",
        "ns_per_call",
    ]
    for loop in observe[:2]:
        # 64 windows, once before the loop and 20 times in it.
        assert loop["candidates"]["xipfs"]["also"]["faults_made"]["median"] == 1344
        assert loop["candidates"]["xipfs"]["also"]["events_lost"]["median"] == 0
        # perf tells the faults of the program's start and end too.
        assert loop["candidates"]["perf trace -F all"]["also"]["events"]["median"] >= 1344
    exact = observe[1]["candidates"]["exact mode, xipfs"]["also"]
    assert (exact["faults_made"]["median"], exact["events_lost"]["median"]) == (21 * 1024, 0)
    assert exact["faults_charged"]["median"] == 21 * 1024
    for comparison in [*fs, *observe]:
        assert comparison["title"] in " ".join(said.split())
        for row in comparison["candidates"].values():
            assert 0 < row["low"] <= row["median"] <= row["high"]
            assert row["ratio"]["median"] > 0


def waiting_for(pid: int) -> list[tuple[str, str, str]]:
    """Return command line, state and kernel function of each thread of ``pid`` and its children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if pid in (parent, int(process.name)):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                for task in (process / "task").iterdir():
                    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                    found.append((command, state, (task / "wchan").read_text()))
    return found


def test_an_interrupt_that_got_lost_is_raised_again() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupts = Interrupts()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        steps = []
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():
            steps.append("held back")
        assert steps == ["held back"]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@needs("root", "fuse", "tracefs")
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path, "observe", "--json", "figures.json") as bench:
        deadline = time.monotonic() + 60
        while not any("/mnt-xipfs " in line for line in leftovers(bench.pid)):
            assert bench.poll() is None, bench.communicate()
            assert time.monotonic() < deadline, "nothing was mounted"
            time.sleep(0.02)
        bench.send_signal(signal.SIGINT)
        try:
            said, error = bench.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there 60 s after SIGINT: {waiting_for(bench.pid)}")
    assert bench.returncode == 130
    assert said == ""
    assert error == "bench: interrupted; everything is unmounted and removed\n"
    assert leftovers(bench.pid) == []
    assert not (tmp_path / "figures.json").exists()
