"""Random calls on names by three users, on a mount and on the temporary directory's filesystem.

What a difference is, and what is left out, says differential.py. XIPFS_SEED=N runs another seed,
XIPFS_CALLS=N more calls.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import differential
import pytest
from conftest import needs
from live import Mounts

pytestmark = [needs("root", "fuse")]


@pytest.mark.parametrize("seed", [int(os.environ.get("XIPFS_SEED", "8"))])
def test_names_modes_owners_and_times_are_as_the_kernels_own(live: Mounts, seed: int) -> None:
    calls = int(os.environ.get("XIPFS_CALLS", "700"))
    print(f"replay: XIPFS_SEED={seed} XIPFS_CALLS={calls} pytest {__file__}")
    mnt = live.mount(live.image(), "allow_other")
    oracle = live.directory / "oracle"
    for directory in (mnt.directory, oracle):
        directory.mkdir(exist_ok=True)
        for above in (directory, *directory.parents[:4]):
            os.chmod(above, os.stat(above).st_mode | 0o055)
    # A mount of FUSE's serves no devices and honours no set-id bits; neither may the oracle.
    subprocess.run(["mount", "--bind", oracle, oracle], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,nosuid,nodev", oracle], check=True)
        (mnt / "tree").mkdir()
        (oracle / "tree").mkdir()
        differential.run(mnt / "tree", oracle / "tree", seed, calls)
    finally:
        subprocess.run(["umount", oracle], check=True)


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
