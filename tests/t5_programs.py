"""Random single-threaded programs, stopped at random points: nothing different, little unknown."""

from __future__ import annotations

from pathlib import Path

from conftest import needs
from live import Mounts
from proving.programs import FILE_PAGES
from proving.runner import Runner
from t5_accounting import fill

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

PROGRAMS = 60


def test_random_programs_are_known_page_by_page(live: Mounts, touch: Path) -> None:
    image = live.image()
    fill(image, {"x": PageKind.XIP, "p": PageKind.PAGECACHE}, pages=FILE_PAGES)
    mount = live.mount(image, "observe=tracefs")
    runner = Runner(mount.directory, touch, ["x", "p"])
    # The same programs each time: new ones are for tools/verify, which has time for them.
    first = 1
    print(f"seeds {first} to {first + PROGRAMS - 1}: tools/verify --programs 1 --seed N")
    for seed in range(first, first + PROGRAMS):
        runner.run(seed)
    outcome = runner.outcome
    assert outcome.programs == PROGRAMS
    assert outcome.pauses >= PROGRAMS
    assert outcome.pages_unknown <= 0.05 * outcome.pages_compared
    assert outcome.pages_compared > 10 * PROGRAMS
    assert outcome.copies_compared > PROGRAMS
    assert outcome.mapcounts_compared > PROGRAMS
