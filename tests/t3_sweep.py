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
from live import COMMAND, ENVIRONMENT, wait_until, xipfs
from streams import FILE, MAP, STREAM, fault, write_trace

from xipfs.cli.sweep import policies_of
from xipfs.errors import UsageError, XipfsError
from xipfs.replay.cells import BOUND, Cell, Figures, bound, code_digest, digest_of, run_cell
from xipfs.replay.sweep import Results, locally
from xipfs.stats.trace_columns import TraceError

ABOUT = {
    "xipfs": "0.1.0",
    "code_sha256": "cde",
    "trace_sha256": "abc",
    "medium": None,
    "delay_ns": 5,
}
FIGURES = {
    "touches": 1,
    "touches_in_ram": 1,
    "pgfault": 2,
    "pgmajfault": 1,
    "pgpromote_success": 1,
    "pgdemote_success": 0,
    "pgmigrate_fail": 0,
    "pgevict": 0,
    "refaults": 0,
    "pingpong": 0,
    "modelled": True,
    "medium": None,
    "as_recorded": False,
    "exact": False,
}


def cell(policy: str) -> Cell:
    return Cell("/trace", "abc", policy, (), "", 4096, None, 5, "cde")


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
    results.add(cell("a"), FIGURES, "")
    results.add(cell("b"), None, "out of luck")
    results.close()
    with path.open("ab") as file:
        file.write(b'{"policy": "c", "ram_by')
    again = Results(path, ABOUT)
    assert again.done == {("a", "", 4096): FIGURES}
    again.add(cell("b"), FIGURES | {"touches": 2}, "")
    again.close()
    with closing(Results(path, ABOUT)) as last:
        assert last.done == {
            ("a", "", 4096): FIGURES,
            ("b", "", 4096): FIGURES | {"touches": 2},
        }
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"figures": None}, "its figures are None, not an object"),
        ({"figures": {}}, "its figures lack touches"),
        ({"figures": "many"}, "its figures are 'many', not an object"),
        ({}, "its figures are None, not an object"),
        ({"figures": FIGURES | {"touches": "1"}}, "its touches is '1'"),
        ({"figures": FIGURES | {"pgevict": True}}, "its pgevict is True"),
        ({"figures": FIGURES | {"pgevict": [1]}}, "its pgevict is [1]"),
        ({"figures": FIGURES | {"touches": 1 << 63}}, "its touches is 9223372036854775808"),
        ({"figures": FIGURES | {"exact": 1}}, "its exact is 1"),
        ({"policy": 1, "figures": FIGURES}, "its policy is 1"),
        ({"policy": BOUND, "figures": {"touches": 1}}, "its figures lack touches_in_ram"),
        ({"ram_bytes": [], "figures": FIGURES}, "its ram_bytes is []"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    path = tmp_path / "r.jsonl"
    with closing(Results(path, ABOUT)) as results:
        results.add(cell("a"), FIGURES, "")
    whole = {"policy": "b", "files_sha256": "", "ram_bytes": 4096} | line
    with path.open("a") as file:
        file.write(json.dumps(whole) + "\n")
    before = path.read_bytes()
    with pytest.raises(UsageError) as refused:
        Results(path, ABOUT)
    assert str(refused.value) == (
        f"{path}, line 3: {said}; expected a line as `xipfs sweep` writes them; "
        "remove the line and its cell is done again, or name another file"
    )
    assert path.read_bytes() == before


def test_results_with_a_medium_have_its_estimates(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with closing(Results(path, ABOUT)) as results:
        results.add(cell("a"), FIGURES, "")
    text = path.read_text().replace('"medium": null', '"medium": {"name": "pcm"}', 1)
    path.write_text(text)
    with pytest.raises(UsageError, match="line 2: its figures lack read_ns_estimated"):
        Results(path, ABOUT | {"medium": {"name": "pcm"}})


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Results(path, ABOUT).close()
    for other in ({"code_sha256": "fff"}, {"xipfs": "0.2.0", "code_sha256": "fff"}):
        with pytest.raises(UsageError) as refused:
            Results(path, ABOUT | other)
        assert str(refused.value) == (
            f"{path} holds the results of another xipfs (0.1.0, other code): "
            f"{', '.join(other)} differ; name another file with -o, and all is done again"
        )
    path.write_text('{"xipfs_sweep": 2, "trace_sha256": "abc", "medium": null, "delay_ns": 5}\n')
    with pytest.raises(UsageError, match=r"another xipfs \(an older one, other code\)"):
        Results(path, ABOUT)
    with pytest.raises(XipfsError, match="has other code than the one that began the sweep"):
        run_cell(cell("off"))


def test_one_sweep_at_a_time_works_on_a_results_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Results(path, ABOUT)
    with pytest.raises(XipfsError) as refused:
        Results(path, ABOUT)
    assert str(refused.value) == (
        f"{path} is in use by another sweep, pid {os.getpid()}; "
        "wait for it, or name another file with -o"
    )
    first.close()
    Results(path, ABOUT).close()


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
    # Two pages of 64 lines read at 55 ns, 101 ns to each; two transactions write 8 lines each at
    # 150 ns, 57 ns to each of their four fences.
    assert fifo.endswith("        0    10.1 us")


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
        str(trace), digest_of(trace), str(file), (), "another", 65536, None, 5_000_000,
        code_digest(),
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
    for address in ("foo", "foo://bar:1", "tcp://bar"):
        done = xipfs("sweep", trace, *words, "--dask", address, check=False)
        said = f"xipfs sweep: --dask {address}; expected tcp://HOST:PORT\n"
        assert (done.returncode, done.stderr) == (2, said)


#: Its workers end at once when the first cell begins, and the scheduler with them.
DYING = """
import os, signal
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None,
        protocol="tcp",
    )
    print(cluster.scheduler_address, flush=True)
    input()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_dask_cluster_that_dies_is_told_as_such(tmp_path: Path) -> None:
    script, results = tmp_path / "cluster.py", tmp_path / "r.jsonl"
    script.write_text(DYING)
    with subprocess.Popen(
        [sys.executable, script],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as cluster:  # fmt: skip
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        slow = tmp_path / "slow.py"
        slow.write_text("import time\n" + OWN.replace("return MOVES", "time.sleep(1); return ()"))
        trace = write_trace(tmp_path / "t.parquet", STREAM)
        words = ("--policies", str(slow), "--ram", "4K,8K,64K", "-o", str(results))
        sweep = subprocess.Popen(
            [*COMMAND, "sweep", str(trace), *words, "--dask", address],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(
            "the first cell", lambda: results.exists() and results.read_text().count("\n") > 1, 60
        )
        cluster.communicate("\n", timeout=60)
    _, said = sweep.communicate(timeout=100)
    assert sweep.returncode == 1
    assert "the Dask cluster is gone, and the cell" in said
    assert ": None" not in said


def test_a_trace_that_is_none_is_wrong_input(tmp_path: Path) -> None:
    words = ("--policies", "off", "--ram", "4K", "-o", tmp_path / "r.jsonl")
    cut = write_trace(tmp_path / "t.parquet", STREAM)
    cut.write_bytes(cut.read_bytes()[:-20])
    for trace, why in ((tmp_path / "none", "cannot be read"), (cut, "has no end")):
        for verb in (("sweep", trace, *words), ("replay", trace), ("faults", trace)):
            done = xipfs(*verb, check=False)
            assert (done.returncode, done.stdout) == (2, ""), verb
            assert f"{trace} {why}" in done.stderr
