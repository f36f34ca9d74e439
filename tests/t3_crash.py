"""Every power cut of every operation, and of a seeded part of all pairs, recovered and judged."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from imagecheck import check as check_by_the_text
from proving.crash import tree
from proving.crash.explorer import Explorer, Tally, World
from proving.crash.making import explore_mkfs
from proving.crash.medium import Point, Undecided, Watched, keep_memory, next_choices
from proving.crash.mutants import REDUNDANT, Hunt, all_mutants, calls_in_sources
from proving.crash.repairing import explore_repairs
from proving.crash.sweep import ROOT, Log, sweep
from proving.crash.workloads import OPERATIONS, Workload, base_image, workloads

from xipfs.errors import UsageError
from xipfs.memory.emulated import EmulatedMedium

#: CRASH_SEED=N python -m pytest tests/t3_crash.py draws other pairs.
SEED = int(os.environ.get("CRASH_SEED", "1"))
PAIRS = 20
BASE = base_image()
keep_memory()


def explored(*todo: Workload) -> Tally:
    explorer = Explorer(BASE)
    for workload in todo:
        explorer.explore(workload.name, *workload.steps())
    return explorer.tally


def test_the_image_is_small_and_sound() -> None:
    assert len(BASE) <= 256 << 10
    check_by_the_text(BASE)
    assert BASE.count(b"Foreign!" * 512) >= 8, "what is free must not read as zeros"


@pytest.mark.parametrize("part", range(8))
def test_every_cut_of_one_operation(part: int) -> None:
    names = list(OPERATIONS)[part::8]
    tally = explored(*(Workload((name,), "fsync") for name in names))
    assert tally.violations == []
    assert tally.exhaustive_points == tally.points >= 4 * len(names)
    assert tally.runs > tally.points
    assert tally.recovery_points > len(names)
    assert tally.trees_used >= len(names) // 2


def test_every_cut_of_a_pair() -> None:
    chosen = random.Random(SEED).sample(workloads(2), PAIRS)
    tally = explored(*chosen)
    assert tally.violations == [], f"CRASH_SEED={SEED}"
    assert tally.exhaustive_points == tally.points
    assert tally.workloads == PAIRS


def test_the_states_after_every_single_store_are_runs_of_the_next_fence() -> None:
    """On a small case: what is seen through all choices is what each store could have left."""
    medium = Watched(bytes(4096))
    seen = [bytes(128)]
    for offset, data in ((0, b"A" * 16), (64, b"C" * 8), (8, b"B" * 8), (4, b"D" * 8)):
        for at in range(0, len(data), 4):
            medium.store(offset + at, data[at : at + 4])
            seen.append(bytes(medium.now[:128]))
    runs = set()
    choices: list[int] = []
    while True:
        state = Undecided(Point.of(medium), choices)
        runs.add(bytes(state.load(0, 128)))
        if not next_choices(choices, state.counts):
            break
    assert set(seen) <= runs
    assert runs == {image[:128] for image in medium.states().images}


@pytest.mark.parametrize("name", ["rename a b exchange", "write b unaligned", "symlink"])
def test_states_told_apart_late_are_those_enumerated_one_by_one(name: str) -> None:
    """Each image that the medium enumerates is recovered by itself; no other tree comes out."""
    medium = Watched(BASE)
    images: dict[bytes, None] = {}
    medium.at_fence = lambda: images.update(dict.fromkeys(medium.states(SEED).images[:300]))
    world = World(medium, ram_pages=2)
    trees = [tree.tree_of(world.fs)]
    for step in OPERATIONS[name].steps:
        world.run(step)
    trees.append(tree.tree_of(world.fs))
    world.fs.close()
    assert len(images) > 100
    for image in images:
        again = EmulatedMedium(image)
        assert tree.tree_of(tree.open_medium(again, ram_pages=1)) in trees
        tree.judge_structure(again)
        check_by_the_text(bytes(again.now))


def test_what_was_cut_off_stays_away_when_a_resident_page_grows() -> None:
    """The end moves at once, the frame goes home later: the home must have zeros before."""
    tally = explored(Workload(("truncate b 9", "store and msync b"), "none"))
    assert tally.violations == []
    assert tally.exhaustive_points == tally.points


def test_mkfs_cut_anywhere_leaves_no_image_or_a_whole_one() -> None:
    tally = explore_mkfs()
    assert tally.violations == []
    assert tally.exhaustive_points == tally.points == 6


def test_repairs_cut_anywhere_are_begun_again_and_end_in_the_same_tree() -> None:
    tally = explore_repairs(BASE)
    assert tally.violations == []
    assert tally.exhaustive_points == tally.points >= 15


def test_every_flush_and_fence_of_the_sources_has_a_mutant() -> None:
    mutants = all_mutants()
    assert sum(mutant.is_call for mutant in mutants) == calls_in_sources() == 26
    assert len({mutant.name for mutant in mutants}) == len(mutants) == 31
    assert {mutant.name for mutant in mutants if mutant.redundant} == set(REDUNDANT)
    design = " ".join((ROOT / "xipfs" / "DESIGN.md").read_text().split())
    for name in REDUNDANT:
        assert f"`{name}`" in design


@pytest.mark.parametrize(
    "name",
    [
        "image/journal.py commit: without fence 1",
        "image/journal.py commit: store 3 and store 4 swapped",
        "image/journal.py _apply: without flush 1",
        "image/journal.py _clear: without fence 1",
        "image/volume.py set_mounted: without flush 1",
        "image/mending.py take: without flush 1",
        "fs/content.py _link: without flush 1",
        "fs/namespace.py symlink: without flush 1",
    ],
)
def test_a_mutant_is_caught(name: str) -> None:
    """These are quick to catch; `tools/crash --mutants` tries all of them."""
    (mutant,) = (mutant for mutant in all_mutants() if mutant.name == name)
    before = mutant.original()
    assert Hunt(SEED).caught_by(mutant)
    assert mutant.original() is before


def test_a_point_of_too_many_states_is_sampled_and_says_so() -> None:
    explorer = Explorer(BASE, states_max=2)
    explorer.explore("write", *Workload(("rename a b",), "none").steps())
    tally = explorer.tally
    assert tally.violations == []
    assert 0 < tally.exhaustive_points < tally.points
    assert tally.runs > 300, "few stores, few missing, and 256 samples"


def test_a_sweep_resumes_from_its_log_and_refuses_another_s(tmp_path: Path) -> None:
    todo = [Workload(("chmod",), kind) for kind in ("none", "sync")]
    log = tmp_path / "log"

    def sweep_on(seed: int = 1) -> tuple[Tally, list[int]]:
        told: list[int] = []
        kept = Log(log, seed)
        tally = sweep(todo, kept, seed=seed, processes=1, progress=lambda n, _, __: told.append(n))
        return tally, told

    whole, told = sweep_on()
    assert (whole.workloads, whole.violations, told) == (2, [], [1, 2])
    head, first, second = log.read_text().splitlines()
    log.write_text(f"{head}\n{first}\n{second[:40]}")  # as an interrupt leaves it
    again, told = sweep_on()
    assert (again.workloads, told) == (2, [2])
    assert sweep_on() == (again, [])
    with pytest.raises(UsageError, match="another seed"):
        sweep_on(seed=2)
