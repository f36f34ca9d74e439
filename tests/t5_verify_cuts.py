"""``xipfs verify`` while another program has pages dropped by what it was answered.

The kernel drops them in the thread that asked, behind our answer. That thread gets hardly any
processor here, so that looks fall into the time between.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until
from t5_accounting import Toucher, fill

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

N = 31
ROUNDS = int(os.environ.get("XIPFS_TEST_ROUNDS", "10"))

#: On one processor, behind whatever else wants it; does one line's command, and says when it is
#: done.
SLOW = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR)
os.sched_setaffinity(0, {int(sys.argv[2])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print("ready", flush=True)
for line in sys.stdin:
    if line == "cut\\n":
        os.ftruncate(file, 4096)
    else:
        os.stat(sys.argv[1])
    print("done", flush=True)
"""


@pytest.fixture
def mount(live: Mounts) -> LiveMount:
    image = live.image()
    fill(image, {"x": PageKind.XIP, "warm": PageKind.XIP})
    return live.mount(image, "observe=tracefs")


@contextlib.contextmanager
def slow_program(mount: LiveMount) -> Iterator[subprocess.Popen[str]]:
    """A program as above, and two that keep its processor busy."""
    cpu = max(os.sched_getaffinity(0))
    busy = [
        subprocess.Popen(["taskset", "-c", str(cpu), "sh", "-c", "while :; do :; done"])
        for _ in range(2)
    ]
    program = subprocess.Popen(
        [sys.executable, "-c", SLOW, mount / "x", str(cpu)], stdin=-1, stdout=-1, text=True
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        yield program
    finally:
        program.kill()
        program.communicate()
        for each in busy:
            each.kill()
            each.wait()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["cut", "stat"])
def test_pages_that_another_program_has_dropped_never_differ(
    mount: LiveMount, touch: Path, what: str
) -> None:
    words = f"map {mount / 'x'} private r repeat 1000 {{ read 0-{N - 1} pause }}"
    mapper = Toucher(touch, mount / "warm", words)
    look = (mount / ".xipfs" / f"verify.{mapper.pid}.json").read_bytes
    try:
        with slow_program(mount) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            for _ in range(ROUNDS):
                mapper.until_paused()
                wait_until("all is known", lambda: not json.loads(look())["pages_unknown"])
                if what == "stat":
                    # The kernel learns of another time, and drops what it has cached.
                    with (mount / "x").open("r+b") as file:
                        file.write(b"y")
                program.stdin.write(f"{what}\n")
                program.stdin.flush()
                while not select.select([program.stdout], [], [], 0)[0]:
                    answer = json.loads(look())
                    assert answer["pages_differ"] == 0, answer
                assert program.stdout.readline() == "done\n"
                wait_until("it is known again", lambda: not json.loads(look())["pages_unknown"])
                os.truncate(mount / "x", N * PAGE)
                mapper.go()
    finally:
        mapper.process.kill()
        mapper.process.communicate()
    assert mount.cat_stats()["observer"]["audit"]["pages_differed"] == 0
