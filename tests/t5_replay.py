"""A real workload recorded on a real mount under a policy, and replayed: the very same moves."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveMount, new_image, wait_until, xipfs
from t5_record import end_recording, recording

from xipfs.stats.trace_file import TraceReader
from xipfs.stats.trace_items import values_of

Json = dict[str, Any]

#: Maps, stores, reads, writes, cuts and removes files, all by a seed.
WORKLOAD = """
import mmap, os, random, sys
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
    directory, trace = tmp_path / "mnt", tmp_path / "trace.parquet"
    mounted = LiveMount(new_image(tmp_path / "image"), directory, ["observe=tracefs", *options])
    with contextlib.ExitStack() as ends:
        ends.callback(mounted.close)
        recorder = recording(directory, trace)
        ends.callback(recorder.kill)
        words = [sys.executable, "-c", WORKLOAD, str(directory), str(seed)]
        subprocess.run(words, check=True, timeout=90)
        # What was planned is moved before the recording ends.
        settle(mounted)
        end_recording(recorder, timeout_s=60)
        return trace, mounted.cat_stats()


def settle(mounted: LiveMount) -> None:
    """Return once every plan is carried out; each look is a point of decision."""
    wait_until(
        "the end of the moves",
        lambda: mounted.cat_stats()["migration"]["moves_under_way"] == 0,
        timeout_s=60,
    )


@pytest.mark.parametrize(
    "options",
    [
        ["policy=tpp,window_ms=3000", "ram=1M", "hint=300"],
        ["policy=clock", "ram=512K"],
        ["policy=fifo", "ram=512K"],
        ["policy=threshold,promote=2,stay_ms=20", "ram=512K", "hint=300"],
        ["policy=write-hot", "ram=512K"],
    ],
    ids=["tpp", "clock", "fifo", "threshold", "write-hot"],
)
def test_a_trace_replayed_under_its_own_policy_gives_the_same_moves(
    tmp_path: Path, options: list[str]
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}: record(tmp_path, {options}, {seed}) plays it again")
    trace, live = record(tmp_path, options, seed)
    answer = json.loads(xipfs("replay", trace, "--json", "--moves").stdout)
    assert answer["recorded"]["lost"] == {
        "events_lost": 0,
        "faults_missed": 0,
        "items_missed": 0,
        "faults_before_start": 0,
        "ptes_before_start": 0,
        "cut_off": 0,
    }
    assert answer["replay"]["exact"] is True
    assert answer["replay"]["moves_differ"] == 0
    assert answer["moves"] == recorded_moves(trace)
    assert len(answer["moves"]) > 20
    assert answer["vmstat"] == {
        name: count for name, count in live["vmstat"].items() if name in answer["vmstat"]
    }
    told, was = answer["migration"], live["migration"]
    for name in ("policy", "planned", "asked", "held_back", "refaults", "pingpong"):
        assert (name, told[name]) == (name, was[name])
    assert (told["by_cause"], told["by_process"]) == (was["by_cause"], was["by_process"])
    assert told["fail_reasons"] == was["fail_reasons"]
