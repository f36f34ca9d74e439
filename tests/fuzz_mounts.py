"""Damaged images on real mounts: what ``tools/fuzz --mounts`` and t4_damaged.py run.

Each image is given to a daemon. That must refuse it with an error that says what is damaged and
where, or mount it, whatever a program then does on it: the calls of fuzz_visit.py come back within
10 seconds, with the right bytes or an error, and what was damaged is in the daemon's log. At the
end the daemon ends by itself, without a traceback, and has not used a GiB.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz_visit import Visit, Visitor
from fuzzing import (
    MEMORY_MAX_BYTES,
    NAMES_A_PLACE,
    Case,
    FuzzError,
    Memory,
    Outcome,
    foreign_in,
    make_case,
    titled,
)
from live import INSTANCES, die_with_parent, is_mounted

import xipfs.daemon
from xipfs.cli import main as run_xipfs
from xipfs.errors import MountError
from xipfs.fuse.guard import CONNECTIONS
from xipfs.fuse.mounts import mount_at
from xipfs.image.check import check
from xipfs.trace.session import clean_orphans

assert xipfs.daemon, "imported before the forks, so that no daemon has to"
_RECORD = re.compile(r"\S+ \S+ xipfs\[\d+\] (\w+) (.*)")
_UMOUNT_TRIES = 200
_FOLLOWS = "nothing is changed any more; unmount it"


# How long a step may take


def stalled_s() -> float:
    """Return for how long programs of this machine have waited for a processor since its start."""
    with contextlib.suppress(OSError):
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    return 0.0


def within(step_max_s: float, ready: Callable[[float], object]) -> bool:
    """Return whether ``ready(for so many seconds)`` came true in time.

    Seconds in which this machine had more to do than it could are not counted, up to ten times
    as many: a step that waits for a processor does not hang.
    """
    began, stalled = time.monotonic(), stalled_s()
    while not ready(step_max_s / 20):
        spent = time.monotonic() - began
        if spent - (stalled_s() - stalled) > step_max_s or spent > 10 * step_max_s:
            return False
    return True


def _ends(process: subprocess.Popen[str], timeout_s: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
        return True
    return False


# Many cases


def chosen(seed: int, images: int, mounts: int) -> list[int]:
    """Return the numbers of the cases that are mounted."""
    chance = random.Random(f"{seed} mounts")
    return sorted(chance.sample(range(images), min(mounts, images)))


def run(
    seed: int,
    numbers: list[int],
    jobs: int,
    scratch: Path,
    progress: Callable[[int, list[str]], None],
    step_max_s: float = 10,
) -> tuple[Outcome, list[str]]:
    """Mount these cases, ``jobs`` at a time; return how they ended and what failed.

    ``progress(done, failures)`` is called after each.
    """
    outcome, failures = Outcome(), []
    # New processes: daemons are forked from them, and the caller's threads and log handlers are
    # none of theirs.
    context = multiprocessing.get_context("spawn")
    work = [(seed, number, scratch, step_max_s) for number in numbers]
    with context.Pool(jobs, initializer=_outlive_interrupts) as pool:
        for done, (part, failure) in enumerate(pool.imap_unordered(_run_one, work), 1):
            outcome.endings += part.endings
            failures += [failure] if failure else []
            progress(done, failures)
    return outcome, failures


def _outlive_interrupts() -> None:
    """Ctrl-C ends the pool's owner; a mount in the middle is ended by its own process first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_one(work: tuple[int, int, Path, float]) -> tuple[Outcome, str]:
    seed, number, scratch, step_max_s = work
    outcome = Outcome()
    try:
        judge(make_case(seed, number), outcome, scratch, step_max_s)
    except FuzzError as error:
        return outcome, str(error)
    return outcome, ""


# One case


def judge(case: Case, outcome: Outcome, scratch: Path, step_max_s: float = 10) -> None:
    """Mount the case below ``scratch``; raise FuzzError if it ends in a way no case may."""
    options = options_of(case)
    with titled(case, f"mounted with {options}"):
        place = scratch / str(case.number)
        place.mkdir()
        mount = FuzzMount(case, place, options, step_max_s)
        try:
            outcome.endings.update(mount.run())
        finally:
            mount.end()


def options_of(case: Case) -> str:
    """Return the mount options of a case: also with an observer and a policy, which read maps."""
    chance = random.Random(f"{case.seed} {case.number} mount")
    options = [f"ram={chance.choice(('128K', '1M'))}"]
    if chance.random() < 0.5:
        options.append("observe=off")
    else:
        policy = chance.choice(("off", "fifo", "clock", "tpp"))
        options += ["observe=auto", "hint=100", f"policy={policy}"]
    if chance.random() < 0.15:
        options.append("ro")
    return ",".join(options)


class FuzzMount:
    """One image given to a daemon of its own."""

    def __init__(self, case: Case, place: Path, options: str, step_max_s: float) -> None:
        self._case = case
        self._image, self._directory, self._log = place / "image", place / "mnt", place / "log"
        self._image.write_bytes(case.image)
        self._log.touch()
        self._directory.mkdir()
        self._options = options
        self._step_max_s = step_max_s
        self._abort_fd: int | None = None
        self._visitor = 0
        self._ready_fd, told = os.pipe()
        self.daemon = os.fork()
        if self.daemon == 0:
            self._be_daemon(told)
        os.close(told)
        self._pidfd = os.pidfd_open(self.daemon)
        self._ended = False

    def run(self) -> list[str]:
        """Return how the case ended; raise FuzzError if it may not end so."""
        told = self._wait_until_ready()
        if "error" in told:
            self._await_end(1)
            if not re.search(NAMES_A_PLACE, told["error"]):
                raise FuzzError(f"a refusal that names no place: {told['error']}")
            if is_mounted(self._directory):
                raise FuzzError("refused, and mounted")
            self._judge_log()
            return ["refused"]
        visit = self.visit()
        self._umount()
        self._await_end(0)
        named = self._judge_log()
        if (visit.errnos[errno.EIO] or visit.sigbus) and not named:
            raise FuzzError("EIO was answered, and the daemon's log names no damage")
        endings = self._judge_bytes(visit)
        if visit.sigbus:
            endings.append("a touch of a mapping ended in SIGBUS")
        if told["damage"]:
            return ["read-only, for damage met at the mount", *endings]
        if "ro" in self._options.split(","):
            return ["read-only, as asked for", *endings]
        return [f"read-write, {'until damage was met' if visit.damage else 'to the end'}", *endings]

    # The daemon

    def _be_daemon(self, ready_fd: int) -> None:
        """In the child. Never returns."""
        code = 99
        try:
            # As after Ctrl-C in a terminal it unmounts.
            die_with_parent(signal.SIGTERM)
            null = os.open(os.devnull, os.O_RDWR)
            log = os.open(self._log, os.O_WRONLY | os.O_APPEND)
            for target, source in ((0, null), (1, null), (2, log)):
                os.dup2(source, target)
            words = ["mount", "-f", "--ready-fd", str(ready_fd), "-o", self._options]
            code = run_xipfs([*words, str(self._image), str(self._directory)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _wait_until_ready(self) -> dict[str, Any]:
        """Return what the daemon told: that it is ready, or the error it refuses with."""
        told = b""
        while True:
            if not self._within(lambda s: select.select([self._ready_fd], [], [], s)[0]):
                raise FuzzError(f"the mount was not there after {self._step_max_s} s")
            part = os.read(self._ready_fd, 1 << 16)
            if not part:
                break
            told += part
        if not told:
            self._await_end(1)
            raise FuzzError(f"the daemon said nothing: {self._log.read_text()}")
        answer: dict[str, Any] = json.loads(told)
        if "error" not in answer:
            self._open_abort()
        return answer

    def _open_abort(self) -> None:
        # Opened now: the number may come to mean a later mount, the open file does not.
        abort = CONNECTIONS / str(mount_at(self._directory).minor) / "abort"
        self._abort_fd = os.open(abort, os.O_WRONLY | os.O_CLOEXEC)

    def _await_end(self, code: int) -> None:
        """Reap the daemon; raise FuzzError unless it ended with ``code`` and within its memory."""
        if not self._within(lambda s: select.select([self._pidfd], [], [], s)[0]):
            raise FuzzError(f"the daemon still ran after {self._step_max_s} s")
        _, status, used = os.wait4(self.daemon, 0)
        self._ended = True
        ended = os.waitstatus_to_exitcode(status)
        if ended != code:
            raise FuzzError(f"the daemon ended with {ended}, not {code}: {self._log.read_text()}")
        if used.ru_maxrss << 10 > MEMORY_MAX_BYTES:
            raise FuzzError(f"the daemon used {used.ru_maxrss >> 10} MiB")
        left = [path.name for path in INSTANCES.glob(f"xipfs-{self.daemon}-*")]
        if left:
            raise FuzzError(f"tracefs instances left: {left}")

    def _judge_log(self) -> bool:
        """Return whether damage was logged; raise FuzzError if anything else was."""
        named = False
        for line in self._log.read_text().splitlines():
            record = _RECORD.fullmatch(line)
            if record is None:
                raise FuzzError(f"the daemon's log: {self._log.read_text()}")
            level, text = record.groups()
            if level != "INFO":
                named |= bool(re.search(NAMES_A_PLACE, text))
                if not re.search(NAMES_A_PLACE, text) and not text.endswith(_FOLLOWS):
                    raise FuzzError(f"an error in the log that names no place: {line}")
        return named

    # The program

    def visit(self) -> Visit:
        """Have a program use the mount; return what it met."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        self._visitor = os.fork()
        if self._visitor == 0:
            self._be_visitor(sender)
        sender.close()
        step = "beginning"
        while True:
            if not self._within(receiver.poll):
                raise FuzzError(f"a program hung for {self._step_max_s} s: {step}")
            try:
                kind, told = receiver.recv()
            except EOFError:
                raise FuzzError(f"a program died: {step}") from None
            if kind == "failed":
                raise FuzzError(told)
            if kind == "done":
                os.waitpid(self._visitor, 0)
                self._visitor = 0
                visit: Visit = told
                return visit
            step = told

    def _be_visitor(self, sender: Connection) -> None:
        """In the child. Never returns."""
        try:
            os.setsid()
            die_with_parent()
            directory = os.fsencode(self._directory)
            # Every second mount that has an observer: a recording asks for all maps.
            record = "policy" in self._options and self._case.number % 2 == 1
            visitor = Visitor(directory, lambda step: sender.send(("step", step)), record=record)
            sender.send(("done", visitor.run()))
        except FuzzError as error:
            sender.send(("failed", str(error)))
        except BaseException:
            sender.send(("failed", traceback.format_exc()))
        finally:
            os._exit(0)

    def _judge_bytes(self, visit: Visit) -> list[str]:
        case = self._case
        for found in visit.read:
            if foreign := foreign_in(found):
                if not (case.forged and check(Memory(case.image, writable=False), "image")):
                    raise FuzzError(foreign)
                return ["served another file's block, forged"]
        return []

    # The end

    def _umount(self) -> None:
        # Whoever looks through all mounts of a machine keeps one busy for a moment.
        for _ in range(_UMOUNT_TRIES):
            command = ["fusermount3", "-u", "--", str(self._directory)]
            unmounting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            stuck = not self._within(lambda s: _ends(unmounting, s))  # noqa: B023
            if stuck:
                self._abort()
            _, said = unmounting.communicate()
            if stuck:
                raise FuzzError(f"unmounting took {self._step_max_s} s")
            if unmounting.returncode == 0:
                return
            time.sleep(0.05)
        raise FuzzError(f"not unmounted: {said.strip()}")

    def _within(self, ready: Callable[[float], object]) -> bool:
        return within(self._step_max_s, ready)

    def _abort(self) -> None:
        """Fail every request that waits for the daemon."""
        with contextlib.suppress(OSError, MountError):
            if self._abort_fd is None:
                self._open_abort()
            assert self._abort_fd is not None
            os.write(self._abort_fd, b"1")

    def end(self) -> None:
        """End whatever is left of it, whatever state it is in."""
        if self._visitor or not self._ended or is_mounted(self._directory):
            self._abort()
        if self._visitor:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._visitor, signal.SIGKILL)
            os.waitpid(self._visitor, 0)
        if not self._ended:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitpid(self.daemon, 0)
            clean_orphans()
        while is_mounted(self._directory):
            subprocess.run(["umount", "-l", str(self._directory)], check=True, timeout=20)
        for descriptor in (self._abort_fd, self._ready_fd, self._pidfd):
            if descriptor is not None:
                os.close(descriptor)
        shutil.rmtree(self._image.parent)
