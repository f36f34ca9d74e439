"""The soak for some seconds: migrations under load lose nothing. Minutes: ``tools/soak``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import soaking
from conftest import needs

pytestmark = [needs("root", "fuse")]


@pytest.mark.parametrize("options", ["observe=off,ram=768K", "observe=off,ram=64K"])
def test_nothing_is_lost_while_ranges_migrate_under_load(tmp_path: Path, options: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"replay: tools/soak --minutes 0.13 --seed {seed} -o {options}")
    outcome = soaking.run(tmp_path, 8, seed, [options], lambda _done, _count: None)
    assert outcome.migrations > 20
    assert set(outcome.operations) == {"store", "write", "check", "cut", "fork"}
    assert set(outcome.failed) <= {"pinned", "no_ram"}
