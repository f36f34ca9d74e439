"""Replays of small streams written out by hand, and traces that cannot be replayed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from live import xipfs
from streams import FILE, INO, MAP, MS, STREAM, fault, line, moved, write_trace

from xipfs.cli.policy import policy_of
from xipfs.cli.replay import as_text
from xipfs.errors import UsageError
from xipfs.migrate.policy import Move, Seen, Signal
from xipfs.replay.choice import Choice
from xipfs.replay.machine import Replay
from xipfs.replay.outcome import outcome, replay_file
from xipfs.replay.trace import Recorded
from xipfs.stats.trace_columns import TraceError
from xipfs.stats.trace_writer import TraceWriter


def recorded(policy: str = "fifo", **lost: int) -> Recorded:
    return Recorded(
        policy=policy, values={"pages_per_s": 0, "stay_ms": 0}, files_sha256="", dry=False,
        ram_bytes=16 * 4096, nvram_bytes=4 << 20, struct_page_bytes=64, rules="6.1",
        medium=None, readahead=False, lost=lost,
    )  # fmt: skip


def played(choice: Choice, stream: list[dict[str, Any]] = STREAM) -> tuple[Replay, dict[str, Any]]:
    replay = Replay(recorded(), choice)
    for each in stream:
        replay.apply(each)
    replay.finish()
    return replay, outcome(replay)


def test_as_recorded_the_moves_are_the_recorded_ones_and_their_faults_count() -> None:
    replay, answer = played(Choice())
    assert replay.moves == [(INO, 0, "pagecache"), (INO, 1, "pagecache")]
    told = answer["replay"]
    assert (told["as_recorded"], told["exact"], told["moves_differ"]) == (True, True, 0)
    counts = answer["vmstat"]
    assert (counts["pgfault"], counts["pgfault_xip"], counts["pgfault_pagecache"]) == (3, 2, 1)
    # Touches: three faults; the second found page 0 in RAM.
    assert (told["touches"], told["touches_in_ram"]) == (3, 1)


def test_frames_in_use_by_the_stream_s_time_and_the_pages_that_moved_and_faulted_most() -> None:
    """Frames: one from 7 ms on, two from 15 ms on; in the second at 1001 ms a page is back."""
    back = line(
        "move", 1001, ino=INO, page=1, pages=1, to="xip", by="manual", reason="manual",
        moved=[[1, 1]], refused={},
    )  # fmt: skip
    replay, answer = played(Choice(), [*STREAM, back, line("decide", 2500)])
    assert answer["ram_pages_used"] == {
        "start_ns": 0,
        "interval_ns": 1_000_000_000,
        "max": [2, 2, 1],
    }
    counts = {"failed": 0, "refaults": 0}
    assert replay.history.pages.most_moved(9) == [
        {"ino": INO, "index": 1, "promoted": 1, "demoted": 1, "moved_bytes": 2 * 4096, **counts,
         "pingpong": 1},
        {"ino": INO, "index": 0, "promoted": 1, "demoted": 0, "moved_bytes": 4096, "failed": 0,
         "refaults": 1, "pingpong": 0},
    ]  # fmt: skip
    assert [(page["index"], page["pgfault"]) for page in replay.heat.hottest(1)] == [(0, 2)]
    assert "step_ns" not in answer["migration"], "nothing takes time"


def test_most_moved_and_hottest_are_listed_as_stat_lists_them(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.parquet", STREAM)
    lines = xipfs("replay", trace, "--moved", "1", "--hottest", "1").stdout.splitlines()
    assert lines[-6:] == [
        "",
        "     inode       page  promote   demote   failed  refault     back",
        "         7          0        1        0        0        1        0",
        "",
        "     inode       page  pgfault      xip   pcache      cow",
        "         7          0        2        1        1        0",
    ]
    done = xipfs("replay", trace, "--moved", "0", check=False)
    told = "xipfs replay: --moved 0; expected 1 or more\n"
    assert (done.returncode, done.stderr) == (2, told)


OWN = """
from dataclasses import dataclass
from xipfs.migrate.policy import FAULT, promote

@dataclass
class POLICY:
    SIGNALS = frozenset({FAULT})
    first: int = 0
    share: float = 0.5

    def plan(self, signal, seen):
        yield promote(signal.page, "why")
"""


#: Of the SHA-256 of that text, SHA-256.
OWN_SHA256 = "da4e9971331927cc40ed35d27afafe97f5b08a295a642b4ce5e7ff8b18639af1"


def test_parameters_are_the_recorded_ones_whatever_the_defaults_are(tmp_path: Path) -> None:
    """Zero is a value as others are; a policy of one's own may have defaults nobody could give."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    for policy, values in (
        ("clock", {"pages_per_s": 0, "stay_ms": 0, "high": 98, "low": 95}),
        (str(file), {"pages_per_s": 9, "stay_ms": 0, "first": 0, "share": 0.5}),
    ):
        files = OWN_SHA256 if policy == str(file) else ""
        was = dataclasses.replace(recorded(policy), values=values, files_sha256=files)
        replay = Replay(was, Choice())
        replay.finish()
        told = outcome(replay)
        assert (told["replay"]["as_recorded"], told["migration"]["parameters"]) == (True, values)


def test_a_policy_with_another_text_is_another_policy(tmp_path: Path) -> None:
    """Edited since the recording, also where it was chosen only while the recording ran."""
    file = tmp_path / "own.py"
    file.write_text(OWN + "# edited\n")
    values = {"pages_per_s": 0, "stay_ms": 0, "first": 0, "share": 0.5}
    own = {"policy": str(file), "parameters": values, "files_sha256": OWN_SHA256, "dry": False}
    later = Replay(recorded(), Choice())
    for each in [*STREAM, line("policy", 30, **own)]:
        later.apply(each)
    was = dataclasses.replace(recorded(str(file)), values=values, files_sha256=OWN_SHA256)
    at_once = Replay(was, Choice())
    for replay, as_recorded in ((later, True), (at_once, False)):
        replay.finish()
        told = outcome(replay)
        assert told["replay"]["policy_files_changed"] is True
        assert (told["replay"]["as_recorded"], told["replay"]["exact"]) == (as_recorded, False)
        assert "  the policy's files are not what they were when it was recorded" in as_text(told)
    other = Replay(was, Choice(policy="fifo"))
    assert outcome(other)["replay"]["policy_files_changed"] is False


def test_a_policy_that_fails_is_told_and_ends_with_1(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN.replace('yield promote(signal.page, "why")', "raise SystemExit(0)"))
    trace = write_trace(tmp_path / "t.parquet", STREAM)
    done = xipfs("replay", trace, "--policy", file, check=False)
    assert done.returncode == 1
    assert f"  a policy failed, and was off from then on: {file}: SystemExit(0)\n" in done.stdout
    done = xipfs("policy", "test", file, check=False)
    told = f"xipfs policy: policy {file} failed: SystemExit(0) in {file}, line 12\n"
    assert (done.returncode, done.stderr) == (1, told)
    words = ("--policies", f"{file},off", "--ram", "64K", "-o", tmp_path / "r", "--jobs", "1")
    done = xipfs("sweep", trace, *words, check=False)
    assert done.returncode == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["64", "KiB", "own.py", "failed"] in lines, "not the figures of the policy off"
    assert f"{file}, RAM 64 KiB: the policy failed: {file}: SystemExit(0)\n" in done.stderr
    file.write_text("raise SystemExit(0)")
    done = xipfs("policy", "show", file, check=False)
    told = f"xipfs policy: policy {file} cannot be loaded: SystemExit(0)\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_another_policy_leaves_out_what_the_recorded_one_caused() -> None:
    replay, answer = played(Choice(policy="off"))
    assert replay.moves == []
    assert answer["replay"]["faults_left_out"] == 1
    assert answer["replay"]["faults_made"] == 0
    assert (answer["vmstat"]["pgfault"], answer["vmstat"]["pgfault_xip"]) == (2, 2)
    assert (answer["replay"]["touches"], answer["replay"]["touches_in_ram"]) == (3, 0)


def test_another_policys_own_moves_make_their_own_faults_after_the_delay() -> None:
    # Moved 5 ms after the decision at 2 ms: before the touch at 8 ms, which then has to fault.
    replay, answer = played(Choice(policy="threshold", values={"promote": 1}))
    assert replay.moves == [(INO, 0, "pagecache"), (INO, 1, "pagecache")]
    assert (answer["replay"]["faults_left_out"], answer["replay"]["faults_made"]) == (0, 1)
    assert answer["replay"]["ptes_taken"] == 2
    # 20 ms later is too late for that touch: it finds its page mapped.
    replay, answer = played(Choice(policy="threshold", values={"promote": 1}, delay_ns=20 * MS))
    assert (answer["replay"]["faults_left_out"], answer["replay"]["faults_made"]) == (1, 0)
    assert len(replay.moves) == 2


def test_with_less_ram_pages_are_evicted_and_their_next_touch_faults() -> None:
    stream = [
        FILE,
        MAP,
        fault(1, 0),
        fault(2, 1),
        line("decide", 3),
        fault(20, 0, cause="move"),
        fault(21, 1, cause="move"),
        fault(22, 0, cause="evict"),
    ]
    _, answer = played(Choice(policy="fifo", ram_bytes=4096), stream)
    assert answer["replay"]["as_recorded"] is False
    counts = answer["vmstat"]
    assert (counts["pgfault"], counts["pgfault_pagecache"], counts["pgmajfault"]) == (5, 3, 3)
    assert counts["pgevict"] == 4  # by the second promotion, then by each fault


def test_moves_by_hand_are_of_the_recording_under_every_policy() -> None:
    stream = [FILE, MAP, moved(1, 3, by="manual"), fault(2, 3)]
    replay, answer = played(Choice(policy="off"), stream)
    assert replay.moves == [(INO, 3, "pagecache")]
    assert answer["vmstat"]["pgfault_pagecache"] == 1


def line_of_a_move(time_ms: int, to: str, *, by: str) -> dict[str, Any]:
    return line(
        "move", time_ms, ino=INO, page=0, pages=1, to=to, by=by, reason="", moved=[[0, 1]],
        refused={},
    )  # fmt: skip


THRESHOLD = {
    "policy": "threshold",
    "parameters": {"pages_per_s": 0, "stay_ms": 0, "promote": 1},
    "files_sha256": "",
    "dry": False,
}
#: A page's plan by fifo is under way when threshold plans the same anew.
PLANNED_TWICE = [
    FILE,
    MAP,
    fault(1, 0),
    line("decide", 2),
    line("turn", 3),
    line("policy", 4, **THRESHOLD),
    fault(5, 0),
    line("decide", 6),
    line_of_a_move(7, "pagecache", by="policy"),
]


def by_cause(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    causes = answer["migration"]["by_cause"]
    names = ("policy", "reason", "promoted", "demoted", "failed")
    return sorted(tuple(str(cause[name]) for name in names) for cause in causes)


def test_a_page_planned_again_while_its_first_plan_is_under_way_moves_by_each() -> None:
    """Moved back by hand between the two, so that the second has something to do."""
    stream = [
        *PLANNED_TWICE,
        line_of_a_move(8, "xip", by="manual"),
        line("turn", 9),
        line_of_a_move(10, "pagecache", by="policy"),
        line("turn", 11),
    ]
    replay, answer = played(Choice(), stream)
    assert replay.moves == [(INO, 0, "pagecache"), (INO, 0, "xip"), (INO, 0, "pagecache")]
    assert answer["replay"]["moves_differ"] == 0
    assert by_cause(answer) == [
        ("None", "manual", "0", "1", "0"),
        ("fifo", "first fault", "1", "0", "0"),
        ("threshold", "1 faults", "1", "0", "0"),
    ]


def test_of_two_plans_for_one_page_in_the_same_turn_the_later_moves_it() -> None:
    stream = [each for each in PLANNED_TWICE if each["item"] not in ("turn", "move")]
    stream += [line("turn", 7), line_of_a_move(8, "pagecache", by="policy"), line("turn", 9)]
    replay, answer = played(Choice(), stream)
    assert replay.moves == [(INO, 0, "pagecache")]
    assert answer["replay"]["moves_differ"] == 0
    assert by_cause(answer) == [("threshold", "1 faults", "1", "0", "0")]


def test_a_second_plan_that_is_refused_is_the_one_that_its_policy_waits_for() -> None:
    stream = [
        *PLANNED_TWICE,
        line_of_a_move(8, "xip", by="manual"),
        fault(9, 0),
        line("decide", 10),
        line("turn", 11),
        line("give_up", 12, ino=INO, to="pagecache", by="policy", reason="pinned", given=[[0, 1]]),
        line("refused", 13, moves=[[INO, 0, "pagecache"]]),
        line("turn", 14),
    ]
    replay, answer = played(Choice(), stream)
    assert replay.moves == [(INO, 0, "pagecache"), (INO, 0, "xip")]
    assert answer["replay"]["moves_differ"] == 0
    assert answer["migration"]["moves_under_way"] == 0
    assert by_cause(answer) == [
        ("None", "manual", "0", "1", "0"),
        ("fifo", "first fault", "1", "0", "0"),
        ("threshold", "1 faults", "0", "0", "1"),
    ]


def test_moves_that_differ_are_counted_one_by_one() -> None:
    """Two that the replay's policy has not planned, then one that the recording lacks."""
    unplanned = line(
        "move", 7, ino=INO, page=3, pages=2, to="pagecache", by="policy", reason="first fault",
        moved=[[3, 2]], refused={},
    )  # fmt: skip
    stream = [FILE, MAP, fault(1, 0), line("decide", 2), line("turn", 3), unplanned]
    assert played(Choice(), stream)[1]["replay"]["moves_differ"] == 2
    assert played(Choice(), [*stream, line("turn", 9)])[1]["replay"]["moves_differ"] == 3


def test_a_recording_with_losses_does_not_claim_to_be_exact() -> None:
    replay = Replay(recorded(events_lost=1), Choice())
    replay.finish()
    assert outcome(replay)["replay"]["as_recorded"] is True
    assert outcome(replay)["replay"]["exact"] is False


@pytest.mark.parametrize("known", ["signals", "planned"])
def test_nor_does_one_whose_policy_remembers_what_was_before_it(tmp_path: Path, known: str) -> None:
    trace = write_trace(tmp_path / "t.parquet", STREAM, before={known: 1})
    answer = outcome(replay_file(trace, Choice()))
    assert {name for name, count in answer["recorded"]["lost"].items() if count} == {
        {"signals": "signals_before_start", "planned": "plans_before_start"}[known]
    }
    assert (answer["replay"]["as_recorded"], answer["replay"]["exact"]) == (True, False)


def test_an_eviction_s_time_may_be_one_from_before_the_recording() -> None:
    """One frame; the page in it goes for another, before anything has told of a time."""
    times: list[int] = []
    told = dataclasses.replace(recorded("clock"), ram_bytes=4096)
    replay = Replay(told, Choice())
    policy = vars(vars(replay.steering)["_decider"])["_policy"]

    def plan(signal: Signal, _seen: Seen) -> list[Move]:
        times.append(signal.time_ns)
        return []

    policy.plan = plan
    cached = line("file", 0, ino=INO, size_bytes=8192, pagecache=True, runs=[[0, 2, "pagecache"]])
    begin = line(
        "start", 8, resident=[[INO, 0, 0]], faults=0, ptes=0, signals=0, planned=0, heard_ns=5
    )
    for each in (cached, begin, line("read", 9, pid=20, ino=INO, offset=4096, size=4096)):
        replay.apply(each)
    assert times == [5]


def test_files_are_cut_freed_and_their_numbers_used_again() -> None:
    again = line("file", 9, ino=INO, size_bytes=4096, pagecache=True, runs=[[0, 1, "pagecache"]])
    stream = [
        FILE,
        line("size", 1, ino=INO, size_bytes=4096),
        line("write", 2, pid=20, ino=INO, offset=4096, size=8192),
        line("gone", 3, ino=INO),
        again,
        line("read", 10, pid=20, ino=INO, offset=0, size=4096),
    ]
    replay, answer = played(Choice(), stream)
    counts = answer["vmstat"]
    assert (counts["nr_xip_pages"], counts["nr_pagecache_pages"]) == (0, 1)
    assert counts["nr_resident_pages"] == 1
    # One page of two lines of writing: two blocks of data, and the file's own changes.
    assert answer["cost"]["nvram_written_bytes"] >= 8192
    assert replay.counts.requests_failed == 0


def test_a_file_is_replayed_with_progress_and_its_losses(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = write_trace(tmp_path / "t.parquet", STREAM, lost=3)
    answer = outcome(replay_file(path, Choice(), lambda done, total: told.append((done, total))))
    rows = len(STREAM) + 2
    assert told == [(rows, rows)]
    assert answer["vmstat"]["pgpromote_success"] == 2
    assert answer["recorded"]["lost"]["events_lost"] == 3
    assert answer["replay"]["exact"] is False


def test_a_trace_that_is_no_whole_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    writer = TraceWriter(path)
    writer.append([list(fault(1, 0).values())])
    writer.close({"mount": {}})
    with pytest.raises(TraceError, match="cannot be replayed: it lacks 'memory'"):
        replay_file(path, Choice())


def test_policy_words() -> None:
    assert policy_of("tpp,window_ms=5") == ("tpp", {"window_ms": 5})
    assert json.dumps(policy_of("profile,file=x.json")[1]) == '{"file": "x.json"}'
    with pytest.raises(UsageError, match="KEY=VALUE"):
        policy_of("tpp,5")
