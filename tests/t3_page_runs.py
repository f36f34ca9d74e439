"""Items told of runs of pages, against one dictionary entry a page."""

from __future__ import annotations

import random

import pytest

from xipfs.accounting.page_runs import PageRuns


@pytest.mark.parametrize("seed", range(5))
def test_the_newest_of_each_page(seed: int) -> None:
    """Replay: the seed in the test's name."""
    chance = random.Random(seed)
    runs: PageRuns[int] = PageRuns(5000)
    newest: dict[tuple[int, int], int] = {}
    told: list[int] = []  # pages of each item
    for number in range(300):
        ino = chance.randint(2, 3)
        first = chance.randrange(4000)
        pages = range(first, first + chance.choice((1, 1, 7, 600)))
        runs.tell(ino, pages, number)
        newest |= {(ino, page): number for page in pages}
        told.append(len(pages))
        for _ in range(50):
            page = (chance.randint(2, 4), chance.randrange(5600))
            item = newest.get(page)
            if item is not None and sum(told[item:]) > 5000:
                item = None
            assert runs.get(*page) == item


def test_nothing_is_kept_of_what_was_forgotten() -> None:
    runs: PageRuns[str] = PageRuns(10)
    for number in range(100):
        runs.tell(number, range(600 * number, 600 * number + 1), "item")
    assert len(runs._stretches) == 10
