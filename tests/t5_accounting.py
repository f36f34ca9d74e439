"""Real programs on a real mount, every fault counted: what the ledger must say is written out.

Each test uses files of its own that nobody has touched since the mount, of a prime number of pages
(31, so one lost or doubled fault shows). ``tools/touch.c`` does what its words say. Its faults are
known twice over: by construction, and by the kernel's own count in getrusage(2).

The kernel maps cached neighbours of a page without a fault, so only cold pages make one fault each;
where pages are warm, the test compares with getrusage.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until

from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

N = 31
#: The order of the numbers in ``charged``.
COUNTERS = (
    "pgfault",
    "pgmajfault",
    "pgfault_xip",
    "pgfault_pagecache",
    "pgfault_cow",
    "pgfault_sigbus",
    "pgfault_extra",
)
PTES = ("nr_special_ptes", "nr_normal_ptes", "nr_anon_pages")


def fill(image: Path, names: dict[str, PageKind], pages: int = N, byte: int | None = None) -> None:
    """Write files of ``pages`` pages of one kind each, without a mount.

    Each byte is its page's number, or ``byte``.
    """
    fs = Filesystem.open(image, ram_bytes=1 << 20, clock=SystemClock())
    for name, kind in names.items():
        ino = fs.mknod(1, name.encode(), stat.S_IFREG | 0o755, 0, 0, 0).ino
        fs.set_default_kind(ino, kind)
        for page in range(pages):
            fs.write(ino, page * PAGE, bytes([page if byte is None else byte]) * PAGE)
    fs.close()


class Toucher:
    """One run of touch; its words follow a warm-up that faults in all it needs itself."""

    def __init__(self, program: Path, warm: Path, words: str) -> None:
        warm_up = f"map {warm} private rw read 0-1 write 2 advise 3 dontneed mark warm mark warm"
        self.process = subprocess.Popen(
            [str(program), *warm_up.split(), *words.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self._said = ""

    def until_paused(self) -> None:
        """Return when the program has done all before its next ``pause``."""
        assert self.process.stdout is not None
        line = ""
        while line != "paused\n":
            line = self.process.stdout.readline()
            assert line, f"touch ended: {self.process.communicate()}"
            self._said += line

    def go(self) -> None:
        """Let it go on after a ``pause``."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self, code: int = 0) -> dict[str, tuple[int, int]]:
        """Wait for the end; return (minor, major) faults at each mark, as the kernel counted."""
        try:
            said, complained = self.process.communicate(timeout=30)
        finally:
            self.process.kill()
        assert self.process.returncode == code, complained
        marks = re.findall(r"^(\w+) minflt=(\d+) majflt=(\d+)$", self._said + said, re.MULTILINE)
        return {name: (int(minor), int(major)) for name, minor, major in marks}


class Workbench:
    """A mount under tracefs, and the difference between two looks at its figures."""

    def __init__(self, mount: LiveMount, program: Path, warm: Path) -> None:
        self.mount = mount
        self._program = program
        self._warm = warm
        self._running: list[Toucher] = []
        self._before = mount.cat_stats()

    def start(self, words: str) -> Toucher:
        """Start touch; ``{NAME}`` in the words is a file of the mount."""
        names = {path.name: path for path in self.mount.directory.iterdir()}
        toucher = Toucher(self._program, self._warm, words.format_map(names))
        self._running.append(toucher)
        return toucher

    def run(self, words: str, code: int = 0) -> dict[str, tuple[int, int]]:
        """Run touch to its end and return its marks."""
        return self.start(words).finish(code)

    def charged(self) -> tuple[int, ...]:
        """Return what was charged since the last call, in the order of COUNTERS."""
        return self.figures()[0]

    def figures(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Return what was charged, and the kernel's (minor, major), since the last call."""
        now, then = self.mount.cat_stats(), self._before
        check_books(now)
        self._before = now
        charged = tuple(now["vmstat"][name] - then["vmstat"][name] for name in COUNTERS)
        kernel = tuple(now["kernel"][name] - then["kernel"][name] for name in ("minor", "major"))
        return charged, (kernel[0], kernel[1])

    def ptes(self) -> tuple[int, ...]:
        """Return the special and normal PTEs and the anonymous pages of the model now."""
        vmstat = self.mount.vmstat()
        return tuple(vmstat[name] for name in PTES)

    def close(self) -> None:
        """End what a failed test left running."""
        for toucher in self._running:
            with toucher.process:
                toucher.process.kill()


def check_books(stats: dict[str, Any]) -> None:
    """What must hold of every snapshot, whatever was run."""
    vmstat = stats["vmstat"]
    assert stats["observer"]["mode"] == "tracefs", stats["observer"]
    assert stats["observer"]["lost"] == 0
    for name in COUNTERS:
        assert vmstat[name] == sum(process[name] for process in stats["processes"]), name
    assert vmstat["pgfault"] == sum(
        vmstat[f"pgfault_{kind}"] for kind in ("xip", "pagecache", "cow", "sigbus")
    )
    ended_well = stats["kernel"]["major"] + stats["kernel"]["minor"]
    assert vmstat["pgfault"] == ended_well + vmstat["pgfault_sigbus"]


KINDS = {"x": PageKind.XIP, "p": PageKind.PAGECACHE}


@pytest.fixture(scope="module")
def mounted(shared: Mounts) -> LiveMount:
    """A mount with files x0.. of XIP pages and p0.. of pagecache pages, all cold."""
    image = shared.image()
    fill(image, {f"{k}{n}": kind for k, kind in KINDS.items() for n in range(40)})
    fill(image, {f"{k}one{n}": kind for k, kind in KINDS.items() for n in range(4)}, pages=1)
    return shared.mount(image, "observe=tracefs")


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], str]]:
    """Names files that no test has used."""
    used = {"x": 0, "p": 0, "xone": 0, "pone": 0}

    def take(kind: str) -> str:
        used[kind] += 1
        return f"{{{kind}{used[kind] - 1}}}"

    return take  # type: ignore[return-value]


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A file that is not on the mount, to warm up with."""
    path = tmp_path / "warm"
    path.write_bytes(bytes(4 * PAGE))
    return path


@pytest.fixture
def bench(mounted: LiveMount, touch: Path, warm: Path) -> Iterator[Workbench]:
    with contextlib.closing(Workbench(mounted, touch, warm)) as workbench:
        yield workbench


@pytest.fixture
def bench_of(live: Mounts, touch: Path, warm: Path) -> Iterator[Callable[[LiveMount], Workbench]]:
    """Makes workbenches of mounts of the test's own."""
    with contextlib.ExitStack() as stack:
        yield lambda mount: stack.enter_context(contextlib.closing(Workbench(mount, touch, warm)))


# The first touch


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_cold_reads_of_xip_pages(
    bench: Workbench, fresh: Callable[[str], str], sharing: str
) -> None:
    run = bench.start(f"map {fresh('x')} {sharing} r mark a read 0-30 mark b pause")
    run.until_paused()
    assert bench.figures() == ((31, 0, 31, 0, 0, 0, 0), (0, 31))
    assert bench.ptes() == (31, 0, 0)
    run.go()
    assert run.finish()["b"] == (0, 31)
    assert bench.charged() == (0, 0, 0, 0, 0, 0, 0)
    assert bench.ptes() == (0, 0, 0)


def test_a_second_touch_makes_no_fault(bench: Workbench, fresh: Callable[[str], str]) -> None:
    marks = bench.run(f"map {fresh('x')} private r read 0-30 mark a read 0-30 read 0-30 mark b")
    assert marks["b"] == (0, 0)
    assert bench.charged() == (31, 0, 31, 0, 0, 0, 0)


def test_cold_reads_of_pagecache_pages_are_major_once(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    name = fresh("p")
    run = bench.start(f"map {name} private r read 0-30 pause")
    run.until_paused()
    assert bench.figures() == ((31, 31, 0, 31, 0, 0, 0), (0, 31))
    assert bench.ptes() == (0, 31, 0)
    run.go()
    run.finish()
    assert bench.ptes() == (0, 0, 0)
    minor, major = bench.run(f"map {name} private r mark a read 0-30 mark b")["b"]
    assert major == 0
    assert 1 <= minor < 31, "the second reader's faults come with their neighbours"
    charged, kernel = bench.figures()
    assert kernel == (minor, 0)
    assert charged == (minor, 0, 0, minor, 0, 0, 0)


def test_first_writes_into_a_private_mapping_of_xip_pages(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    """Rule F11: vmf_insert_mixed cannot copy, so each takes a read-only PTE first."""
    run = bench.start(f"map {fresh('x')} private rw mark a write 0-30 mark b pause")
    run.until_paused()
    assert bench.figures() == ((31, 0, 0, 0, 31, 0, 31), (0, 31))
    assert bench.ptes() == (0, 31, 31)
    run.go()
    assert run.finish()["b"] == (0, 31)
    assert bench.ptes() == (0, 0, 0)


def test_first_writes_into_a_private_mapping_of_pagecache_pages(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    """Rule F10: one fault each, the copy made at once."""
    name = fresh("p")
    run = bench.start(f"map {name} private rw write 0-30 pause")
    run.until_paused()
    assert bench.figures() == ((31, 31, 0, 0, 31, 0, 0), (0, 31))
    assert bench.ptes() == (0, 31, 31)
    assert bench.mount.pages(name[1:-1]) == [("P", 0, 31, 1, 0)]
    run.go()
    run.finish()


def test_first_writes_into_a_shared_mapping_of_xip_pages(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    """Rules F9 and F13: the VMA is write-notified, so a raw PTE is made writable by a second."""
    run = bench.start(f"map {fresh('x')} shared rw mark a write 0-30 mark b pause")
    run.until_paused()
    assert bench.figures() == ((31, 0, 31, 0, 0, 0, 31), (0, 31))
    assert bench.ptes() == (31, 0, 0)
    run.go()
    assert run.finish()["b"] == (0, 31)


def test_first_writes_into_a_shared_mapping_of_pagecache_pages(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    """Rule F12: one fault each."""
    run = bench.start(f"map {fresh('p')} shared rw write 0-30 pause")
    run.until_paused()
    assert bench.figures() == ((31, 31, 0, 31, 0, 0, 0), (0, 31))
    assert bench.ptes() == (0, 31, 0)
    run.go()
    run.finish()


@pytest.mark.parametrize(
    ("kind", "sharing", "expected", "ptes"),
    [
        ("x", "private", (62, 0, 31, 0, 31, 0, 0), (0, 31, 31)),
        ("x", "shared", (62, 0, 62, 0, 0, 0, 0), (31, 0, 0)),
        ("p", "private", (62, 31, 0, 31, 31, 0, 0), (0, 31, 31)),
        ("p", "shared", (62, 31, 0, 62, 0, 0, 0), (0, 31, 0)),
    ],
)
def test_a_write_after_a_read_is_a_second_fault(
    bench: Workbench,
    fresh: Callable[[str], str],
    kind: str,
    sharing: str,
    expected: tuple[int, ...],
    ptes: tuple[int, ...],
) -> None:
    run = bench.start(f"map {fresh(kind)} {sharing} rw mark a read 0-30 write 0-30 mark b pause")
    run.until_paused()
    assert bench.figures() == (expected, (31, 31))
    assert bench.ptes() == ptes
    run.go()
    assert run.finish()["b"] == (31, 31)


def test_holes_map_the_zero_page(bench: Workbench, mounted: LiveMount) -> None:
    with open(mounted / "hole", "wb") as file:
        file.truncate(13 * PAGE)
    run = bench.start("map {hole} private r read 0-12 pause")
    run.until_paused()
    assert bench.charged() == (13, 0, 13, 0, 0, 0, 0)
    assert bench.ptes() == (13, 0, 0)
    assert mounted.letters("hole") == "." * 13
    run.go()
    run.finish()


def test_bytes_stored_into_a_mapped_hole_become_pages(bench: Workbench, mounted: LiveMount) -> None:
    with open(mounted / "filled", "wb") as file:
        file.truncate(7 * PAGE)
    bench.run("map {filled} shared rw write 0-6")
    assert mounted.letters("filled") == "X" * 7
    assert (mounted / "filled").read_bytes() == b"".join(
        bytes(page) + bytes([page]) + bytes(PAGE - page - 1) for page in range(7)
    )
    assert bench.ptes() == (0, 0, 0)


# Errors


def test_a_touch_beyond_the_end_is_a_sigbus(bench: Workbench, fresh: Callable[[str], str]) -> None:
    bench.run(f"map {fresh('x')} private r remap 40 read 0 read 35", code=-7)
    assert bench.charged() == (2, 0, 1, 0, 0, 1, 0)
    assert bench.ptes() == (0, 0, 0)


def test_a_forbidden_write_is_no_fault_of_the_page(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    bench.run(f"map {fresh('x')} private r read 0 write 0", code=-11)
    assert bench.charged() == (1, 0, 1, 0, 0, 0, 0)


# What happens to mappings


def test_munmap_takes_the_ptes(bench: Workbench, fresh: Callable[[str], str]) -> None:
    run = bench.start(f"map {fresh('x')} private r read 0-30 unmap 7-16 pause read 0-6 pause")
    run.until_paused()
    assert bench.ptes() == (21, 0, 0)
    run.go()
    run.until_paused()
    assert bench.charged() == (31, 0, 31, 0, 0, 0, 0)
    run.go()
    run.finish()
    assert bench.ptes() == (0, 0, 0)


def test_mprotect_keeps_the_ptes_and_lets_writes_copy(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    run = bench.start(f"map {fresh('x')} private r read 0-30 protect 0-30 rw write 0-10 pause")
    run.until_paused()
    assert bench.charged() == (42, 0, 31, 0, 11, 0, 0)
    assert bench.ptes() == (20, 11, 11)
    run.go()
    run.finish()


def test_mremap_moves_the_ptes(bench: Workbench, fresh: Callable[[str], str]) -> None:
    name = fresh("x")
    run = bench.start(
        f"part {name} private r 0 10 read 0-9 part {name} private r 0 1 use 1 remap 31 "
        "read 0-30 pause"
    )
    run.until_paused()
    assert bench.charged() == (31, 0, 31, 0, 0, 0, 0)
    assert bench.ptes() == (31, 0, 0)
    run.go()
    run.finish()
    assert bench.ptes() == (0, 0, 0)


def test_dontneed_drops_private_copies(bench: Workbench, fresh: Callable[[str], str]) -> None:
    run = bench.start(f"map {fresh('x')} private rw write 0-30 advise 0-30 dontneed pause")
    run.until_paused()
    assert bench.charged() == (31, 0, 0, 0, 31, 0, 31)
    assert bench.ptes() == (0, 0, 0)
    run.go()
    run.finish()


def test_warm_faults_after_dontneed_are_as_many_as_the_kernels(
    bench: Workbench, fresh: Callable[[str], str]
) -> None:
    words = f"map {fresh('x')} private r read 0-30 advise 0-30 dontneed mark a read 0-30 mark b"
    minor, major = bench.run(words)["b"]
    assert major == 0
    charged, kernel = bench.figures()
    assert kernel == (minor, 31)
    assert charged == (31 + minor, 0, 31 + minor, 0, 0, 0, 0)


def test_a_child_copies_what_it_writes(bench: Workbench, fresh: Callable[[str], str]) -> None:
    """Parent: 31 copies of XIP pages, two faults each by the rules; child: 31 of the copies."""
    marks = bench.run(
        f"map {fresh('x')} private rw mark a write 0-30 mark b fork {{{{ write 0-30 mark child }}}}"
    )
    assert marks["b"] == (0, 31)
    assert marks["child"][0] >= 31
    assert bench.charged() == (62, 0, 0, 0, 62, 0, 31)
    assert bench.ptes() == (0, 0, 0)


def test_a_child_inherits_the_mapped_pages(bench: Workbench, fresh: Callable[[str], str]) -> None:
    """Rule K1: PTEs of a MIXED VMA are copied by fork, also where the kernel below does not."""
    run = bench.start(f"map {fresh('x')} private r read 0-30 fork {{{{ pause }}}}")
    run.until_paused()
    assert bench.ptes() == (62, 0, 0)
    run.go()
    run.finish()
    assert bench.charged() == (31, 0, 31, 0, 0, 0, 0)
    assert bench.ptes() == (0, 0, 0)


def test_dontfork_leaves_the_child_without(bench: Workbench, fresh: Callable[[str], str]) -> None:
    run = bench.start(
        f"map {fresh('x')} private r read 0-30 advise 0-30 dontfork fork {{{{ pause }}}}"
    )
    run.until_paused()
    assert bench.ptes() == (31, 0, 0)
    run.go()
    run.finish()


def test_threads_are_one_process(bench: Workbench, fresh: Callable[[str], str]) -> None:
    run = bench.start(
        f"map {fresh('x')} private r thread {{{{ read 0-15 }}}} join "
        "thread {{ read 16-30 }} join pause"
    )
    run.until_paused()
    stats = bench.mount.cat_stats()
    assert [p["pgfault_xip"] for p in stats["processes"] if p["pid"] == run.pid] == [31]
    assert bench.charged() == (31, 0, 31, 0, 0, 0, 0)
    run.go()
    run.finish()


def test_each_process_has_its_line(bench: Workbench, fresh: Callable[[str], str]) -> None:
    one = bench.start(f"map {fresh('x')} private r read 0-30 pause")
    two = bench.start(f"map {fresh('p')} private r read 0-12 pause")
    for run in (one, two):
        run.until_paused()
    lines = {p["pid"]: p for p in bench.mount.cat_stats()["processes"] if not p["exited"]}
    assert (lines[one.pid]["pgfault_xip"], lines[one.pid]["pgfault_pagecache"]) == (31, 0)
    assert (lines[two.pid]["pgfault_xip"], lines[two.pid]["pgfault_pagecache"]) == (0, 13)
    assert lines[two.pid]["pgmajfault"] == 13
    assert lines[one.pid]["comm"] == "touch"
    for run in (one, two):
        run.go()
        run.finish()
    after = {p["pid"]: p for p in bench.mount.cat_stats()["processes"]}
    assert after[one.pid]["exited"]
    assert after[one.pid]["pgfault_xip"] == 31


def test_a_program_run_from_the_mount(bench: Workbench, mounted: LiveMount, touch: Path) -> None:
    shutil.copy(touch, mounted / "program")
    subprocess.run([str(mounted / "program")], check=True, timeout=20)
    charged, kernel = bench.figures()
    assert charged[0] == sum(kernel) > 3
    assert charged[2] > 0, "its text is XIP"
    assert charged[4] > 0, "its data was written"
    lines = [p for p in mounted.cat_stats()["processes"] if p["comm"] == "program"]
    assert sum(line["pgfault"] for line in lines) == charged[0]
    assert bench.ptes() == (0, 0, 0)


# What happens to files


def test_truncate_takes_the_ptes_behind_the_new_end(
    bench: Workbench, mounted: LiveMount, fresh: Callable[[str], str]
) -> None:
    name = fresh("x")
    run = bench.start(f"map {name} private rw read 0-30 write 20-30 pause")
    run.until_paused()
    assert bench.ptes() == (20, 11, 11)
    os.truncate(mounted / name[1:-1], 25 * PAGE)
    assert bench.ptes() == (20, 5, 5)
    os.truncate(mounted / name[1:-1], 3 * PAGE + 5)
    assert bench.ptes() == (4, 0, 0)
    assert bench.charged() == (42, 0, 31, 0, 11, 0, 0)
    run.go()
    run.finish()


def test_an_unlinked_mapped_file_is_counted_to_its_end(
    bench: Workbench, mounted: LiveMount, fresh: Callable[[str], str]
) -> None:
    name = fresh("x")
    run = bench.start(f"map {name} private r read 0-14 pause read 15-30 pause")
    run.until_paused()
    os.unlink(mounted / name[1:-1])
    run.go()
    run.until_paused()
    assert bench.charged() == (31, 0, 31, 0, 0, 0, 0)
    run.go()
    run.finish()
    assert bench.ptes() == (0, 0, 0)


def test_mapcount_and_refcount_count_the_mappings(
    bench: Workbench, mounted: LiveMount, fresh: Callable[[str], str]
) -> None:
    name = fresh("p")
    one = bench.start(f"map {name} private r read 0-30 pause")
    one.until_paused()
    assert mounted.pages(name[1:-1]) == [("P", 0, 31, 2, 1)]
    two = bench.start(f"part {name} shared r 4 5 read 0 read 1 read 2 read 3 read 4 pause")
    two.until_paused()
    assert mounted.pages(name[1:-1]) == [
        ("P", 0, 4, 2, 1),
        ("P", 4, 5, 3, 2),
        ("P", 9, 22, 2, 1),
    ]
    one.go()
    one.finish()
    assert mounted.pages(name[1:-1]) == [
        ("P", 0, 4, 1, 0),
        ("P", 4, 5, 2, 1),
        ("P", 9, 22, 1, 0),
    ]
    two.go()
    two.finish()
    assert mounted.pages(name[1:-1]) == [("P", 0, 31, 1, 0)]


def test_a_mapping_sees_the_new_kind_at_its_next_touch(
    bench: Workbench, mounted: LiveMount, fresh: Callable[[str], str]
) -> None:
    name = fresh("x")
    run = bench.start(
        f"map {name} private rw read 0-30 write 30 pause read 0-30 pause read 0-30 pause"
    )
    run.until_paused()
    assert bench.charged() == (32, 0, 31, 0, 1, 0, 0)
    assert mounted.migrate(name[1:-1], "pagecache")["moved"] == 31
    assert bench.ptes() == (0, 1, 1), "the private copy is left, all else is unmapped"
    run.go()
    run.until_paused()
    charged, kernel = bench.figures()
    assert charged == (30, 0, 0, 30, 0, 0, 0)
    assert sum(kernel) == 30
    assert bench.ptes() == (0, 31, 1)
    assert mounted.migrate(name[1:-1], "xip")["moved"] == 31
    run.go()
    run.until_paused()
    assert bench.charged() == (30, 0, 30, 0, 0, 0, 0)
    assert bench.ptes() == (30, 1, 1)
    run.go()
    run.finish()


def test_evicted_pages_are_major_again(
    live: Mounts, bench_of: Callable[[LiveMount], Workbench]
) -> None:
    """16 frames, 31 pages: 15 are gone when the last is read, and unmapped where they were."""
    image = live.image()
    fill(image, {"p": PageKind.PAGECACHE})
    mount = live.mount(image, "observe=tracefs", "ram=64K")
    bench = bench_of(mount)
    run = bench.start("map {p} private r read 0-30 pause")
    run.until_paused()
    assert bench.figures() == ((31, 31, 0, 31, 0, 0, 0), (0, 31))
    letters = mount.letters("p")
    assert Counter(letters) == {"p": 15, "P": 16}
    assert bench.ptes() == (0, 16, 0)
    evicted = [page for page in range(N) if letters[page] == "p"]
    wait_until(
        "the kernel dropping the evicted",
        lambda: mount.cat_stats()["migration"]["kernel_invalidations"] > 0,
    )
    other = bench.start(f"map {{p}} private r {' '.join(f'read {page}' for page in evicted)} pause")
    other.until_paused()
    assert bench.figures() == ((15, 15, 0, 15, 0, 0, 0), (0, 15))
    assert mount.vmstat()["pgevict"] == 30
    for toucher in (run, other):
        toucher.go()
        toucher.finish()
    assert bench.ptes() == (0, 0, 0)


def test_the_threshold_policy_promotes_at_the_nth_fault(
    live: Mounts, bench_of: Callable[[LiveMount], Workbench]
) -> None:
    image = live.image()
    fill(image, {"x": PageKind.XIP}, pages=1)
    mount = live.mount(image, "observe=tracefs", "policy=threshold,promote=3")
    bench = bench_of(mount)
    for _ in range(2):
        bench.run("map {x} private r read 0")
    assert bench.charged() == (2, 0, 2, 0, 0, 0, 0)
    assert mount.letters("x") == "X"
    bench.run("map {x} private r read 0")
    assert bench.charged() == (1, 0, 1, 0, 0, 0, 0)
    wait_until("the promotion", lambda: mount.letters("x") == "P")
    bench.run("map {x} private r read 0")
    assert bench.charged() == (1, 0, 0, 1, 0, 0, 0)
    vmstat = mount.vmstat()
    assert (vmstat["pgpromote_success"], vmstat["pgmigrate_success"]) == (1, 1)


@pytest.mark.parametrize(
    ("rules", "private", "shared"),
    [
        # (xip, cow, extra): 2.6.32 reuses the raw PTE of a shared mapping after a second fault.
        ("2.6.32", (0, 31, 31), (31, 0, 31)),
        ("3.7", (0, 31, 31), (31, 0, 31)),
        # Rule F13: the seed's tree copies in a shared mapping too.
        ("seed", (0, 31, 31), (0, 31, 31)),
    ],
)
def test_other_rules_charge_the_same_faults_otherwise(
    live: Mounts,
    bench_of: Callable[[LiveMount], Workbench],
    rules: str,
    private: tuple[int, ...],
    shared: tuple[int, ...],
) -> None:
    image = live.image()
    fill(image, {"a": PageKind.XIP, "b": PageKind.XIP})
    bench = bench_of(live.mount(image, "observe=tracefs", f"rules={rules}"))
    bench.run("map {a} private rw write 0-30")
    charged = bench.charged()
    assert (charged[0], charged[2], charged[4], charged[6]) == (31, *private)
    bench.run("map {b} shared rw write 0-30")
    charged = bench.charged()
    assert (charged[0], charged[2], charged[4], charged[6]) == (31, *shared)


def test_read_and_write_calls_are_no_faults(bench: Workbench, mounted: LiveMount) -> None:
    (mounted / "calls").write_bytes(bytes(31 * PAGE))
    assert (mounted / "calls").read_bytes() == bytes(31 * PAGE)
    assert bench.figures() == ((0, 0, 0, 0, 0, 0, 0), (0, 0))


def test_nothing_was_left_unfollowed(bench: Workbench) -> None:
    """Last: what this module did can be followed but for fault-around."""
    unfollowed = bench.mount.cat_stats()["observer"]["unfollowed"]
    assert set(unfollowed) <= {"fault-around windows over XIP or evicted pages"}
