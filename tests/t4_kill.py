"""kill -9 of the daemon at random moments under load; ``tools/kill`` does the same for longer."""

from __future__ import annotations

import os
from pathlib import Path

import kills
import pytest
from conftest import needs

pytestmark = [needs("root", "fuse")]


@pytest.mark.parametrize("observe", ["off", pytest.param("tracefs", marks=needs("tracefs"))])
def test_what_was_promised_survives_the_daemon(tmp_path: Path, observe: str) -> None:
    seed = int(os.environ.get("XIPFS_SEED", "7"))
    print(f"replay (the moments differ): XIPFS_SEED={seed} pytest {__file__}")
    seen: list[int] = []
    options = [f"observe={observe}", "ram=128K"]
    outcome = kills.run(tmp_path, 10, seed, options, progress=seen.append)
    assert outcome.kills == len(seen) == 10
    assert outcome.operations > 100


def test_the_judge_knows_what_was_not_promised() -> None:
    old = {"a": b"x" * 32, "b": b"keep"}
    write = ["write", "a", 8, 16, 1, "fsync"]
    new = bytes_after = kills.applied(old, write)["a"]
    assert kills.violation(old, old, write) == ""
    assert kills.violation({"a": new, "b": b"keep"}, old, write) == ""
    torn = {"a": old["a"][:16] + new[16:], "b": b"keep"}
    assert kills.violation(torn, old, write) == ""
    foreign = {"a": bytes_after[:8] + b"????????" + bytes_after[16:], "b": b"keep"}
    assert "foreign bytes at 8" in kills.violation(foreign, old, write)
    assert "b differs" in kills.violation({"a": old["a"], "b": b"lost"}, old, None)
    assert "names ['b']" in kills.violation({"b": b"keep"}, old, ["truncate", "a", 1])
    assert kills.violation({"c": old["a"], "b": b"keep"}, old, ["rename", "a", "c"]) == ""
    assert "beside the file" in kills.violation({"a": new, "b": b""}, old, write)
