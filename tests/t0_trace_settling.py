"""Whether a fault is over, asked of /proc while a real program sleeps, runs and stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import wait_until

from xipfs.trace import events, proc
from xipfs.trace.settling import RAN_NS, is_over
from xipfs.trace.threads import Space, Thread
from xipfs.trace.vmas import Vma

PAGE = 4096
READ, WRITE = 4, 6
MAPPED, COPIED, GONE = 0, 1, 2
#: Maps a file, reads it, copies page COPIED and gives page GONE back; then waits, or runs on.
PROGRAM = """
import ctypes, mmap, sys
with open(sys.argv[1], "rb") as file:
    memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
bytes(memory)
memory[1 * 4096] = 1
memory.madvise(mmap.MADV_DONTNEED, 2 * 4096, 4096)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
if sys.argv[2] == "sleep":
    sys.stdin.read()
while True:
    pass
"""


class Program:
    """The program, past all that it does to its memory."""

    def __init__(self, file: Path, then: str) -> None:
        words = [sys.executable, "-c", PROGRAM, str(file), then]
        self.process = subprocess.Popen(words, stdin=-1, stdout=-1)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        self._start = int(self.process.stdout.readline())
        if then == "sleep":
            wait_until("its sleep", lambda: proc.in_system_call(self.pid))

    def fault(self, page: int, error: int = READ, *, kernel: bool = False) -> Thread:
        """Return its thread as it is while a fault on ``page`` is open."""
        thread = Thread(self.pid, self.pid, Space(1, self.pid))
        end = self._start + 3 * PAGE
        thread.pf_vma = Vma(self._start, end, ino=1, pgoff=0, prot=3, shared=False)
        thread.pf_open, thread.pf_last_ns = True, 1000
        thread.pf_ino, thread.pf_index = 1, page
        thread.pf_address = self._start + page * PAGE + 123
        thread.pf_error, thread.pf_kernel = error, kernel
        return thread


Start = Callable[[str], Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * PAGE))
    running: list[Program] = []

    def begin(then: str) -> Program:
        running.append(Program(file, then))
        return running[-1]

    yield begin
    for program in running:
        program.process.kill()
        program.process.communicate()


def test_a_thread_in_a_system_call_has_left_its_own_fault(start: Start) -> None:
    program = start("sleep")
    assert is_over(program.fault(GONE)) is True
    untraced = program.fault(GONE)
    untraced.pf_origin = events.UNTRACED
    assert is_over(untraced) is True
    # Waiting for its page: whether for the call itself, only a record will tell.
    untraced.pf_added = True
    assert is_over(untraced) is False


def test_a_fault_of_the_call_itself(start: Start) -> None:
    program = start("sleep")
    assert is_over(program.fault(MAPPED, kernel=True)) is True
    waiting = program.fault(GONE, kernel=True)
    waiting.pf_added = True
    assert is_over(waiting) is False
    # It found no page, or another mapping's was meant: it sleeps as no fault does.
    assert is_over(program.fault(GONE, kernel=True)) is True


@pytest.mark.parametrize(
    ("page", "error", "over"),
    [
        (MAPPED, READ, True),
        (COPIED, READ, True),
        (COPIED, WRITE, True),
        (MAPPED, WRITE, None),
        (GONE, READ, None),
        (GONE, WRITE, None),
    ],
)
def test_a_running_thread_is_asked_for_its_page(
    start: Start, page: int, error: int, over: bool | None
) -> None:
    assert is_over(start("run").fault(page, error)) is over


def test_a_shared_page_is_not_copied(start: Start) -> None:
    thread = start("run").fault(MAPPED, WRITE)
    assert thread.pf_vma is not None
    thread.pf_vma.shared = True
    assert is_over(thread) is True


def test_a_page_that_is_gone_again_takes_time_of_the_thread_s_own(start: Start) -> None:
    program = start("run")
    thread = program.fault(GONE)
    assert is_over(thread) is None
    began_ns = proc.run_ns(program.pid)
    wait_until("its time", lambda: is_over(thread), timeout_s=60)
    assert proc.run_ns(program.pid) - began_ns >= RAN_NS
    # A newer record begins it anew.
    thread.pf_last_ns += 1
    assert is_over(thread) is None
    waiting = program.fault(GONE)
    waiting.pf_added = True
    began_ns = proc.run_ns(program.pid)
    assert is_over(waiting) is None
    wait_until("more", lambda: proc.run_ns(program.pid) > began_ns + 2 * RAN_NS, timeout_s=60)
    assert is_over(waiting) is None, "this page's I/O makes another record"


def test_a_stopped_thread_runs_no_time(start: Start) -> None:
    program = start("run")
    # Else it may be stopped in the call that said where its memory is.
    began_ns = proc.run_ns(program.pid)
    wait_until("the loop", lambda: proc.run_ns(program.pid) > began_ns + RAN_NS, timeout_s=60)
    os.kill(program.pid, signal.SIGSTOP)
    wait_until("the stop", lambda: proc.in_system_call(program.pid) is False)
    assert is_over(program.fault(GONE)) is False
    assert is_over(program.fault(MAPPED)) is True


def test_what_ends_a_fault_at_once(start: Start) -> None:
    program = start("run")
    thread = program.fault(GONE)
    thread.pf_signal = signal.SIGBUS
    assert is_over(thread) is True
    program.process.kill()
    program.process.wait()
    assert is_over(program.fault(GONE)) is True
