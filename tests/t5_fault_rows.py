"""Each kind of fault once, by a C program that says where and when; and the rows a trace has of it.

The program prints of each step its name, thread, address and the times before and after; what the
row must say besides is written out here. Pages of different steps lie 32 pages apart, further than
fault-around reaches. A read that a present PTE refused (``handled`` protection) is not among them:
no program can provoke one by itself (see t5_fatal_faults.py).
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

import pyarrow.parquet
import pytest
from conftest import needs
from live import LiveMount, Mounts, xipfs
from t5_accounting import fill
from t5_run import build

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

#: Arguments: the directory with the files, and a file elsewhere to write to.
PROGRAM: Final = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGES 200
static const char *directory;
static int scratch;
static char *warm;
static sigjmp_buf back;

static long now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static long faults(void)
{
	struct rusage usage;
	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_minflt + usage.ru_majflt;
}

static char *map(const char *name, int pages, int prot, int flags)
{
	char path[4096];
	snprintf(path, sizeof(path), "%s/%s", directory, name);
	int file = open(path, flags & MAP_SHARED ? O_RDWR : O_RDONLY);
	char *base = mmap(0, pages * 4096L, prot, flags, file, 0);
	if (file < 0 || base == MAP_FAILED)
		exit(1);
	close(file);
	return base;
}

static void step(const char *name, char *address, char how)
{
	volatile char sink;
	char byte = 7;
	long count = faults();
	long before = now();
	switch (how) {
	case 'r': sink = *(volatile char *)address; break;
	case 'w': *(volatile char *)address = 7; break;
	case 'x': ((void (*)(void))address)(); break;
	case 'b': if (!sigsetjmp(back, 1)) sink = *(volatile char *)address; break;
	case 'k': if (pwrite(scratch, address, 1, 0) != 1) exit(2); break;
	case 'K': if (pread(scratch, address, 1, 0) != 1) exit(3); break;
	}
	long after = now();
	count = faults() - count;
	printf("%s %d %d %lu %ld %ld %ld\n", name, getpid(), gettid(), (long)address, before, after,
		count);
	fflush(stdout);
}

static void on_bus(int number) { siglongjmp(back, 1); }

/* Have the mount charge all until now: while we live, our maps name the mapping past whose end. */
static void see(void)
{
	char path[4096];
	snprintf(path, sizeof(path), "%s/.xipfs/stats.json", directory);
	int file = open(path, O_RDONLY);
	if (file < 0)
		exit(4);
	close(file);
}

static void *beside(void *unused)
{
	step("thread", warm + 160 * 4096 + 5, 'r');
	return 0;
}

int main(int count, char **words)
{
	pthread_t thread;
	directory = words[1];
	scratch = open(words[2], O_RDWR | O_CREAT, 0600);
	if (pwrite(scratch, "x", 1, 0) != 1 || pread(scratch, &back, 1, 0) != 1)
		return 1;
	signal(SIGBUS, on_bus);
	prctl(PR_SET_NAME, "pro voke");

	warm = map("warm", PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	step("read", warm + 1, 'r');
	step("write", warm + 32 * 4096 + 2, 'w');
	step("write again", warm + 3, 'w');
	step("kernel reads", warm + 64 * 4096 + 4, 'k');
	step("kernel writes", warm + 96 * 4096 + 5, 'K');
	pthread_create(&thread, 0, beside, 0);
	pthread_join(thread, 0);

	char *cached = map("cached", PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	step("cached read", cached + 32 * 4096, 'r');
	step("cached write", cached + 64 * 4096, 'w');
	step("cached write again", cached + 32 * 4096, 'w');

	char *shared = map("warm", PAGES, PROT_READ | PROT_WRITE, MAP_SHARED);
	step("shared read", shared + 128 * 4096, 'r');
	step("shared write again", shared + 128 * 4096, 'w');
	step("shared write", shared + 160 * 4096, 'w');
	char *both = map("cached", PAGES, PROT_READ | PROT_WRITE, MAP_SHARED);
	step("cached shared write", both + 128 * 4096, 'w');

	char *cold = map("cold", PAGES, PROT_READ, MAP_PRIVATE);
	step("cold read", cold + 9 * 4096, 'r');
	char *filled = map("cold cached", PAGES, PROT_READ, MAP_PRIVATE);
	step("cold cached read", filled + 9 * 4096, 'r');

	char *code = map("code", PAGES, PROT_READ | PROT_EXEC, MAP_PRIVATE);
	step("exec", code + 40 * 4096 + 8, 'x');

	char *beyond = map("warm", PAGES + 64, PROT_READ, MAP_PRIVATE);
	step("sigbus", beyond + (PAGES + 40) * 4096L, 'b');
	see();

	long taken = faults(), before = now();
	char *full = map("one", 1, PROT_READ, MAP_PRIVATE | MAP_POPULATE);
	printf("populate %d %d %lu %ld %ld %ld\n", getpid(), gettid(), (long)full, before, now(),
		faults() - taken);
	fflush(stdout);

	if (!fork()) {
		char *mine = map("warm", PAGES, PROT_READ, MAP_PRIVATE);
		prctl(PR_SET_NAME, "child");
		step("child", mine + 192 * 4096L, 'r');
		_exit(0);
	}
	return wait(0) < 0;
}
"""


class Row(NamedTuple):
    """What a step's row says; ``changes``: of refcount, mapcount, file rss, anonymous rss."""

    path: str
    page: int
    access: str
    verdict: str
    handled: str
    pte_made: str
    charged: str
    pte: str
    changes: tuple[int, int, int, int]
    extra: int = 0
    major: int = 0
    protection: int = 0
    mode: str = "user"
    origin: str = "trap"


NOTHING: Final = (0, 0, 0, 0)
COPY: Final = (1, 1, 0, 1)
EXPECTED: Final = {
    "read": Row("warm", 0, "read", "minor", "mapped", "own", "xip", "special", NOTHING),
    # VM_MIXEDMAP maps the XIP page first, and copies it at the second fault.
    "write": Row("warm", 32, "write", "minor", "cow", "own", "cow", "counted", COPY, extra=1),
    "write again": Row(
        "warm", 0, "write", "minor", "cow", "before", "cow", "counted", COPY, protection=1
    ),
    "kernel reads": Row(
        "warm", 64, "read", "minor", "mapped", "own", "xip", "special", NOTHING, mode="kernel"
    ),
    "kernel writes": Row(
        "warm", 96, "write", "minor", "cow", "own", "cow", "counted", COPY, extra=1, mode="kernel"
    ),
    "thread": Row("warm", 160, "read", "minor", "mapped", "own", "xip", "special", NOTHING),
    "cached read": Row(
        "cached", 32, "read", "minor", "mapped", "own", "pagecache", "counted", (1, 1, 1, 0)
    ),
    "cached write": Row("cached", 64, "write", "minor", "cow", "own", "cow", "counted", COPY),
    "cached write again": Row(
        "cached", 32, "write", "minor", "cow", "before", "cow", "counted", (1, 1, -1, 1),
        protection=1,
    ),
    "shared read": Row("warm", 128, "read", "minor", "mapped", "own", "xip", "special", NOTHING),
    "shared write again": Row(
        "warm", 128, "write", "minor", "mkwrite", "before", "xip", "special", NOTHING, protection=1
    ),
    # A shared writable mapping is write-notified (rule F9): inserted read-only, then made writable.
    "shared write": Row(
        "warm", 160, "write", "minor", "mkwrite", "own", "xip", "special", NOTHING, extra=1
    ),
    "cached shared write": Row(
        "cached", 128, "write", "minor", "mkwrite", "own", "pagecache", "counted", (1, 1, 1, 0)
    ),
    # Storage is read by the real kernel; of an XIP page VM_MIXEDMAP reads nothing.
    "cold read": Row("cold", 9, "read", "major", "mapped", "own", "xip", "special", NOTHING),
    # The frame was filled by the READ of this very fault, before it is charged.
    "cold cached read": Row(
        "cold cached", 9, "read", "major", "mapped", "own", "pagecache", "counted", (1, 1, 1, 0),
        major=1,
    ),
    "exec": Row("code", 40, "exec", "minor", "mapped", "own", "xip", "special", NOTHING),
    "sigbus": Row("warm", 240, "read", "sigbus", "sigbus", "none", "sigbus", "none", NOTHING),
    "populate": Row(
        "one", 0, "read", "minor", "mapped", "own", "xip", "special", NOTHING,
        mode="kernel", origin="populate",
    ),
    "child": Row("warm", 192, "read", "minor", "mapped", "own", "xip", "special", NOTHING),
}  # fmt: skip


@pytest.fixture(scope="module")
def mounted(shared: Mounts) -> LiveMount:
    image = shared.image(size_bytes=32 << 20)
    xip, cached = PageKind.XIP, PageKind.PAGECACHE
    fill(image, {"warm": xip, "cached": cached, "cold": xip, "cold cached": cached}, pages=200)
    fill(image, {"code": xip, "one": xip}, pages=200, byte=0xC3)  # ret
    mount = shared.mount(image, "observe=tracefs", "rules=6.1")
    for name in ("warm", "cached", "code", "one"):
        (mount / name).read_bytes()
    return mount


Told = tuple[dict[str, list[str]], dict[str, list[dict[str, Any]]]]
"""By step what the program printed of it, and the rows of its time."""


@pytest.fixture(scope="module")
def recorded(mounted: LiveMount, tmp_path_factory: pytest.TempPathFactory) -> Told:
    scene = tmp_path_factory.mktemp("rows")
    program = build(scene, PROGRAM, "-pthread")
    said = xipfs(
        "run", "--mount", mounted.directory, "-o", scene / "trace", "--report", scene / "report",
        "--", program, mounted.directory, scene / "scratch",
    ).stdout  # fmt: skip
    rows = pyarrow.parquet.read_table(scene / "trace").to_pylist()
    faults = [row for row in rows if row["item"] == "fault"]
    steps = {words[0]: words[1:] for line in said.splitlines() if (words := line.rsplit(" ", 6))}
    times = {name: range(int(told[3]), int(told[4]) + 1) for name, told in steps.items()}
    found = {name: [row for row in faults if row["time_ns"] in times[name]] for name in steps}
    assert sum(map(len, found.values())) == len(faults), "a fault is of no step"
    return steps, found


def test_every_step_ran(recorded: Told) -> None:
    assert list(recorded[0]) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_row_says_all_of_its_fault(recorded: Told, mounted: LiveMount, name: str) -> None:
    steps, rows = recorded
    pid, tid, address = map(int, steps[name][:3])
    (row,) = rows[name]
    wanted = EXPECTED[name]
    changes = ("ref_change", "map_change", "rss_file_change", "rss_anon_change")
    told = {key: row[key] for key in Row._fields if key != "changes"}
    assert told | {"changes": tuple(row[key] for key in changes)} == wanted._asdict()
    assert (row["pid"], row["tid"], row["address"]) == (pid, tid, address)
    assert row["comm"] == ("child" if name == "child" else "pro voke")
    assert row["ino"] == os.stat(mounted / wanted.path).st_ino
    assert (row["cause"], row["pages"], row["detail"]) == ("", None, None)


def test_the_kernel_counts_as_many(recorded: Told) -> None:
    """The first steps of each process fault in pages of its own as well; SIGBUS counts in none."""
    steps, rows = recorded
    counted = {name: int(told[-1]) for name, told in steps.items()}
    for name in ("read", "write", "thread", "child"):
        assert counted.pop(name) >= len(rows[name])
    assert counted.pop("sigbus") == 0
    assert counted == {name: len(rows[name]) for name in counted}


def test_threads_and_children_are_told_apart(recorded: Told) -> None:
    main, thread, child = (recorded[1][name][0] for name in ("read", "thread", "child"))
    assert main["pid"] == main["tid"] == thread["pid"] != thread["tid"]
    assert main["mm"] == thread["mm"] != child["mm"]
    assert child["pid"] == child["tid"] != main["pid"]
