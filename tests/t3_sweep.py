"""Sweeps: a grid is run whole, goes on where it stopped, and a failing cell costs no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from live import ENVIRONMENT, xipfs
from streams import FILE, MAP, STREAM, fault, write_trace

from xipfs.cli.sweep import policies_of
from xipfs.errors import UsageError
from xipfs.replay.cells import BOUND, Cell, Figures, bound, digest_of, run_cell
from xipfs.replay.sweep import Results, locally
from xipfs.stats.trace_columns import TraceError

ABOUT = {"trace_sha256": "abc", "medium": None, "delay_ns": 5}


def cell(policy: str) -> Cell:
    return Cell("/trace", "abc", policy, (), "", 4096, None, 5)


def play(cell: Cell) -> Figures:
    """Stands for a replay, in a process of its own."""
    if cell.policy == "fails":
        raise ValueError("no such thing")
    if cell.policy == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"touches": len(cell.policy)}


def test_cells_that_fail_or_die_cost_no_other() -> None:
    told = {
        cell.policy: (figures, error)
        for cell, figures, error in locally(
            [cell(x) for x in ("a", "fails", "dies", "bb")], 2, play
        )
    }
    assert told == {
        "a": ({"touches": 1}, ""),
        "fails": (None, "ValueError('no such thing')"),
        "dies": (None, "its process died (out of memory?)"),
        "bb": ({"touches": 2}, ""),
    }


def test_results_are_kept_failures_are_not_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results = Results(path, ABOUT)
    results.add(cell("a"), {"touches": 1}, "")
    results.add(cell("b"), None, "out of luck")
    results.close()
    with path.open("ab") as file:
        file.write(b'{"policy": "c", "ram_by')
    again = Results(path, ABOUT)
    assert again.done == {("a", "", 4096): {"touches": 1}}
    again.add(cell("b"), {"touches": 2}, "")
    again.close()
    with closing(Results(path, ABOUT)) as last:
        assert last.done == {("a", "", 4096): {"touches": 1}, ("b", "", 4096): {"touches": 2}}
    assert path.read_text().count("\n") == 4


def test_results_of_another_sweep_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Results(path, ABOUT).close()
    with pytest.raises(UsageError, match="another sweep: trace_sha256 differ"):
        Results(path, ABOUT | {"trace_sha256": "def"})
    with pytest.raises(UsageError, match="medium, delay_ns differ"):
        Results(path, ABOUT | {"medium": "nor", "delay_ns": 6})
    path.write_text("something\n")
    with pytest.raises(UsageError, match="no results file"):
        Results(path, ABOUT)
    assert path.read_text() == "something\n"
    for wrong, why in ((tmp_path, "Is a directory"), (tmp_path / "no" / "r", "No such file")):
        with pytest.raises(UsageError, match=f"cannot be read and written: {why}"):
            Results(wrong, ABOUT)


def test_policies_with_parameters() -> None:
    assert policies_of("off,tpp,window_ms=5,pages_per_s=9,fifo") == [
        ("off", {}),
        ("tpp", {"window_ms": 5, "pages_per_s": 9}),
        ("fifo", {}),
    ]
    with pytest.raises(UsageError, match="has no value"):
        policies_of("a,b,=")


def test_the_bound_counts_what_is_in_ram_at_the_start(tmp_path: Path) -> None:
    # Page 0 three times, page 1 once: with one frame page 0 is found twice.
    stream = [FILE, MAP, fault(1, 0), fault(2, 1), fault(3, 0, cause="move"), fault(4, 0)]
    path = write_trace(tmp_path / "t.parquet", stream)
    assert bound(path, 4096) == {"touches": 4, "touches_in_ram": 2}
    # Resident when the recording began, it is found the first time too.
    path = write_trace(tmp_path / "u.parquet", stream, resident=[(7, 0, 0)])
    assert bound(path, 4096) == {"touches": 4, "touches_in_ram": 3}
    # One frame holds the hottest of two only: the last.
    path = write_trace(tmp_path / "v.parquet", stream, resident=[(7, 0, 0), (7, 5, 0)])
    assert bound(path, 4096) == {"touches": 4, "touches_in_ram": 2}


#: Of STREAM: policy, RAM in bytes, touches that found their page in RAM.
TABLE = [
    (BOUND, 4096, 1),
    ("off", 4096, 0),
    ("fifo", 4096, 1),
    ("belady", 4096, 1),
    (BOUND, 65536, 1),
    ("off", 65536, 0),
    ("fifo", 65536, 1),
    ("belady", 65536, 1),
]


def table(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(row["policy"], row["ram_bytes"], row["touches_in_ram"]) for row in rows]


def grid(trace: Path, results: Path, *more: str | Path, code: int = 0) -> list[dict[str, Any]]:
    words = ("--policies", "off,fifo,belady", "--ram", "4K,64K", "-o", results, "--json")
    done = xipfs("sweep", trace, *words, *more, check=False, timeout=100)
    assert done.returncode == code, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_a_sweep_from_the_command_line_and_again(tmp_path: Path) -> None:
    trace, results = write_trace(tmp_path / "t.parquet", STREAM), tmp_path / "r.jsonl"
    rows = grid(trace, results, "--jobs", "1")
    assert table(rows) == TABLE
    assert rows[2]["share_of_bound"] == 1.0
    # As recorded: 64K is the recording's RAM.
    assert [row["exact"] for row in rows if row["policy"] == "fifo"] == [False, True]
    before = results.read_bytes()
    assert grid(trace, results, "--jobs", "1") == rows
    assert results.read_bytes() == before
    # What is missing, and only that, is done again.
    results.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
    assert grid(trace, results, "--jobs", "1") == rows
    assert sorted(results.read_bytes().splitlines()) == sorted(before.splitlines())
    other = write_trace(tmp_path / "u.parquet", STREAM[:4])
    done = xipfs("sweep", other, "--policies", "off", "--ram", "4K", "-o", results, check=False)
    assert done.returncode == 2
    assert "holds the results of another sweep" in done.stderr


def test_times_are_labelled_as_modelled_on_their_medium(tmp_path: Path) -> None:
    trace, results = write_trace(tmp_path / "t.parquet", STREAM), tmp_path / "r.jsonl"
    rows = grid(trace, results, "--jobs", "1", "--medium", "pcm")
    assert [(row.get("modelled"), row.get("medium")) for row in rows[:3]] == [
        (None, None),  # the bound has no figures of a cost
        (True, "pcm"),
        (True, "pcm"),
    ]
    words = ("--policies", "off,fifo,belady", "--ram", "4K,64K", "--medium", "pcm", "-o", results)
    head, columns, _bound, _off, fifo, *_ = xipfs("sweep", trace, *words).stdout.splitlines()
    assert head == f"{trace}: 3 touches; est. time: modelled on pcm"
    assert columns.endswith(" pingpong  est. time")
    # Two pages of 64 lines read at 55 ns; two transactions write 8 lines each, at 150 ns.
    assert fifo.endswith("        0    9.44 us")


OWN = """
from dataclasses import dataclass
from xipfs.migrate.policy import FAULT, promote

@dataclass
class POLICY:
    SIGNALS = frozenset({FAULT})

    def plan(self, signal, seen):
        return MOVES
"""


def test_a_policy_that_was_edited_is_done_again(tmp_path: Path) -> None:
    trace, results = write_trace(tmp_path / "t.parquet", STREAM), tmp_path / "r"
    file = tmp_path / "own.py"
    words = ("sweep", trace, "--policies", f"{file},fifo", "--ram", "64K", "-o", results, "--json")
    for moves, promoted in (("()", 0), ("[promote(signal.page, 'why')]", 2), ("()", 0)):
        file.write_text(OWN.replace("MOVES", moves))
        rows = json.loads(xipfs(*words, "--jobs", "1").stdout)
        assert [row.get("pgpromote_success") for row in rows] == [None, promoted, 2]
    # The bound, fifo and each text of the policy once, below the line that says what it is about.
    assert results.read_text().count("\n") == 1 + 4
    changed = Cell(
        str(trace), digest_of(trace), str(file), (), "another", 65536, None, 5_000_000
    )  # fmt: skip
    with pytest.raises(TraceError, match="are not those that the sweep is about"):
        run_cell(changed)


CLUSTER = """
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        input()
"""


def test_a_dask_cluster_of_two_workers_gives_the_same_table(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.parquet", STREAM)
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    cluster = subprocess.Popen(
        [sys.executable, script],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        assert address.startswith("tcp://127.0.0.1:"), address
        rows = grid(trace, tmp_path / "dask.jsonl", "--dask", address)
        assert table(rows) == TABLE
    finally:
        cluster.communicate("\n", timeout=60)


def test_no_cluster_there(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.parquet", STREAM)
    words = ("--policies", "off", "--ram", "4K", "-o", tmp_path / "r.jsonl")
    done = xipfs("sweep", trace, *words, "--dask", "tcp://127.0.0.1:1", check=False)
    assert done.returncode == 2
    assert "no Dask cluster answers at tcp://127.0.0.1:1" in done.stderr
