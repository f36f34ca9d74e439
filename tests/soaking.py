"""The soak: four processes change and check shared files while random ranges of them migrate.

Used by ``tools/soak`` for minutes and by ``t4_soak.py`` for one. Every wait is bounded: when one of
them has done nothing for ``STUCK_S`` the kernel stacks of all concerned are told, the connection is
aborted and the soak fails. After each leg of at most ``LEG_S`` all stand still and the kernel's
page tables are compared (with tracefs). At the end the image is mounted anew and holds exactly
what its writers knew last.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from live import LiveMount, Mounts, mounts_below, xipfs
from soak_worker import (
    FILES,
    LINES,
    PAGE,
    SHARED_BYTES,
    SHARED_PAGES,
    TAIL_PAGES,
    WORKERS,
    SoakError,
    Worker,
    file_words,
)

from xipfs.cli.client import RequestError, request

Progress = Callable[[float, "Outcome"], None]
STUCK_S = 30.0
LEG_S = 60.0
#: Its place among those that are heard, behind the workers.
_MIGRATOR = WORKERS


@dataclass
class Outcome:
    """What a soak did."""

    operations: dict[str, int] = field(default_factory=dict)
    migrations: int = 0
    pages_moved: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    vmstat: dict[str, int] = field(default_factory=dict)
    #: Times that page tables were compared, and pages compared in all of them.
    verified: int = 0
    pages_compared: int = 0


def _work(number: int, directory: Path, seed: int, pipe: Connection) -> None:
    worker = Worker(number, directory, seed)
    try:
        told_s = 0.0

        def alive() -> None:
            nonlocal told_s
            if time.monotonic() - told_s > 1:
                told_s = time.monotonic()
                pipe.send(("alive",))

        while seconds := pipe.recv():
            worker.run(time.monotonic() + seconds, alive)
            pipe.send(("done", worker.operations))
        # The mappings were there while the page tables were compared.
        worker.check_all()
        pipe.send(("last", worker.known, worker.tail))
    except SoakError as error:
        pipe.send(("error", str(error)))


def _migrate(pipe: Connection, mount: LiveMount, inos: list[int], seed: int) -> None:
    """Move random ranges of random files, but between "rest" and "go on", until "stop"."""
    chance = random.Random(~seed)
    while True:
        if pipe.poll():
            word = pipe.recv()
            if word == "rest":
                pipe.send({"resting": True})
                word = pipe.recv()
            if word == "stop":
                return
        ino = chance.choice(inos)
        first = chance.randrange(SHARED_PAGES)
        count = chance.randint(1, SHARED_PAGES + TAIL_PAGES - first)
        if chance.random() < 0.7:  # the tail may be gone by now: then only the shared part
            count = min(count, SHARED_PAGES - first)
        files = [{"ino": ino, "ranges": [[first, count]]}]
        if chance.random() < 0.2:
            files = [{"ino": each, "ranges": [[0, SHARED_PAGES]]} for each in inos]
        to = chance.choice(["xip", "pagecache"])
        try:
            for answer in request(mount.mount, "migrate", to=to, files=files):
                if "result" in answer:
                    pipe.send(answer["result"])
        except RequestError as error:
            if "reach outside the file" not in str(error):
                pipe.send({"error": str(error)})
                return


class Soak:
    """One soak on a mount."""

    def __init__(self, mount: LiveMount, seed: int) -> None:
        self.mount = mount
        self.outcome = Outcome()
        context = multiprocessing.get_context("fork")
        initial = [file_words(file, np.zeros(LINES, np.uint64)) for file in range(FILES)]
        for file in range(FILES):
            (mount / f"{file}").write_bytes(initial[file].tobytes())
        inos = [(mount / f"{file}").stat().st_ino for file in range(FILES)]
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.migrator, theirs = context.Pipe()
        mover = context.Process(target=_migrate, args=(theirs, mount, inos, seed), daemon=True)
        for number in range(WORKERS):
            ours, pipe = context.Pipe()
            args = (number, mount.directory, seed, pipe)
            self.processes.append(context.Process(target=_work, args=args, daemon=False))
            self.pipes.append(ours)
        self.processes.append(mover)
        for process in self.processes:
            process.start()

    def run(self, seconds: float, progress: Progress) -> None:
        """Go leg by leg; fail on the first error, and when nothing moves any more."""
        done_s = 0.0
        while done_s < seconds:
            leg_s = min(LEG_S, seconds - done_s)
            for pipe in self.pipes:
                pipe.send(leg_s)
            self._leg(done_s, progress)
            done_s += leg_s
            self._rest()
            self.verify()
            self.migrator.send("go on" if done_s < seconds else "stop")
        self.processes[-1].join(STUCK_S)

    def _leg(self, before_s: float, progress: Progress) -> None:
        """Wait until every worker is done with the leg; none, nor the migrator, may stand still."""
        start = time.monotonic()
        heard = dict.fromkeys([*range(WORKERS), _MIGRATOR], start)
        running = set(range(WORKERS))
        self.outcome.operations.clear()
        while running:
            for number in sorted(running):
                if self.pipes[number].poll(0.02):
                    heard[number] = time.monotonic()
                    self._progress_of(number, running)
            while self.migrator.poll():
                self._count(self.migrator.recv())
                heard[_MIGRATOR] = time.monotonic()
            progress(before_s + time.monotonic() - start, self.outcome)
            for number in (*running, _MIGRATOR):
                if time.monotonic() - heard[number] > STUCK_S:
                    who = "the migrator" if number == _MIGRATOR else f"worker {number}"
                    self.give_up(who)

    def _progress_of(self, number: int, running: set[int]) -> None:
        message = self._message(self.pipes[number], "alive", "done")
        if message[0] == "done":
            running.discard(number)
            for name, count in message[1].items():
                self._add(self.outcome.operations, name, count)

    def _rest(self) -> None:
        """Have the migrator stand still."""
        self.migrator.send("rest")
        while True:
            if not self.migrator.poll(STUCK_S):
                self.give_up("the migrator")
            result = self.migrator.recv()
            if "resting" in result:
                return
            self._count(result)

    def verify(self) -> None:
        """Compare the page tables of all workers, if they are known exactly."""
        if self.mount.cat_stats()["observer"]["mode"] != "tracefs":
            return
        done = xipfs("verify", "--json", self.mount.directory, check=False, timeout=60)
        if done.returncode != 0:
            raise SoakError(f"page tables differ:\n{done.stdout}{done.stderr}")
        self.outcome.verified += 1
        self.outcome.pages_compared += json.loads(done.stdout)["pages_compared"]

    def finish(self) -> list[tuple[list[Any], bytes]]:
        """End the workers; return what each knew last and its tail."""
        self.outcome.vmstat = self.mount.cat_stats()["vmstat"]
        last = []
        for number, pipe in enumerate(self.pipes):
            pipe.send(0)
            if not pipe.poll(STUCK_S):
                self.give_up(f"worker {number}")
            last.append(self._message(pipe, "last")[1:])
        for process in self.processes:
            process.join(STUCK_S)
        return last

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join(5)

    def give_up(self, who: str) -> None:
        """Tell where everybody stands, abort the connection, fail."""
        stacks = []
        for pid in [self.mount.pid, *(process.pid for process in self.processes)]:
            for stack in sorted(Path(f"/proc/{pid}/task").glob("*/stack")):
                with contextlib.suppress(OSError):
                    stacks.append(f"{stack}:\n{stack.read_text()}")
        with contextlib.suppress(AssertionError):  # it may say nothing any more
            stacks.append(self.mount.whereabouts())
        self.mount.abort()
        raise SoakError(f"{who} did nothing for {STUCK_S} s:\n" + "\n".join(stacks))

    @staticmethod
    def _message(pipe: Connection, *expected: str) -> Any:
        try:
            message = pipe.recv()
        except EOFError:
            raise SoakError("a worker died") from None
        if message[0] not in expected:
            raise SoakError(message[1])
        return message

    @staticmethod
    def _add(counts: dict[str, int], name: str, count: int) -> None:
        counts[name] = counts.get(name, 0) + count

    def _count(self, result: dict[str, Any]) -> None:
        if "error" in result:
            raise SoakError(f"a migration failed: {result['error']}")
        self.outcome.migrations += 1
        self.outcome.pages_moved += result["moved"]
        for reason, count in result["failed"].items():
            self._add(self.outcome.failed, reason, count)


def run(
    scratch: Path,
    seconds: float,
    seed: int,
    options: list[str],
    progress: Progress,
) -> Outcome:
    """Soak for ``seconds``; raise SoakError if a word was lost, torn or stale, or all stood."""
    with mounts_below(scratch, watchdog_s=2 * seconds + 10 * STUCK_S) as mounts:
        mount = mounts.mount(None, *options)
        soak = Soak(mount, seed)
        try:
            soak.run(seconds, progress)
            last = soak.finish()
        finally:
            soak.end()
        _compare(mounts, mount, last)
    return soak.outcome


def _compare(mounts: Mounts, mount: LiveMount, last: list[tuple[list[Any], bytes]]) -> None:
    """Mount the image anew: each line is what its owner wrote last, each tail what it was."""
    again = mounts.remount(mount, "ro")
    owners = np.arange(LINES) % WORKERS
    for file in range(FILES):
        sequences = np.choose(owners, [known[file] for known, _ in last])
        found = (again / f"{file}").read_bytes()
        if found[:SHARED_BYTES] != file_words(file, sequences).tobytes():
            raise SoakError(f"file {file} of the image mounted anew differs in its shared part")
        if found[SHARED_BYTES:] != last[file][1]:
            raise SoakError(f"file {file} of the image mounted anew differs in its tail")


def as_json(outcome: Outcome, seed: int) -> str:
    """Return the outcome for programs."""
    return json.dumps({"seed": seed, "page_size_bytes": PAGE, **vars(outcome)})
