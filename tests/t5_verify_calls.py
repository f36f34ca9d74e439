"""``xipfs verify`` while programs are inside the calls that change what it looks at.

A call takes PTEs away long before it returns, and only then is it known what it did. Whoever looks
meanwhile must not find a difference; nor may such a program be passed over in silence.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until
from proving import foreign
from t5_accounting import fill
from t5_verify import N, verify

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]


@pytest.fixture
def mount(live: Mounts) -> LiveMount:
    image = live.image(size_bytes=96 << 20)
    fill(image, {"x": PageKind.XIP})
    return live.mount(image, "observe=tracefs")


#: Reads 31 pages of a file and unmaps 8 of them, which are gone long before the call returns: it
#: waits until somebody reads of it from a userfaultfd, which a thread does when told to by a line.
HELD_CALL = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int uffd;

static void need(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static void *release(void *unused)
{
    struct uffd_msg message;
    char byte;

    need(read(0, &byte, 1) == 1, "stdin");
    need(read(uffd, &message, sizeof(message)) == sizeof(message), "uffd");
    return unused;
}

int main(int argc, char **argv)
{
    int descriptor = open(argv[argc - 1], O_RDONLY);
    volatile char *base = mmap(NULL, 31 * 4096, PROT_READ, MAP_PRIVATE, descriptor, 0);
    struct uffdio_api api = {
        .api = UFFD_API, .features = UFFD_FEATURE_EVENT_UNMAP | 1 << 15 /* WP_ASYNC */
    };
    struct uffdio_register all = {
        .range = { (unsigned long)base, 31 * 4096 }, .mode = UFFDIO_REGISTER_MODE_WP
    };
    pthread_t thread;
    char byte;

    need(base != MAP_FAILED, "mmap");
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
    need(uffd >= 0, "userfaultfd");
    need(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");
    need(!ioctl(uffd, UFFDIO_REGISTER, &all), "UFFDIO_REGISTER");
    need(!pthread_create(&thread, NULL, release, NULL), "pthread_create");
    for (int page = 0; page < 31; page++)
        byte = base[page * 4096];
    munmap((void *)base, 8 * 4096);
    pthread_join(thread, NULL);
    puts("returned");
    fflush(stdout);
    return read(0, &byte, 1) != 1;
}
"""


@pytest.fixture
def held_call(tmp_path: Path) -> Path:
    source, program = tmp_path / "held.c", tmp_path / "held"
    source.write_text(HELD_CALL)
    subprocess.run(["cc", "-O1", "-pthread", "-o", program, source], check=True)
    return program


def test_a_call_under_way_is_unknown_and_no_difference(mount: LiveMount, held_call: Path) -> None:
    differed = mount.cat_stats()["observer"]["audit"]["pages_differed"]
    in_call = {"its process was inside a fault or a call that changes mappings at each look": N}
    with subprocess.Popen([held_call, mount / "x"], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            call = Path(f"/proc/{process.pid}/syscall")
            wait_until("munmap", lambda: call.read_text().startswith("11 "))
            mapped = foreign.ranges(process.pid, [mount / "x"])
            assert mapped[0][1] - mapped[0][0] == (N - 8) * PAGE, "it has unmapped what it will"
            for _ in range(5):
                answer = verify(mount, "--pid", str(process.pid))
                assert (answer["pages_compared"], answer["pages_differ"]) == (0, 0)
                assert answer["pages_unknown"] == in_call
            assert verify(mount)["pages_unknown"] == in_call
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"returned\n"
            # On a busy machine the record of its return may take a while to be read.
            deadline = time.monotonic() + 20
            while (answer := verify(mount, "--pid", str(process.pid)))["pages_unknown"]:
                assert answer["pages_differ"] == 0
                assert time.monotonic() < deadline, answer
            assert (answer["pages_compared"], answer["pages_differ"]) == (N - 8, 0)
            process.communicate(b"\n")
        finally:
            process.kill()
    assert process.returncode == 0
    assert mount.cat_stats()["observer"]["audit"]["pages_differed"] == differed


#: 64 MiB, and how often a program that takes them in and gives them back is looked at.
LARGE = 1 << 14
LOOKS = int(os.environ.get("XIPFS_TEST_LOOKS", "10"))


def test_large_ranges_given_back_in_a_loop_never_differ(mount: LiveMount, touch: Path) -> None:
    """Looks fall into madvise and between its calls; some must be good, or none is proof."""
    large, pages = mount / "large", f"0-{LARGE - 1}"
    large.write_bytes(b"l" * LARGE * PAGE)
    with large.open("rb") as file:
        # Read ahead for once: a READ for each page would take long.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        file.read()
    words = f"map {large} private r "
    words += f"repeat 1000000 {{ read {pages} sleep 50 advise {pages} dontneed sleep 50 }}"
    compared = unknown = 0
    with subprocess.Popen([touch, *words.split()]) as process:
        try:
            question = mount / ".xipfs" / f"verify.{process.pid}.json"
            wait_until("a look", lambda: json.loads(question.read_bytes())["processes"], 60)
            for _ in range(LOOKS):
                answer = json.loads(question.read_bytes())
                assert answer["pages_differ"] == 0, answer
                compared += bool(answer["pages_compared"])
                unknown += bool(answer["pages_unknown"])
        finally:
            process.kill()
    observer = mount.cat_stats()["observer"]
    assert (observer["audit"]["pages_differed"], observer["lost"]) == (0, 0)
    assert compared > LOOKS // 4, (compared, unknown)
