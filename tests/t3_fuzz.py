"""Some hundreds of damaged images, of all the 100,000 that tools/fuzz makes."""

from __future__ import annotations

import random

import pytest
from fuzz_images import TEMPLATES, template
from fuzzing import FuzzError, Memory, Outcome, contents, foreign_in, judge, make_case
from fuzzing import mount as open_image

from xipfs.image.check import check

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_images_are_sound_before_they_are_damaged(name: str) -> None:
    image, places = template(name)
    assert check(Memory(image, writable=False), name) == []
    assert len(places.by_structure) > 100
    fs = open_image(Memory(image, writable=False))
    assert foreign_in(contents(fs)) == ""


def test_another_files_bytes_would_be_noticed() -> None:
    """The judge itself: one page of a file holds another file's bytes."""
    image, places = template("xip")
    one, other = sorted(places.pages)[:2]
    mutant = bytearray(image)
    mutant[one * 4096 : (one + 1) * 4096] = image[sorted(places.pages)[-1] * 4096 :][:4096]
    assert other
    foreign = foreign_in(contents(open_image(Memory(mutant, writable=False))))
    assert foreign.startswith("inode "), foreign


@pytest.mark.parametrize("part", range(4))
def test_damaged_images_end_in_clear_errors(part: int) -> None:
    outcome = Outcome()
    for number in range(part * 100, (part + 1) * 100):
        try:
            judge(make_case(SEED, number), outcome)
        except FuzzError as error:
            pytest.fail(f"{error}; again: tools/fuzz --replay {SEED}:{number}")
    assert outcome.endings["read-only served"] > 20, f"seed {SEED}"
