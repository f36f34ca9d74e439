"""Random programs, stopped at random points, are known page by page.

Programs of one thread must come out with nothing different and nothing unknown. With threads that
share their memory, get_user_pages, other processes' writes and reclaim, what is not marked unknown
must not differ, and little may be unknown. Programs count their own faults too, with getrusage(2):
the records must have as many.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from conftest import needs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import PAGE, Mounts
from proving.programs import FILE_PAGES
from proving.runner import Outcome, Runner
from t5_accounting import fill

from xipfs.cli.run import exact_environment
from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

PROGRAMS = 60
EXACT_PROGRAMS = 12
UNRULY_PROGRAMS = 25
EXAMPLES = 25


def runner_on(
    live: Mounts, touch: Path, *, exact: bool = False, direct: Path | None = None
) -> Runner:
    image = live.image()
    fill(image, {"x": PageKind.XIP, "p": PageKind.PAGECACHE}, pages=FILE_PAGES)
    mount = live.mount(image, "observe=tracefs")
    environment = exact_environment(mount.mount, os.environ) if exact else None
    return Runner(mount.directory, touch, ["x", "p"], environment=environment, direct=direct)


def outcome_of(runner: Runner, programs: int, words: str = "") -> Outcome:
    """Run ``programs`` programs: the same each time, for new ones are what tools/verify is for."""
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
    outcome = outcome_of(runner_on(live, touch), PROGRAMS)
    assert outcome.pages_unknown == 0
    assert outcome.bracket_faults > PROGRAMS


def test_nothing_is_unknown_in_exact_mode(live: Mounts, touch: Path) -> None:
    """Without fault-around no page comes by a rule, and what userfaultfd changes is followed."""
    outcome = outcome_of(runner_on(live, touch, exact=True), EXACT_PROGRAMS, "--exact ")
    assert outcome.pages_unknown == 0


def test_unruly_programs_differ_nowhere_but_where_it_is_said(
    live: Mounts, touch: Path, tmp_path: Path
) -> None:
    direct = tmp_path / "direct"
    direct.write_bytes(b"d" * PAGE * FILE_PAGES)
    outcome = outcome_of(runner_on(live, touch, direct=direct), UNRULY_PROGRAMS, "--unruly ")
    print(f"unknown: {outcome.pages_unknown} of {outcome.pages_compared}")
    print(outcome.unknown_by_reason)
    assert outcome.pages_unknown <= 0.05 * outcome.pages_compared


@pytest.fixture
def runner(live: Mounts, touch: Path) -> Runner:
    return runner_on(live, touch)


# A failure prints the program, shrunk, and the line that makes hypothesis play it again.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rng=st.randoms(use_true_random=False))
def test_programs_that_hypothesis_makes(runner: Runner, rng: random.Random) -> None:
    runner.run_random(rng, "made by hypothesis")
    assert runner.outcome.pages_unknown == 0
