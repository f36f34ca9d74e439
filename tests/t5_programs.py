"""Random single-threaded programs, stopped at random points: nothing different, little unknown."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import needs
from live import Mounts
from proving.programs import FILE_PAGES
from proving.runner import Outcome, Runner
from t5_accounting import fill

from xipfs.cli.run import exact_environment
from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

PROGRAMS = 60
EXACT_PROGRAMS = 12


def outcome_of(live: Mounts, touch: Path, programs: int, *, exact: bool = False) -> Outcome:
    """Run ``programs`` programs: the same each time, for new ones are what tools/verify is for."""
    image = live.image()
    fill(image, {"x": PageKind.XIP, "p": PageKind.PAGECACHE}, pages=FILE_PAGES)
    mount = live.mount(image, "observe=tracefs")
    environment = exact_environment(mount.mount, os.environ) if exact else None
    runner = Runner(mount.directory, touch, ["x", "p"], environment=environment)
    words = "--exact " if exact else ""
    print(f"seeds 1 to {programs}: tools/verify {words}--programs 1 --seed N")
    for seed in range(1, programs + 1):
        runner.run(seed)
    outcome = runner.outcome
    assert outcome.programs == programs
    assert outcome.pauses >= programs
    assert outcome.pages_compared > 10 * programs
    assert outcome.copies_compared > programs
    assert outcome.mapcounts_compared > programs
    return outcome


def test_random_programs_are_known_page_by_page(live: Mounts, touch: Path) -> None:
    outcome = outcome_of(live, touch, PROGRAMS)
    assert outcome.pages_unknown <= 0.05 * outcome.pages_compared


def test_nothing_is_unknown_in_exact_mode(live: Mounts, touch: Path) -> None:
    """Without fault-around no page comes by a rule, and what userfaultfd changes is followed."""
    assert outcome_of(live, touch, EXACT_PROGRAMS, exact=True).pages_unknown == 0
