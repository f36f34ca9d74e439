"""The seed's three arguments, in numbers worked out by hand (rules P5, P6, G2, G8 to G11).

What each mapping can hold is written out for the rows that decide the argument; the rules beside
them say why.
"""

from __future__ import annotations

import pytest

from xipfs.mm.arguments import gup_costs, gup_mix, mappings, memmap
from xipfs.mm.rules import Rules, rule_set_names

GIB = 1 << 30
MIB = 1 << 20

NO_FLAG = "BUG_ON(!(vma->vm_flags & (VM_PFNMAP|VM_MIXEDMAP)))"
COW_PFNMAP = "BUG_ON((vma->vm_flags & VM_PFNMAP) && is_cow_mapping(vma->vm_flags))"
VALID_PFN = "BUG_ON((vma->vm_flags & VM_MIXEDMAP) && pfn_valid(pfn))"
PFNMAP_PAGE = "BUG_ON(vma->vm_flags & VM_PFNMAP)"


@pytest.mark.parametrize(
    ("struct_page", "mebibytes", "percent"), [(32, 8, 0.781), (56, 14, 1.367), (64, 16, 1.562)]
)
def test_p5_one_guest_pays_for_each_gibibyte(
    struct_page: int, mebibytes: int, percent: float
) -> None:
    (row,) = [row for row in memmap(GIB, [1]) if row.struct_page_bytes == struct_page]
    assert (row.memmap_bytes, row.percent_of_image) == (mebibytes * MIB, percent)
    assert not row.outweighs_image


@pytest.mark.parametrize(
    ("struct_page", "percent", "outweighs", "from_guests"),
    [(32, 78.125, False, 129), (56, 136.719, True, 74), (64, 156.25, True, 65)],
)
def test_p6_a_hundred_guests_outweigh_the_image_on_64_bits_only(
    struct_page: int, percent: float, outweighs: bool, from_guests: int
) -> None:
    (row,) = [row for row in memmap(GIB, [100]) if row.struct_page_bytes == struct_page]
    assert (row.percent_of_image, row.outweighs_image) == (percent, outweighs)
    assert row.outweighs_from_guests == from_guests


@pytest.mark.parametrize(("struct_page", "first"), [(32, 129), (56, 74), (64, 65)])
def test_p6_the_claim_turns_true_at_one_number_of_guests(struct_page: int, first: int) -> None:
    rows = [r for r in memmap(64 * MIB, [first - 1, first]) if r.struct_page_bytes == struct_page]
    assert [row.outweighs_image for row in rows] == [False, True]


def test_p6_equal_is_not_more() -> None:
    (row,) = [row for row in memmap(GIB, [64]) if row.struct_page_bytes == 64]
    assert (row.memmap_bytes, row.outweighs_image) == (GIB, False)


#: mapping, page, how inserted; then result, refcount, mapcount, rss, and what a write does.
Key = tuple[str, str, str]
Outcome = tuple[str, int | None, int | None, int, str]
NO, YES = "no struct page", "struct page"
PRIVATE_MIXED, PRIVATE_PFNMAP = "VM_MIXEDMAP private", "VM_PFNMAP private"
NOTHING: Outcome = ("EINVAL", None, None, 0, "-")


def bug(condition: str) -> Outcome:
    return (condition, None, None, 0, "-")


RAW_NO_PAGE: Outcome = ("ok", None, None, 0, "copied")
RAW_PAGE: Outcome = ("ok", 0, 0, 0, "copied")
COUNTED: Outcome = ("ok", 1, 1, 1, "copied")

#: What every kernel of the model says.
ALWAYS: dict[Key, Outcome] = {
    ("normal private", NO, "vm_insert_page"): NOTHING,
    ("normal private", YES, "vm_insert_page"): COUNTED,
    ("normal private", NO, "vm_insert_pfn"): bug(NO_FLAG),
    ("normal private", YES, "vm_insert_pfn"): bug(NO_FLAG),
    # PFNMAP: any frame, no counts, and copy on write only if the whole range is linear (I2, N6).
    (PRIVATE_PFNMAP, NO, "remap_pfn_range"): RAW_NO_PAGE,
    (PRIVATE_PFNMAP, YES, "remap_pfn_range"): RAW_PAGE,
    (PRIVATE_PFNMAP, NO, "remap in pieces"): NOTHING,
    (PRIVATE_PFNMAP, YES, "remap in pieces"): NOTHING,
    ("VM_PFNMAP shared", NO, "remap in pieces"): ("ok", None, None, 0, "-"),
    (PRIVATE_PFNMAP, NO, "vm_insert_pfn"): bug(COW_PFNMAP),
    ("VM_PFNMAP shared", YES, "vm_insert_pfn"): ("ok", 0, 0, 0, "-"),
    # MIXEDMAP: one page at a time, in any order, still copied on write. This is the argument.
    (PRIVATE_MIXED, NO, "vm_insert_pfn"): RAW_NO_PAGE,
    (PRIVATE_MIXED, YES, "vm_insert_pfn"): bug(VALID_PFN),
    (PRIVATE_MIXED, NO, "vm_insert_page"): NOTHING,
    (PRIVATE_MIXED, YES, "vm_insert_page"): COUNTED,
}
MIXED_NO: Key = (PRIVATE_MIXED, NO, "vm_insert_mixed")
MIXED_YES: Key = (PRIVATE_MIXED, YES, "vm_insert_mixed")
PAGE_IN_PFNMAP: Key = (PRIVATE_PFNMAP, YES, "vm_insert_page")
#: And where they part: the special bit (N12), the flag of vm_insert_page (I9), the era (I10).
PARTS: dict[str, dict[Key, Outcome | None]] = {
    "6.1": {MIXED_NO: RAW_NO_PAGE, MIXED_YES: RAW_PAGE, PAGE_IN_PFNMAP: bug(PFNMAP_PAGE)},
    "6.1-nospecial": {MIXED_NO: RAW_NO_PAGE, MIXED_YES: COUNTED, PAGE_IN_PFNMAP: bug(PFNMAP_PAGE)},
    "2.6.32": {MIXED_NO: RAW_NO_PAGE, MIXED_YES: RAW_PAGE, PAGE_IN_PFNMAP: COUNTED},
    "seed": {MIXED_NO: None, MIXED_YES: None, PAGE_IN_PFNMAP: COUNTED},
}


def outcomes(name: str) -> dict[Key, Outcome]:
    return {
        (row.mapping, row.page, row.insert): (
            row.result, row.refcount_change, row.mapcount_change, row.rss_change, row.write,
        )
        for row in mappings(Rules.parse(name))
    }  # fmt: skip


@pytest.mark.parametrize("name", rule_set_names())
def test_what_mappings_hold_in_every_kernel(name: str) -> None:
    found = outcomes(name)
    assert {key: found[key] for key in ALWAYS} == ALWAYS


@pytest.mark.parametrize("name", PARTS)
def test_what_mappings_hold_by_kernel(name: str) -> None:
    found = outcomes(name)
    assert {key: found.get(key) for key in PARTS[name]} == PARTS[name]


def test_g11_the_lockless_path_saves_locks_and_no_page_atomics() -> None:
    (one,) = gup_costs([1], [1])
    assert (one.slow_mmap_lock_atomics, one.slow_pte_lock_pairs, one.page_atomics) == (2, 1, 1)
    assert (one.fast_locks, one.fast_irq_pairs) == (0, 1)
    (many,) = gup_costs([64], [8])
    assert (many.slow_mmap_lock_atomics, many.slow_pte_lock_pairs) == (16, 512)
    assert (many.page_atomics, many.fast_locks, many.fast_irq_pairs) == (512, 0, 8)
    assert [(row.pages, row.threads) for row in gup_costs([1, 8], [1, 2])] == [
        (1, 1), (1, 2), (8, 1), (8, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "percent", "slow", "failed"),
    [
        # Every page normal: lockless throughout, if there is a bit to trust (G8, G9).
        ("6.1", 0, 0.0, 0.0),
        ("6.1-nospecial", 0, 100.0, 0.0),
        ("seed", 0, 100.0, 0.0),
        # Every page XIP: every call falls to the slow path, and gets nothing there (G2).
        ("6.1", 100, 100.0, 100.0),
        ("2.6.32", 100, 100.0, 100.0),
        ("seed", 100, 100.0, 100.0),
    ],
)
def test_xip_pages_take_the_lockless_path_away(
    name: str, percent: int, slow: float, failed: float
) -> None:
    (row,) = gup_mix(Rules.parse(name), [percent], pages=8, calls=50, seed=1)
    assert (row.xip_percent, row.pages, row.calls) == (percent, 8, 50)
    assert (row.slow_percent, row.failed_percent) == (slow, failed)


def test_a_few_xip_pages_spoil_many_calls() -> None:
    """With a tenth of the pages XIP, a call for 8 stays lockless with probability 0.9**8 = 43 %."""
    (row,) = gup_mix(Rules(), [10], pages=8, calls=1000, seed=1)
    assert 45 < row.slow_percent < 69
    assert row.failed_percent == row.slow_percent
    (again,) = gup_mix(Rules(), [10], pages=8, calls=1000, seed=1)
    assert again == row
