"""``xipfs faults FILE``: all it prints of a trace written by hand, and what it says of losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from t3_trace_file import ROW

from xipfs.cli import main
from xipfs.cli.faults import LineView, TableView
from xipfs.stats.trace_columns import COLUMNS, FAULT_COLUMNS
from xipfs.stats.trace_items import row
from xipfs.stats.trace_writer import TraceWriter

LOSSES = {"faults": 2, "faults_missed": 1, "items_missed": 0, "events_lost": 3}
METADATA = {"losses": LOSSES, "observer": {"mode": "tracefs"}}
ROWS = [[5_000_000_123, *ROW[1:]], [6_000_000_456, *ROW[1:9], "read", *ROW[10:]]]
FAULTS = [
    "       5.000000      20 a prog          write minor  xip             7 a/file",
    "       6.000000      20 a prog          read  minor  xip             7 a/file",
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace"
    writer = TraceWriter(path)
    writer.append(ROWS)
    writer.close(METADATA)
    return path


def test_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", str(trace), "--by", "file"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2 faults, 1 missed, 3 events lost; observer tracefs",
        "faults  major    xip cached    cow  extra    own around  file",
        "     2      0      2      0      0      2      0      0  a/file",
    ]


def test_lines(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", str(trace), "--follow"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == FAULTS
    assert said.err == "xipfs faults: 2 faults, 1 missed, 3 events lost\n"


def test_an_access_whose_file_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = row("unplaced", {"time_ns": 7 * 10**9, "mm": 3, "pid": 20, "tid": 21, "address": 0x9000})
    made |= {"comm": "gone", "page": 5, "detail": '{"access":"write","mode":"kernel"}'}
    writer = TraceWriter(tmp_path / "trace")
    writer.append([[made.get(name) for name in COLUMNS]])
    writer.close(METADATA)
    assert main(["faults", str(tmp_path / "trace"), "--follow"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "       7.000000      20 gone            write sigbus unknown         5 (unknown)"
    ]
    assert main(["faults", str(tmp_path / "trace"), "--follow", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[0])
    assert {name: told[name] for name in ("access", "mode", "verdict", "charged", "ino")} == {
        "access": "write",
        "mode": "kernel",
        "verdict": "sigbus",
        "charged": "unknown",
        "ino": None,
    }


def test_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", str(trace), "--follow", "--json"]) == 0
    *faults, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert faults == [
        {name: row[list(COLUMNS).index(name)] for name in FAULT_COLUMNS} for row in ROWS
    ]
    assert last == {"losses": LOSSES}
    assert main(["faults", str(trace), "--json", "--by", "page"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["by"], told["metadata"]["losses"]) == ("page", LOSSES)
    assert [(line["path"], line["page"], line["faults"]) for line in told["lines"]] == [
        ("a/file", 7, 2)
    ]


def test_new_losses_are_told_when_they_come_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    view = LineView(as_json=False)
    none = dict.fromkeys(LOSSES, 0)
    for losses in (none, none | {"faults": 9}, LOSSES, LOSSES | {"faults": 4}):
        view.tick(losses)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "xipfs faults: 2 faults, 1 missed, 3 events lost so far\n"
    view = LineView(as_json=False)
    view.tick(none | {"items_missed": 2})
    assert "0 faults, 0 missed, 2 other items missed, 0 events lost" in capsys.readouterr().err
    view = LineView(as_json=True)
    view.tick(none | {"items_missed": 2})
    told = json.loads(capsys.readouterr().out)
    assert told == {"losses": {"faults_missed": 0, "items_missed": 2, "events_lost": 0}}


def test_a_table_that_is_followed_is_printed_if_it_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    view = TableView("file", as_json=True, follow=True)
    shown = []
    for step_s, faults in ((0, 1), (0.9, 2), (0.2, 2), (5, 2), (0, 3)):
        now_s[0] += step_s
        view.tick(LOSSES | {"faults": faults})
        out = capsys.readouterr().out
        shown.append(json.loads(out)["losses"]["faults"] if out else None)
    assert shown == [1, None, 2, None, 3]
