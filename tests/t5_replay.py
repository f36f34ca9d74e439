"""A real workload recorded on a real mount under a policy, and replayed: the very same moves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import ENVIRONMENT, ROOT, LiveMount, new_image, wait_until, xipfs
from t5_record import end_recording, recording

from xipfs.cli.client import request
from xipfs.migrate.registry import BUILT_IN
from xipfs.stats.trace_file import TraceReader
from xipfs.stats.trace_items import values_of

Json = dict[str, Any]

#: Maps, stores, reads, writes, moves by hand, cuts and removes files, all by a seed.
WORKLOAD = """
import json, mmap, os, random, sys
directory, seed = sys.argv[1], int(sys.argv[2])
generator = random.Random(seed)
pages = 300
for name in "ab":
    with open(f"{directory}/{name}", "wb") as file:
        file.write(b"x" * (pages * 4096))
for turn in range(3):
    for name in "ab":
        with open(f"{directory}/{name}", "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
            for _ in range(100):
                page = int(generator.random() ** 2 * len(memory) // 4096)
                if generator.random() < 0.3:
                    memory[page * 4096] = 65
                else:
                    memory[page * 4096]
            if turn == 2:
                memory.flush()
            memory.close()
            file.seek(generator.randrange(pages) * 4096)
            file.write(b"y" * 9000)
            file.seek(0)
            file.read(20 * 4096)
            if turn == 0:
                control = os.open(f"{directory}/.xipfs/control", os.O_RDWR)
                pages_of_it = [[generator.randrange(200), 40]]
                request = {"op": "migrate", "to": "pagecache", "ranges": pages_of_it}
                request["ino"] = os.fstat(file.fileno()).st_ino
                os.write(control, json.dumps(request).encode())
                while os.read(control, 1 << 16):
                    pass
                os.close(control)
            if turn == 1:
                os.ftruncate(file.fileno(), 200 * 4096)
    if turn == 1:
        os.remove(f"{directory}/b")
        with open(f"{directory}/b", "wb") as file:
            file.write(b"z" * (pages * 4096))
"""


def rows_of(path: Path) -> Iterator[Json]:
    with TraceReader(path) as trace:
        for batch in trace.batches():
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def recorded_moves(path: Path) -> list[Json]:
    return [
        {"ino": told["ino"], "page": page, "to": told["to"]}
        for told in (values_of(row) for row in rows_of(path) if row["item"] == "move")
        for first, count in told["moved"]
        for page in range(first, first + count)
    ]


def record(tmp_path: Path, options: list[str], seed: int) -> tuple[Path, Json]:
    """Run the workload on a new mount; return its trace and the mount's last statistics."""
    trace = tmp_path / "trace.parquet"
    with new_mount(tmp_path, options) as mounted, contextlib.ExitStack() as ends:
        recorder = recording(mounted.directory, trace)
        ends.callback(recorder.kill)
        run_workload(mounted, seed)
        # What was planned is moved before the recording ends.
        settle(mounted)
        end_recording(recorder, timeout_s=60)
        lists = ("--moved", "10000", "--hottest", "10000")
        live = xipfs("stat", mounted.directory, "--json", *lists).stdout
        return trace, json.loads(live)


@contextlib.contextmanager
def new_mount(tmp_path: Path, options: list[str]) -> Iterator[LiveMount]:
    (tmp_path / "image").unlink(missing_ok=True)
    image = new_image(tmp_path / "image")
    mounted = LiveMount(image, tmp_path / "mnt", ["observe=tracefs", *options])
    try:
        yield mounted
    finally:
        mounted.close()


def run_workload(mounted: LiveMount, seed: int) -> None:
    words = [sys.executable, "-c", WORKLOAD, str(mounted.directory), str(seed)]
    subprocess.run(words, check=True, timeout=90)


def settle(mounted: LiveMount) -> None:
    """Return once every plan is carried out; each look is a point of decision."""
    wait_until(
        "the end of the moves",
        lambda: mounted.cat_stats()["migration"]["moves_under_way"] == 0,
        timeout_s=60,
    )


#: A policy that somebody installed: it hears everything and says what RAM loses first.
THEIRS = """
from dataclasses import dataclass, field
from xipfs.migrate.policy import DONE, EVICTED, TOUCHES, PteKind, demote, promote

@dataclass
class Seldom:
    SIGNALS = TOUCHES | DONE
    touches: int = 2
    _counts: dict = field(default_factory=dict, init=False)
    _cached: dict = field(default_factory=dict, init=False)

    def plan(self, signal, seen):
        page = signal.page
        if signal.source in DONE:
            self._cached.pop(page, None)
            if signal.source != EVICTED and signal.kind is PteKind.PAGECACHE:
                self._cached[page] = None
            return
        self._counts[page] = self._counts.get(page, 0) + 1
        if signal.kind is PteKind.XIP and self._counts[page] >= self.touches:
            yield promote(page, "touched often")
        if seen.evicted % 50 == 49:
            for victim in self.victims(3, seen):
                yield demote(victim, "touched seldom")

    def victims(self, count, seen):
        return sorted(self._cached, key=lambda page: (self._counts.get(page, 0), page))[:count]
"""


def install_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install it as a package; commands and daemons started from now on find it by its name."""
    packages = tmp_path / "packages"
    (packages / "theirs-1.dist-info").mkdir(parents=True)
    (packages / "theirs.py").write_text(THEIRS)
    for name, text in (
        ("METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1\n"),
        ("entry_points.txt", "[xipfs.policies]\nseldom = theirs:Seldom\n"),
    ):
        (packages / "theirs-1.dist-info" / name).write_text(text)
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(packages)])
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", path)
    return "seldom"


def write_readmes_policy(tmp_path: Path) -> str:
    """Write the policy that README has into a file; return its path."""
    (code,) = [
        block.partition("```")[0]
        for block in (ROOT / "README.md").read_text().split("```python\n")[1:]
        if "POLICY" in block.partition("```")[0]
    ]
    file = tmp_path / "mine.py"
    file.write_text(code)
    return str(file)


def profile_of_a_run(tmp_path: Path, seed: int) -> str:
    """Run the workload on a new mount; return a file with the pages it used most."""
    file = tmp_path / "profile.json"
    with new_mount(tmp_path, []) as mounted:
        run_workload(mounted, seed)
        told = xipfs("stat", mounted.directory, "--hottest", "100", "--json").stdout
    file.write_text(told)
    return str(file)


#: Options by the policy's name; NAME stands for what names a user's own, FILE for a profile.
POLICIES = {
    "off": ["ram=512K"],
    "tpp": ["policy=tpp,window_ms=3000", "ram=1M", "hint=300"],
    "clock": ["policy=clock", "ram=512K"],
    "fifo": ["policy=fifo", "ram=512K"],
    "threshold": ["policy=threshold,promote=2,stay_ms=20", "ram=512K", "hint=300"],
    "write-hot": ["policy=write-hot", "ram=512K"],
    "profile": ["policy=profile,file=FILE", "ram=256K", "hint=300"],
    "by file": ["policy=NAME,pages=4", "ram=512K"],
    "by entry point": ["policy=NAME,touches=3,pages_per_s=2000", "ram=256K", "hint=300"],
}


def test_every_policy_of_a_mount_is_tried() -> None:
    assert POLICIES.keys() == BUILT_IN.keys() | {"by file", "by entry point"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trace_replayed_under_its_own_policy_gives_the_same_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}: seed = {seed} plays it again")
    name = policy
    if policy == "by file":
        name = write_readmes_policy(tmp_path)
    elif policy == "by entry point":
        name = install_theirs(tmp_path, monkeypatch)
    options = [option.replace("NAME", name) for option in POLICIES[policy]]
    if policy == "profile":
        file = profile_of_a_run(tmp_path, seed)
        options = [option.replace("FILE", file) for option in options]
    trace, live = record(tmp_path, options, seed)
    # Not the whole answer if it fails: it tells each move.
    lists = ("--moved", "10000", "--hottest", "10000")
    done = xipfs("replay", trace, "--json", "--moves", *lists, check=False)
    answer = json.loads(done.stdout)
    assert (answer["replay"]["moves_differ"], done.returncode) == (0, 0)
    assert answer["recorded"]["lost"] == {
        "events_lost": 0,
        "faults_missed": 0,
        "items_missed": 0,
        "faults_before_start": 0,
        "ptes_before_start": 0,
        "signals_before_start": 0,
        "plans_before_start": 0,
        "cut_off": 0,
    }
    assert answer["replay"]["exact"] is True
    assert answer["moves"] == recorded_moves(trace)
    assert len(answer["moves"]) > 20
    assert answer["vmstat"] == {
        name: count for name, count in live["vmstat"].items() if name in answer["vmstat"]
    }
    told, was = answer["migration"], live["migration"]
    assert (told["policy"], told["failure"], was["failure"]) == (name, "", "")
    # Beside the moves by hand, which every policy lets be.
    planned = [row for row in was["by_cause"] if row["policy"] == name]
    assert sum(row["promoted"] for row in planned) > 20 or policy == "off"
    for name in ("policy", "planned", "asked", "held_back", "refaults", "pingpong"):
        assert (name, told[name]) == (name, was[name])
    assert (told["by_cause"], told["by_process"]) == (was["by_cause"], was["by_process"])
    assert told["fail_reasons"] == was["fail_reasons"]
    assert (answer["moved"], answer["hottest"]) == (live["moved"], live["hottest"])
    check_same_members(answer, live)


def check_same_members(answer: Json, live: Json) -> None:
    """A replay prints what a mount does, but for what takes a kernel, a daemon or time."""
    assert live.keys() - answer.keys() == {
        # What the kernel did itself, and who looked on.
        *("kernel", "observer"),
        # The daemon: its tasks, its own write-back, where it is mounted and how.
        *("background", "writeback", "mount"),
    }
    assert answer.keys() - live.keys() == {"replay", "recorded", "moves"}
    assert live["migration"].keys() - answer["migration"].keys() == {
        "kernel_invalidations",
        "step_ns",  # a move of a replay takes no time
    }
    assert answer["migration"].keys() <= live["migration"].keys()
    for name in ("vmstat", "memory", "cost", "ram_pages_used"):
        assert answer[name].keys() == live[name].keys(), name
    for name in ("processes", "moved", "hottest"):
        assert {*answer[name][0]} == {*live[name][0]}, name
    for name in ("by_cause", "by_file", "by_process"):
        for theirs, ours in zip(live["migration"][name], answer["migration"][name], strict=True):
            assert theirs.keys() == ours.keys(), name
    assert max(answer["ram_pages_used"]["max"]) >= max(live["ram_pages_used"]["max"]) > 0


def stand_still(mounted: LiveMount) -> None:
    """Return once no page moves; of plans of a policy that was replaced nothing else tells."""
    moves = -1
    while moves != (moves := mounted.vmstat()["pgmigrate_success"]):
        time.sleep(0.5)
        settle(mounted)


#: Maps a file anew again and again and touches its pages, by a seed.
TOUCHES = """
import mmap, os, random, sys
path, seed = sys.argv[1], int(sys.argv[2])
generator = random.Random(seed)
for _ in range(60):
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for _ in range(80):
            page = int(generator.random() ** 2 * (len(memory) // 4096))
            if generator.random() < 0.3:
                memory[page * 4096] = 65
            else:
                memory[page * 4096]
"""
#: Each plans pages that the other has just planned, and one of them pages to be taken away.
IN_TURN = [("clock", {}), ("threshold", {"promote": 1}), ("tpp", {"window_ms": 2000})]


def change_policy_and_move_back_while_they_run(
    mounted: LiveMount, programs: list[subprocess.Popen[bytes]], generator: random.Random
) -> None:
    """Choose one policy after the other, and move by hand what they have planned."""
    inodes = [(mounted / name).stat().st_ino for name in "ab"]
    while any(program.poll() is None for program in programs):
        policy, values = generator.choice(IN_TURN)
        list(request(mounted.mount, "policy", policy=policy, values=values, dry=False))
        to, ranges = generator.choice(["xip", "pagecache"]), [[generator.randrange(200), 40]]
        list(request(mounted.mount, "migrate", ino=generator.choice(inodes), to=to, ranges=ranges))


def test_pages_that_two_policies_have_planned_are_replayed_as_they_moved(tmp_path: Path) -> None:
    """The policy changes, and pages are moved by hand, while plans are under way."""
    seed = random.randrange(10**6)
    print(f"seed {seed}: seed = {seed} plays it again")
    trace = tmp_path / "trace.parquet"
    options = ["ram=600K", "hint=500"]
    with new_mount(tmp_path, options) as mounted, contextlib.ExitStack() as ends:
        for name in "ab":
            (mounted / name).write_bytes(b"x" * (480 * 4096))
        recorder = recording(mounted.directory, trace)
        ends.callback(recorder.kill)
        programs: list[subprocess.Popen[bytes]] = []
        for name in "aabb":
            words = [sys.executable, "-c", TOUCHES, str(mounted / name), str(seed + len(programs))]
            programs.append(ends.enter_context(subprocess.Popen(words)))
        change_policy_and_move_back_while_they_run(mounted, programs, random.Random(seed))
        assert [program.returncode for program in programs] == [0, 0, 0, 0]
        stand_still(mounted)
        end_recording(recorder, timeout_s=60)
        live = mounted.cat_stats()
    done = xipfs("replay", trace, "--json", "--moves", check=False)
    answer = json.loads(done.stdout)
    assert (answer["replay"]["moves_differ"], done.returncode) == (0, 0)
    assert answer["replay"]["exact"] is True
    assert answer["moves"] == recorded_moves(trace)
    assert answer["migration"]["by_cause"] == live["migration"]["by_cause"]


def test_what_a_policy_knew_before_the_recording_is_told(tmp_path: Path) -> None:
    """One write of each page before it, one in it: the second is the write that earns RAM."""
    with new_mount(tmp_path, ["policy=write-hot", "ram=400K"]) as mounted:
        (mounted / "file").write_bytes(b"x" * (40 * 4096))
        for trace, known, exact in (("before.parquet", 40, False), ("anew.parquet", 0, True)):
            recorder = recording(mounted.directory, tmp_path / trace)
            with open(mounted / "file", "r+b", buffering=0) as file:
                for _ in range(1 if known else 2):
                    for page in range(40):
                        os.pwrite(file.fileno(), b"y", page * 4096)
            settle(mounted)
            end_recording(recorder, timeout_s=60)
            assert len(recorded_moves(tmp_path / trace)) == 40
            answer = json.loads(xipfs("replay", tmp_path / trace, "--json", "--moves").stdout)
            assert answer["recorded"]["lost"]["signals_before_start"] == known
            assert (answer["replay"]["exact"], len(answer["moves"])) == (exact, 40 * exact)
            # A policy begins anew, and with it what a recording can tell.
            xipfs("migrate", mounted / "file", "--to", "xip")
            xipfs("policy", "set", mounted.directory, "write-hot")
