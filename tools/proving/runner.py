"""Running random programs on a mount and asking xipfs, at each pause, whether it knows them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proving import foreign
from proving.programs import FILE_PAGES, Program
from xipfs.cli.verify import WRONG

PAGE = 4096
COMMANDS = 14
#: Beyond every fault's number: its answer says where the next one will be.
_FAR = 10**12


class DifferenceError(Exception):
    """A program's page tables were not what xipfs believed; says how to run it again."""


@dataclass
class Outcome:
    """What was compared and what was unknown, in pages, over all programs."""

    programs: int = 0
    pauses: int = 0
    pages_compared: int = 0
    pages_unknown: int = 0
    mapcounts_compared: int = 0
    copies_compared: int = 0
    pages_reclaimed: int = 0
    brackets: int = 0
    bracket_faults: int = 0
    """Faults of which the program's own count was compared with the records."""
    unknown_by_reason: dict[str, int] = field(default_factory=dict)


class Runner:
    """Runs programs over the files ``names`` of a mount.

    The mount gets a copy of ``touch`` too, which programs exec. ``environment`` is the programs'.
    ``direct``, a file to be read with O_DIRECT, makes programs unruly: threads share their address
    space, get_user_pages and other processes write to it, reclaim takes pages away. Pages of theirs
    may be unknown.
    """

    def __init__(
        self,
        directory: Path,
        touch: Path,
        names: list[str],
        outcome: Outcome | None = None,
        environment: Mapping[str, str] | None = None,
        direct: Path | None = None,
    ) -> None:
        self._directory = directory
        self._touch = touch
        self._files = [directory / name for name in names]
        self._direct = direct
        self._binary = directory / "tool"
        shutil.copy(touch, self._binary)
        self._environment = environment
        self.outcome = outcome or Outcome()

    def run(self, seed: int) -> None:
        """Run the program of ``seed``; raise DifferenceError if anything differs."""
        how = f"seed {seed} (tools/verify --programs 1 --seed {seed})"
        self.run_random(random.Random(seed), how)

    def run_random(self, rng: random.Random, how: str) -> None:
        """Run the program that ``rng`` gives; ``how`` says how to run it again."""
        files = [str(file) for file in self._files]
        direct = str(self._direct or "")
        program = Program(rng, files, str(self._binary), direct).grow(COMMANDS)
        how = f"{how}: {shlex.join(program.words)}"
        process = subprocess.Popen(
            [self._touch, *program.words],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            cursor = 0
            for number in range(program.pauses):
                told = self._until_paused(how, process)
                if number - 1 in program.brackets:
                    self._compare_bracket(how, process.pid, told, cursor)
                if number % 2:
                    self._act(rng)
                if self._direct is not None:
                    foreign.disturb(rng, process.pid, self._files)
                self._check(how, number)
                if number in program.brackets:
                    cursor = self._faults(_FAR)["next"]
                process.stdin.write("\n")
                process.stdin.flush()
            _, complaint = process.communicate(timeout=60)
            if process.returncode:
                raise DifferenceError(f"{how}: {complaint}")
        finally:
            process.kill()
            with contextlib.suppress(ValueError):
                process.communicate()
        self.outcome.programs += 1

    def _until_paused(self, how: str, process: subprocess.Popen[str]) -> str:
        """Return the line before the one that says that the program pauses."""
        assert process.stdout is not None
        told = line = ""
        while line != "paused\n":
            told, line = line, process.stdout.readline()
            if not line:
                raise DifferenceError(f"{how}: {process.communicate()}")
        return told

    def _faults(self, cursor: int) -> dict[str, Any]:
        text = (self._directory / ".xipfs" / f"faults.{cursor}.json").read_bytes()
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _compare_bracket(self, how: str, pid: int, told: str, cursor: int) -> None:
        """Compare the program's own count of its faults since ``cursor`` with the records."""
        answer = self._faults(cursor)
        assert answer["next"] == answer["end"], "more faults than one answer holds"
        tid, verdict = answer["columns"].index("tid"), answer["columns"].index("verdict")
        seen = [line.split("\t") for line in answer["faults"].splitlines()]
        verdicts = [row[verdict] for row in seen if row[tid] == str(pid)]
        recorded = f"bracket minflt={verdicts.count('minor')} majflt={verdicts.count('major')}\n"
        if recorded != told:
            raise DifferenceError(f"{how}\ngetrusage says {told!r}, the records {recorded!r}")
        self.outcome.brackets += 1
        self.outcome.bracket_faults += len(verdicts)

    def _act(self, rng: random.Random) -> None:
        """Do something to a file from outside: cut and lengthen it, or move pages of it."""
        file = rng.choice(self._files)
        first = rng.randrange(FILE_PAGES)
        if rng.random() < 0.4:
            os.truncate(file, first * PAGE)
            os.truncate(file, FILE_PAGES * PAGE)
            return
        request = {
            "op": "migrate",
            "ino": file.stat().st_ino,
            "to": rng.choice(("xip", "pagecache")),
            "ranges": [[first, rng.randint(1, FILE_PAGES - first)]],
        }
        with open(self._directory / ".xipfs" / "control", "r+b", buffering=0) as control:
            control.write(json.dumps(request).encode())
            while control.read(1 << 16):
                pass

    def _check(self, how: str, number: int) -> None:
        text = (self._directory / ".xipfs" / "verify.1.json").read_bytes()
        answer: dict[str, Any] = json.loads(text)
        wrong = {name: answer[name] for name in WRONG if answer[name]}
        # The machine may reclaim at any time (DAMON), which is no program's doing.
        reclaimed = 0 if self._direct else answer["pages_unknown"].pop("memory was reclaimed", 0)
        self.outcome.pages_reclaimed += reclaimed
        unknown = sum(answer["pages_unknown"].values())
        if wrong or (unknown and self._direct is None):
            told = [line["differences"] for line in answer["processes"] if line["differences"]]
            raise DifferenceError(
                f"{how}\nat pause {number + 1}: {wrong}, unknown {answer['pages_unknown']}, {told}"
            )
        outcome = self.outcome
        outcome.pauses += 1
        outcome.pages_unknown += unknown
        for reason, pages in answer["pages_unknown"].items():
            reasons = outcome.unknown_by_reason
            reasons[reason] = reasons.get(reason, 0) + pages
        outcome.pages_compared += answer["pages_compared"]
        outcome.mapcounts_compared += answer["mapcounts_compared"] or 0
        outcome.copies_compared += answer["copies_compared"]
