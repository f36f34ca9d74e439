"""``xipfs verify`` after calls whose effect on page tables no record tells page by page.

What they did is right or unknown, and known again soon after; never a difference.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import LiveMount, Mounts, wait_until
from t5_accounting import fill
from t5_run import build
from t5_verify import N, process, verify

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

#: Maps a file and reads it whole; for each line a call, then a line. d: process_madvise(DONTNEED)
#: of its own pages 0-7. r: remap_file_pages, its pages 0-7 show 16-23 from now on. t: touch page 4.
PROGRAM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

int main(int count, char **words)
{
	char line[8];
	volatile char sink;
	int file = open(words[1], O_RDWR);
	char *base = mmap(0, 31 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	struct iovec pages = { base, 8 * 4096 };
	int own = syscall(SYS_pidfd_open, getpid(), 0);
	for (int page = 0; page < 31; page++)
		sink = base[page * 4096];
	puts("mapped");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		long result = 0;
		switch (line[0]) {
		case 'd': result = syscall(SYS_process_madvise, own, &pages, 1, MADV_DONTNEED, 0); break;
		case 'r': result = syscall(SYS_remap_file_pages, base, 8 * 4096, 0, 16, 0); break;
		case 't': sink = base[4 * 4096 + 7]; break;
		}
		printf("%ld\n", result);
		fflush(stdout);
	}
	return 0;
}
"""


@pytest.fixture(scope="module")
def mount(shared: Mounts) -> LiveMount:
    image = shared.image()
    fill(image, {"x": PageKind.XIP})
    return shared.mount(image, "observe=tracefs")


@pytest.fixture
def program(mount: LiveMount, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [build(tmp_path, PROGRAM), mount / "x"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "mapped\n"
            wait_until("all is known", lambda: not verify(mount)["pages_unknown"])
            yield running
        finally:
            running.kill()


def call(program: subprocess.Popen[str], letter: str) -> int:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(f"{letter}\n")
    program.stdin.flush()
    return int(program.stdout.readline())


def paged_out(program: subprocess.Popen[str]) -> int:
    """Have another process page memory out: all file mappings of this one, as madvise can."""
    maps = Path(f"/proc/{program.pid}/maps").read_text().splitlines()
    start, end = (
        int(word, 16) for word in next(m for m in maps if m.endswith("/x")).split()[0].split("-")
    )

    class Iovec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    descriptor = os.pidfd_open(program.pid)
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(440), ctypes.c_long(descriptor), ctypes.byref(Iovec(start, end - start))]
    words += [ctypes.c_long(each) for each in (1, 21, 0)]
    result = int(libc.syscall(*words))
    os.close(descriptor)
    return result


@pytest.mark.parametrize(
    ("change", "result"),
    [
        (lambda program: call(program, "d"), 8 * 4096),
        (lambda program: call(program, "r"), 0),
        (paged_out, N * 4096),
    ],
    ids=["process_madvise", "remap_file_pages", "process_madvise of another"],
)
def test_what_nobody_told_is_unknown_and_then_known(
    mount: LiveMount,
    program: subprocess.Popen[str],
    change: Callable[[subprocess.Popen[str]], int],
    result: int,
) -> None:
    before = mount.cat_stats()["observer"]["audit"]["pages_differed"]
    pid = str(program.pid)
    assert process(verify(mount, "--pid", pid), program.pid)["pages_resident"] == N
    assert change(program) == result
    # Of all: mapcounts tell of which pages the PTEs are.
    first = verify(mount)
    assert (first["pages_differ"], first["copies_differ"]) == (0, 0), first
    assert call(program, "t") == 0
    wait_until("all is known", lambda: verify(mount)["mapcounts_compared"] is not None, 30)
    wait_until("a good look", lambda: verify(mount, "--pid", pid)["pages_compared"] == N, 30)
    last = process(verify(mount, "--pid", pid), program.pid)
    assert last["pages_differ"] == 0
    assert last["pages_resident"] == last["rss_pages_smaps"]
    assert mount.cat_stats()["observer"]["audit"]["pages_differed"] == before
