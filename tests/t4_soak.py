"""The soak for a minute: migrations under load lose nothing. Longer: ``tools/soak``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import soaking
from conftest import needs

pytestmark = [needs("root", "fuse")]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        pytest.param("observe=tracefs,ram=768K", 60, marks=needs("tracefs")),
        ("observe=off,ram=64K", 5),  # hardly any frame
    ],
)
def test_nothing_is_lost_while_ranges_migrate_under_load(
    tmp_path: Path, options: str, seconds: float
) -> None:
    seed = random.randrange(1 << 30)
    print(f"replay: tools/soak --minutes {seconds / 60:.2f} --seed {seed} -o {options}")
    outcome = soaking.run(tmp_path, seconds, seed, [options], lambda _done, _outcome: None)
    assert outcome.migrations > 5
    assert set(outcome.operations) == {"store", "write", "check", "cut", "fork"}
    assert set(outcome.failed) <= {"pinned", "no_ram"}
    assert outcome.verified == (1 if "tracefs" in options else 0)
