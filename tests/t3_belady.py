"""Belady's bound and the policy that reaches it, against every possible way on small streams."""

from __future__ import annotations

import random
from itertools import product

import pytest

from xipfs.errors import UsageError
from xipfs.fuse.deciding import Deciding
from xipfs.migrate.registry import make_policy, policies
from xipfs.options import parse_options
from xipfs.replay.simulate import TRACES, Access, optimum, replay, seeded_trace


def stream(pages: str) -> list[Access]:
    return [Access(place * 1_000_000, int(page), write=False) for place, page in enumerate(pages)]


def best_of_all(pages: str, frames: int) -> int:
    """Return the most hits of any way to fill and empty frames after each access."""
    ways: dict[frozenset[str], int] = {frozenset(): 0}
    for page in pages:
        after: dict[frozenset[str], int] = {}
        for resident, hits in ways.items():
            hits += page in resident
            choices = {resident, *(resident - {out} for out in resident)}
            choices |= {kept | {page} for kept in set(choices) if len(kept | {page}) <= frames}
            for kept in choices:
                after[kept] = max(after.get(kept, 0), hits)
        ways = after
    return max(ways.values())


def hits_of_belady(pages: str, frames: int) -> int:
    return replay(stream(pages), make_policy("belady", [], frames), frames).hits


@pytest.mark.parametrize("frames", [1, 2])
def test_every_stream_of_six_accesses_to_three_pages(frames: int) -> None:
    for pages in map("".join, product("123", repeat=6)):
        best = best_of_all(pages, frames)
        assert (pages, optimum(stream(pages), frames)) == (pages, best)
        assert (pages, hits_of_belady(pages, frames)) == (pages, best)


def test_random_streams_of_five_pages() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for _ in range(150):
        pages = "".join(generator.choices("12345", [5, 4, 3, 2, 1], k=generator.randrange(7, 16)))
        frames = generator.randrange(1, 5)
        best = best_of_all(pages, frames)
        assert (pages, frames, optimum(stream(pages), frames)) == (pages, frames, best)
        assert (pages, frames, hits_of_belady(pages, frames)) == (pages, frames, best)


@pytest.mark.parametrize("kind", TRACES)
def test_the_policy_reaches_the_bound_on_the_seeded_traces(kind: str) -> None:
    trace = seeded_trace(kind, 3, count=5000)
    outcome = replay(trace, make_policy("belady", [], 100), 100)
    assert outcome.hits == optimum(trace, 100)


def test_it_is_listed_and_refused_on_a_mount() -> None:
    assert policies()["belady"] == "replays only"
    with pytest.raises(UsageError, match="needs to know the future"):
        Deciding(None, parse_options(["policy=belady"]), None)  # type: ignore[arg-type]
