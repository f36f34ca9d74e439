"""What ``xipfs policy`` prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from live import COMMAND, ENVIRONMENT, xipfs

from xipfs.migrate.registry import policies

MINE = '''
"""Two frames for whoever comes first."""
from dataclasses import dataclass
from xipfs.migrate.policy import FAULT, promote

@dataclass
class Mine:
    SIGNALS = frozenset({FAULT})
    frames: int = 2

    def plan(self, signal, seen):
        if seen.promoted < self.frames:
            yield promote(signal.page, "early")

POLICY = Mine
'''


def said(*words: str, code: int = 0) -> str:
    done = xipfs("policy", *words, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout or done.stderr


def test_list_names_every_policy_in_a_line() -> None:
    lines = said("list").splitlines()
    assert [line.split()[0] for line in lines] == list(policies())
    assert "off        no page moves unless somebody asks for it by hand." in lines
    assert all(len(line) < 100 and "`" not in line for line in lines)
    rows = {row["name"]: row for row in json.loads(said("list", "--json"))}
    assert rows["tpp"]["signals"] == ["evicted", "fault", "hint", "moved", "refused"]
    assert rows["threshold"]["parameters"] == {"pages_per_s": 0, "stay_ms": 0, "promote": None}
    assert (rows["belady"]["source"], rows["off"]["signals"]) == ("replays only", [])


def test_list_goes_on_after_a_policy_that_cannot_be_loaded(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[xipfs.policies]\nbroken = absent:Policy\n")
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(tmp_path)])
    done = subprocess.run(
        [*COMMAND, "policy", "list"],
        env=ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "broken     policy broken cannot be loaded: ModuleNotFoundError" in done.stdout
    assert "tpp        a page earns RAM at its second fault" in done.stdout


def test_show_and_test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    assert said("show", str(file)).replace(str(file), "FILE") == (
        "Two frames for whoever comes first.\n"
        "\n"
        "signals     fault\n"
        "source      FILE\n"
        "pages_per_s default 0\n"
        "stay_ms     default 0\n"
        "frames      default 2\n"
    )
    lines = said("test", f"{file},frames=1").splitlines()
    assert lines[:2] == [
        "        hits in RAM               writes to region  its moves",
        "trace   policy    fifo  optimum   policy    fifo    promote   demote pingpong",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["zipf", "scan", "writes"]
    assert {tuple(line.split()[-3:]) for line in lines[2:]} == {("1", "0", "0")}
    assert all(len(line) < 80 for line in lines)
    rows = json.loads(said("test", f"{file},frames=1", "--json", "--frames", "50"))
    assert [row["promotions"] for row in rows] == [1, 1, 1]
    for row in rows:
        assert 0 <= row["hits"] < row["fifo_hits"] < row["optimum_hits"] < row["accesses"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("while True: pass", "PolicyTimeout('it took more than 3 s for one decision')"),
        ("raise SystemExit(0)", "SystemExit(0)"),
        ("yield 7", "ValueError('plan holds 7; expected a Move')"),
    ],
)
def test_a_policy_that_fails_in_a_test_is_told(tmp_path: Path, body: str, why: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(MINE.replace('yield promote(signal.page, "early")', body))
    told = said("test", str(file), code=1)
    assert told.startswith(f"xipfs policy: policy {file} failed: {why} in ")


def test_a_file_that_does_not_end_is_no_policy(tmp_path: Path) -> None:
    file = tmp_path / "loop.py"
    file.write_text("while True: pass\n")
    for action in ("test", "show"):
        told = said(action, str(file), code=2)
        assert f"policy {file} cannot be loaded: PolicyTimeout('it took more than 3 s" in told


def test_what_is_wrong_is_told() -> None:
    for words, message in (
        (("test", "lru"), "policy=lru; expected one of off, fifo,"),
        (("test", "tpp,high"), "parameter high''; expected KEY=VALUE"),
        (("test", "tpp,high=0"), "high=0; expected a whole number of 1 or more"),
        (("test", "tpp,stay_ms=x"), "stay_ms=x; expected a whole number of 0 or more"),
        (("test", "tpp", "--frames", "0"), "--frames 0; expected 1 or more"),
        (("show", "/absent.py"), "cannot be loaded: FileNotFoundError"),
        ((), "the following arguments are required: ACTION"),
    ):
        told = said(*words, code=2)
        assert message in told
        assert not re.search("Traceback", told)
