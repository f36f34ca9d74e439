"""The interval map of the kernel's VMAs, against an plain list."""

from __future__ import annotations

import random

import pytest

from xipfs.trace.extents import Extents, Mark, joined


def test_a_store_replaces_and_what_it_cuts_keeps_its_mark() -> None:
    extents = Extents()
    extents.store(0, 100)
    extents.mark(10)
    extents.store(40, 60, None)
    assert extents.meeting(0, 100) == [(0, 40, True), (40, 60, True), (60, 100, True)]
    extents.cut(50, 70)
    assert extents.meeting(0, 100) == [(0, 40, True), (40, 50, True), (70, 100, True)]
    assert extents.meeting(50, 70) == []
    assert list(extents.cover(45, 75)) == [(45, 50, True), (50, 70, None), (70, 75, True)]


@pytest.mark.parametrize(
    ("marks", "together"),
    [((), False), ((False, False), False), ((None, False), None), ((None, True), True)],
)
def test_marks_join(marks: tuple[Mark, ...], together: Mark) -> None:
    assert joined(marks) is together


def outside(
    ranges: list[tuple[int, int, bool]], start: int, end: int
) -> list[tuple[int, int, bool]]:
    left = [(low, min(high, start), mark) for low, high, mark in ranges]
    right = [(max(low, end), high, mark) for low, high, mark in ranges]
    return [piece for piece in left + right if piece[0] < piece[1]]


def test_random_stores_and_cuts_agree_with_a_plain_list() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}: put it in place of the random one")
    rng = random.Random(seed)
    for _ in range(100):
        extents = Extents()
        plain: list[tuple[int, int, bool]] = []
        for _ in range(40):
            start = rng.randrange(63)
            end = rng.randint(start + 1, 64)
            kind = rng.randrange(3)
            if kind == 0:
                mark = any(m for low, high, m in plain if low < end and start < high)
                extents.store(start, end)
                plain = [*outside(plain, start, end), (start, end, mark)]
            elif kind == 1:
                extents.cut(start, end)
                plain = outside(plain, start, end)
            else:
                extents.mark(start)
                plain = [(low, high, m or low <= start < high) for low, high, m in plain]
            assert extents.meeting(0, 64) == sorted(plain)
