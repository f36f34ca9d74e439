"""Random calls on names by three users, on a mount and on the temporary directory's filesystem.

What a difference is, and what is left out, says differential.py. XIPFS_SEED=N runs another seed,
XIPFS_CALLS=N more calls.
"""

from __future__ import annotations

import os
from pathlib import Path

import differential
import pytest
from acting import open_the_way, reference
from conftest import needs
from live import Mounts

pytestmark = [needs("root", "fuse")]


@pytest.mark.parametrize("seed", [int(os.environ.get("XIPFS_SEED", "8"))])
def test_names_modes_owners_and_times_are_as_the_kernels_own(live: Mounts, seed: int) -> None:
    calls = int(os.environ.get("XIPFS_CALLS", "700"))
    print(f"replay: XIPFS_SEED={seed} XIPFS_CALLS={calls} pytest {__file__}")
    mnt = live.mount(live.image(), "allow_other")
    open_the_way(mnt.directory)
    with reference(live.directory / "oracle") as oracle:
        (mnt / "tree").mkdir()
        (oracle / "tree").mkdir()
        differential.run(mnt / "tree", oracle / "tree", seed, calls)


def test_a_difference_is_told_with_what_led_to_it(tmp_path: Path) -> None:
    ours, oracle = tmp_path / "ours", tmp_path / "oracle"
    for directory in (ours, oracle):
        directory.mkdir()
    with differential.pair(ours, oracle, 1) as both:
        for _ in range(30):
            both.step(quiet=False)
        os.chmod(ours / "work", 0o700)
        with pytest.raises(differential.DifferenceError, match=r"(?s)->.*xipfs"):
            both.step(quiet=False)
