"""Thousands of programs that live for a moment, from a binary on the mount, by fork and exec.

How many faults each of them took on the binary's pages, the kernel says itself: the binary lies at
an address where nothing else does, and a trace of our own counts the exceptions in its segments.
``XIPFS_TEST_RUNS`` asks for more runs than the 2,000 of two tests.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import INSTANCES, PAGE, LiveMount, Mounts, wait_until
from t5_accounting import check_books
from t5_verify import verify

pytestmark = [needs("root", "fuse", "tracefs")]

RUNS = int(os.environ.get("XIPFS_TEST_RUNS", "2000")) // 2
#: Programs that run at the same time, and runs before anything is measured.
WIDE, WARM = 4, 40
BASE = 0x6A000000
#: What the daemon may grow by, however many they are: a few lines of statistics, and fresh buffers.
#: What a life leaves behind, to the byte, is in t3_short_lives.
KIB_MAX = 24 << 10


def build(directory: Path, *flags: str) -> Path:
    """Return a program that does nothing; its segments begin at BASE."""
    source, program = directory / "nothing.c", directory / "nothing"
    source.write_text("int main(void) { return 0; }\n")
    words = ["cc", "-O1", "-no-pie", f"-Wl,-Ttext-segment={BASE:#x}", *flags]
    subprocess.run([*words, "-o", program, source], check=True)
    return program


def segments(program: Path) -> list[tuple[int, int]]:
    """Return [start, end) of what exec maps of the file itself, whole pages."""
    words = ["readelf", "-lW", str(program)]
    listing = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = []
    for line in listing.splitlines():
        fields = line.split()
        if fields[:1] == ["LOAD"]:
            start, size = int(fields[2], 16), int(fields[4], 16)
            found.append((start & -PAGE, start + size + PAGE - 1 & -PAGE))
    return found


class Traps:
    """Counts the page-fault exceptions in some ranges, by process, whoever takes them."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._path = INSTANCES / f"test-short-lives-{os.getpid()}"
        self._path.mkdir()
        try:
            (self._path / "buffer_size_kb").write_text(str(32 << 10))
            condition = "||".join(f"(address>={a}&&address<{b})" for a, b in ranges)
            for name in ("page_fault_user", "page_fault_kernel"):
                event = self._path / "events" / "exceptions" / name
                (event / "filter").write_text(condition)
                (event / "enable").write_text("1")
        except BaseException:
            self.close()
            raise

    def counts(self) -> Counter[int]:
        """Return how many each process took; those run here have one thread."""
        for path in (self._path / "per_cpu").glob("*/stats"):
            assert "overrun: 0\n" in path.read_text(), "this trace lost records itself"
        lines = (self._path / "trace").read_text().splitlines()
        found = [re.match(r".{16}-(\d+) +\[", line) for line in lines]
        return Counter(int(match[1]) for match in found if match)

    def close(self) -> None:
        (self._path / "events" / "enable").write_text("0")
        self._path.rmdir()


def filtered(mount: LiveMount) -> set[str]:
    """Return the threads that the daemon's trace is filtered by."""
    (instance,) = INSTANCES.glob(f"xipfs-{mount.pid}-*-P")
    return set((instance / "set_event_pid").read_text().split())


def rss_kib(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1])


def is_idle(pid: int) -> bool:
    """Tell whether the daemon does next to nothing in a second: its code is compiled, too."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(1)
    return ticks() - before < 10


def run_in_loops(shell: str, program: Path, runs: int) -> None:
    """Run the program so often, WIDE at a time, each by fork and exec of a shell that loops."""
    loop = f"i=0; while [ $i -lt {runs // WIDE} ]; do {program} || exit 3; i=$((i+1)); done"
    shells = [subprocess.Popen([shell, "-c", loop]) for _ in range(WIDE)]
    assert [process.wait() for process in shells] == [0] * WIDE


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[LiveMount]:
    watchdog_s = 100 + RUNS // 4
    with contextlib.closing(Mounts(tmp_path, watchdog_s)) as mounts:
        yield mounts.mount(mounts.image(), "observe=tracefs")


@pytest.mark.timeout(200 + RUNS // 4)
@pytest.mark.parametrize(
    ("flags", "shell"), [(("-static",), "sh"), ((), "bash")], ids=["static", "dynamic"]
)
def test_each_run_is_accounted_and_nothing_of_it_stays(
    mount: LiveMount, tmp_path: Path, flags: tuple[str, ...], shell: str
) -> None:
    built = build(tmp_path, *flags)
    program = mount / "nothing"
    program.write_bytes(built.read_bytes())
    program.chmod(0o755)
    # This program and its parent, since it has opened the file just now.
    followed = filtered(mount)
    run_in_loops(shell, program, WARM)
    before = mount.cat_stats()
    wait_until("the daemon has nothing to do", lambda: is_idle(mount.pid), timeout_s=90)
    was_kib = rss_kib(mount.pid)
    began_s = time.monotonic()
    with contextlib.closing(Traps(segments(built))) as traps:
        run_in_loops(shell, program, RUNS)
        took_s = time.monotonic() - began_s
        after = mount.cat_stats()
        expected = traps.counts()
    grown_kib = rss_kib(mount.pid) - was_kib
    per_run = sum(expected.values()) / RUNS
    print(f"{RUNS} runs in {took_s:.1f} s, {per_run:.1f} faults a run; {grown_kib} KiB more")
    check_books(after)
    assert len(expected) == RUNS
    assert after["kernel"]["faults"] - before["kernel"]["faults"] == sum(expected.values())
    charged = {line["pid"]: line["pgfault"] for line in after["processes"]}
    assert {pid: charged.get(pid) for pid in expected} == dict(expected)
    # Nothing is left of them.
    assert [after["vmstat"][f"nr_{kind}"] for kind in ("special_ptes", "normal_ptes")] == [0, 0]
    assert after["vmstat"]["nr_anon_pages"] == 0
    answer = verify(mount)
    assert (answer["processes"], answer["pages_differ"]) == ([], 0)
    assert (answer["invariants_broken"], answer["audit"]["pages_differed"]) == ("", 0)
    wait_until("the filter's pids are gone", lambda: filtered(mount) == followed)
    assert grown_kib < KIB_MAX
    unfollowed = set(mount.cat_stats()["observer"]["unfollowed"])
    assert unfollowed <= {"fault-around windows over XIP or evicted pages"}
