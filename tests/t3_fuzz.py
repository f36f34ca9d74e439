"""Some hundreds of damaged images, of all the 100,000 that tools/fuzz makes."""

from __future__ import annotations

import random

import pytest
from fuzz_images import BLOCK, TEMPLATES, template
from fuzzing import Case, FuzzError, Memory, Outcome, contents, foreign_in, judge, make_case
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


@pytest.mark.parametrize("kind", [1, 2], ids=["fifo", "device"])
def test_a_full_image_keeps_what_two_claim_for_who_asks_first(kind: int) -> None:
    """What has no pages claims the attributes' block of a file; no block is free for a copy."""
    image, places = template("full")
    mutant = bytearray(image)
    (mode,) = [
        each.offset
        for each in places.by_structure["special inode.mode"]
        if image[each.offset + 1] >> 4 == kind
    ]
    (root,) = [e for e in places.by_structure["special inode.root"] if e.offset == mode - 4 + 64]
    block = places.by_structure["xattrs.crc"][0].offset // BLOCK
    mutant[root.offset : root.offset + 8] = (1 << 41 | block).to_bytes(8, "little")
    for fix in root.fixes:
        fix(mutant)
    outcome = Outcome()
    judge(Case(0, 0, bytes(mutant), ["image full"], forged=True, copied=False), outcome)
    assert outcome.endings["repaired, but for what lacked a block"] == 1


@pytest.mark.parametrize("part", range(4))
def test_damaged_images_end_in_clear_errors(part: int) -> None:
    outcome = Outcome()
    for number in range(part * 100, (part + 1) * 100):
        try:
            judge(make_case(SEED, number), outcome)
        except FuzzError as error:
            pytest.fail(f"{error}; again: tools/fuzz --replay {SEED}:{number}")
    assert outcome.endings["read-only served"] > 20, f"seed {SEED}"
