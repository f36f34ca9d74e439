"""The loop of the bulk path: what it does for one access after another, compiled or not.

A hit needs no more than the page tables. A miss is looked up among the *outcomes*: what the slow
path did, earlier in the same call, in the same situation (``bulk_learn.py``). So this module holds
no rule of its own. It asks the functions of ``rules`` and ``pte`` that the slow path asks, applies
an outcome to arrays, and where no outcome fits it stops and says so.

Everything here is written for numba and runs without it: flat loops over int64 arrays, no objects.
Tables are two-dimensional arrays whose columns have names.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xipfs.memory.frames import PG_ANON, PG_SWAPCACHE
from xipfs.mm import rules
from xipfs.mm.pte import PTE_PFN_SHIFT, PTE_PRESENT, pte_after_access, pte_permits

Ints = npt.NDArray[np.int64]

# Columns of World.rows: one row a VMA, sorted by address within its address space.
START: Final = 0  #: first virtual page
END: Final = 1  #: virtual page after the last
FLAGS: Final = 2
PGOFF: Final = 3
FRAMES: Final = 4  #: first entry in World.frames, or one of the next two
ANONYMOUS: Final = -1
FOREIGN: Final = -2  #: a backer whose handlers only the slow path can call
FILE_PAGES: Final = 5
MIDDLE: Final = 6  #: entry of World.middles for the first gibibyte of the VMA
ROW_COLUMNS: Final = 7

#: Instead of a frame: the page lies beyond the file's end, or only the slow path may ask.
NO_FRAME: Final = -2

# What a miss finds: together with the VMA and the kind of access, the key of an outcome.
EMPTY_ANONYMOUS: Final = 0
EMPTY_XIP: Final = 1
EMPTY_RESIDENT: Final = 2
EMPTY_ABSENT: Final = 3
PRESENT_RAW: Final = 4
PRESENT_NORMAL: Final = 5
STATES: Final = 6

# Columns of World.outcomes: first what must be equal (-1: is not compared) ...
NEXT: Final = 0  #: another outcome of the same key, or -1
BITS: Final = 1  #: the PTE's bits below the pfn
PAGE_FLAGS: Final = 2
PAGE_REF: Final = 3
PAGE_MAP: Final = 4
# ... then what happens. "Page" is the counted page that was mapped or is the file's.
NEW_BITS: Final = 5
SOURCE: Final = 6  #: which pfn the PTE holds afterwards:
SAME: Final = 0
FILES_FRAME: Final = 1
FILLED: Final = 2
COPIED: Final = 3
ZERO_PAGE: Final = 4
REF_ADDED: Final = 7
MAP_ADDED: Final = 8
FLAGS_AFTER: Final = 9
COPIES: Final = 10  #: 1 if an anonymous frame is taken, with these counts:
COPY_REF: Final = 11
COPY_MAP: Final = 12
COPY_FLAGS: Final = 13
FILLS: Final = 14  #: 1 if a page-cache frame is taken for an absent page
FILL_REF: Final = 15
FILL_MAP: Final = 16
FILL_FLAGS: Final = 17
OUTCOME_COLUMNS: Final = 18

# Rows and columns of World.free: what is left of each lent free list.
RAM: Final = 0
ANON: Final = 1
TABLES: Final = 2
DEPTH: Final = 0
NEXT_NUMBER: Final = 1
END_NUMBER: Final = 2

# World.wanted: the situation of the last miss.
KEY: Final = 0  #: -1: no outcome can stand for it
PAGE: Final = 1  #: pfn of the counted page concerned, or -1
SITUATION: Final = 1  #: what an outcome's BITS..PAGE_MAP must equal, at SITUATION + column
WANTED: Final = SITUATION + PAGE_MAP + 1

# Columns of World.tally.
AT: Final = 0
HITS: Final = 1
TALLY: Final = 2

# Why ``run`` returned.
FINISHED: Final = 0
NEEDS_SLOW_PATH: Final = 1
NEEDS_TABLES: Final = 2

#: log2 of the pages under a leaf, and under a middle table.
_LEAF_PAGES_SHIFT: Final = 9
_MIDDLE_PAGES_SHIFT: Final = 18
_SLOT_MASK: Final = 511


class World(NamedTuple):
    """Every array that the loop reads or writes, all of them the machine's own or views of it.

    ``process`` int32[n], ``page`` int64[n] (virtual page numbers), ``write`` bool[n]: the trace.
    ``first_row`` int64[processes + 1]: where the rows of a process begin. ``middles``: middle
    tables by row and gibibyte. ``heads`` int64[keys]: first outcome of a key or -1; ``uses``:
    how often each outcome was repeated. ``leaves_made`` int64[processes].
    """

    process: npt.NDArray[np.int32]
    page: Ints
    write: npt.NDArray[np.bool_]
    first_row: Ints
    rows: Ints
    middles: Ints
    entries: Ints
    refcount: npt.NDArray[np.int32]
    mapcount: npt.NDArray[np.int32]
    page_flags: npt.NDArray[np.uint8]
    frames: Ints
    ram_returned: Ints
    anon_returned: Ints
    tables_returned: Ints
    free: Ints
    outcomes: Ints
    heads: Ints
    uses: Ints
    leaves_made: Ints
    wanted: Ints
    tally: Ints
    zero_pfn: int
    pte_special: bool
    mixed_zero_is_raw: bool


def run(world: World) -> int:
    """Carry out accesses from tally[AT] on; stop at the end or at one that this cannot do.

    Returns FINISHED, NEEDS_SLOW_PATH (the access at tally[AT] is still to be done, ``wanted``
    tells its situation) or NEEDS_TABLES (the pool of page tables is used up).
    """
    at = world.tally[AT]
    hits = 0
    reason = FINISHED
    while at < len(world.page):
        process = world.process[at]
        page = world.page[at]
        write = world.write[at]
        row = find_row(world.rows, world.first_row[process], world.first_row[process + 1], page)
        if row < 0 or not rules.vma_permits(world.rows[row, FLAGS], write):
            world.wanted[KEY] = -1
            reason = NEEDS_SLOW_PATH
            break
        region = (page >> _MIDDLE_PAGES_SHIFT) - (world.rows[row, START] >> _MIDDLE_PAGES_SHIFT)
        middle = world.middles[world.rows[row, MIDDLE] + region]
        leaf = world.entries[middle + (page >> _LEAF_PAGES_SHIFT & _SLOT_MASK)]
        slot = leaf + (page & _SLOT_MASK)
        pte = world.entries[slot]
        if pte_permits(pte, write):
            used = pte_after_access(pte, write)
            if used != pte:
                world.entries[slot] = used
            hits += 1
        else:
            frame = placed_frame(world, row, page)
            outcome = find_outcome(world, row, page, write, pte, frame)
            if outcome >= 0 and middle == 0:
                # Known, but the loop makes leaves only; there is nothing to learn from it again.
                world.wanted[KEY] = outcome = -1
            if outcome < 0:
                reason = NEEDS_SLOW_PATH
                break
            if leaf == 0:
                leaf = take(world, TABLES, world.tables_returned) * (_SLOT_MASK + 1)
                if leaf < 0:
                    reason = NEEDS_TABLES
                    break
                world.entries[middle + (page >> _LEAF_PAGES_SHIFT & _SLOT_MASK)] = leaf
                world.leaves_made[process] += 1
                slot = leaf + (page & _SLOT_MASK)
            apply(world, world.outcomes[outcome], row, page, slot, frame)
            world.uses[outcome] += 1
        at += 1
    world.tally[AT] = at
    world.tally[HITS] += hits
    return reason


def find_row(rows: Ints, low: int, end: int, page: int) -> int:
    """Return which of the rows [low, end) contains ``page``, or -1 (find_vma).

    How often it halves depends on the number of rows alone, so no branch is hard to predict.
    """
    count = end - low
    while count > 1:
        half = count >> 1
        low += half * (rows[low + half, START] <= page)
        count -= half
    if count == 1 and rows[low, START] <= page < rows[low, END]:
        return low
    return -1


def placed_frame(world: World, row: int, page: int) -> int:
    """Return the entry of ``frames`` for the page: a pfn or ABSENT; NO_FRAME where it has none."""
    base = world.rows[row, FRAMES]
    index = world.rows[row, PGOFF] + page - world.rows[row, START]
    if base < 0 or index >= world.rows[row, FILE_PAGES]:
        return NO_FRAME
    return int(world.frames[base + index])


def find_outcome(world: World, row: int, page: int, write: bool, pte: int, frame: int) -> int:
    """Describe a miss in ``world.wanted``; return the outcome to repeat, or -1.

    ``frame`` is the pfn of the file's page, ABSENT or NO_FRAME. An outcome that would take a frame
    where none is left, or free the page, is not repeated.
    """
    wanted = world.wanted
    state = classify(world, row, page, pte, frame)
    if state < 0 or available(world, ANON) == 0:
        # Some faults take an anonymous frame and give it back; without any they fail.
        wanted[KEY] = -1
        return -1
    wanted[KEY] = (row * STATES + state) * 2 + write
    outcome = world.heads[wanted[KEY]]
    while outcome >= 0:
        known = world.outcomes[outcome]
        if (
            known[BITS] == wanted[SITUATION + BITS]
            and known[PAGE_FLAGS] == wanted[SITUATION + PAGE_FLAGS]
            and known[PAGE_REF] == wanted[SITUATION + PAGE_REF]
            and known[PAGE_MAP] == wanted[SITUATION + PAGE_MAP]
        ):
            counted = wanted[PAGE]
            frees = counted >= 0 and world.refcount[counted] + known[REF_ADDED] < 1
            if frees or (known[FILLS] and available(world, RAM) == 0):
                wanted[KEY] = -1
                return -1
            return int(outcome)
        outcome = known[NEXT]
    return -1


def classify(world: World, row: int, page: int, pte: int, frame: int) -> int:
    """Return the state that a miss finds, -1 where only the slow path may act; fill ``wanted``.

    The counts of an anonymous page are part of the situation, since they decide whether it is
    copied or reused (rule F20) and when it stops being anybody's; those of file pages are not.
    """
    wanted = world.wanted
    base = world.rows[row, FRAMES]
    if base == FOREIGN:
        return -1
    index = world.rows[row, PGOFF] + page - world.rows[row, START]
    pfn = pte >> PTE_PFN_SHIFT
    counted = -1
    if pte == 0:
        state = EMPTY_ANONYMOUS
        if base != ANONYMOUS:
            if frame == NO_FRAME:
                return -1
            pfn = frame
            if pfn < 0:
                state = EMPTY_ABSENT
            elif pfn < len(world.refcount):
                state = EMPTY_RESIDENT
                counted = pfn
            else:
                state = EMPTY_XIP
    elif pte & PTE_PRESENT == 0:
        return -1
    else:
        kind = pte_kind(world, world.rows[row, FLAGS], index, pte)
        if kind == rules.BAD:
            return -1
        state = PRESENT_RAW
        if kind == rules.NORMAL:
            state = PRESENT_NORMAL
            counted = pfn
    wanted[PAGE] = counted
    wanted[SITUATION + BITS] = pte & (1 << PTE_PFN_SHIFT) - 1
    wanted[SITUATION + PAGE_FLAGS] = -1
    wanted[SITUATION + PAGE_REF] = -1
    wanted[SITUATION + PAGE_MAP] = -1
    if counted >= 0:
        flags = world.page_flags[counted]
        if flags & PG_SWAPCACHE:
            return -1
        wanted[SITUATION + PAGE_FLAGS] = flags
        if flags & PG_ANON:
            wanted[SITUATION + PAGE_REF] = world.refcount[counted]
            wanted[SITUATION + PAGE_MAP] = world.mapcount[counted]
    return state


def pte_kind(world: World, vm_flags: int, linear_pfn: int, pte: int) -> int:
    """Return NORMAL, RAW or BAD as Machine.vm_normal_page() decides."""
    pfn = pte >> PTE_PFN_SHIFT
    valid = pfn < len(world.refcount)
    is_zero = pfn == world.zero_pfn
    if world.pte_special:
        return rules.pte_kind_special(pte, vm_flags, valid, is_zero)
    return rules.pte_kind_nospecial(
        pfn, vm_flags, linear_pfn, valid, is_zero, world.mixed_zero_is_raw
    )


def apply(world: World, known: Ints, row: int, page: int, slot: int, frame: int) -> None:
    """Do to PTE, page and frames what the outcome ``known`` says; counters come from ``uses``."""
    pte = world.entries[slot]
    pfn = pte >> PTE_PFN_SHIFT
    counted = world.wanted[PAGE]
    if counted >= 0:
        world.refcount[counted] += known[REF_ADDED]
        world.mapcount[counted] += known[MAP_ADDED]
        world.page_flags[counted] = known[FLAGS_AFTER]
    if known[SOURCE] == FILES_FRAME:
        pfn = frame
    elif known[SOURCE] == ZERO_PAGE:
        pfn = world.zero_pfn
    if known[FILLS]:
        filled = take(world, RAM, world.ram_returned)
        index = world.rows[row, PGOFF] + page - world.rows[row, START]
        world.frames[world.rows[row, FRAMES] + index] = filled
        world.refcount[filled] = known[FILL_REF]
        world.mapcount[filled] = known[FILL_MAP]
        world.page_flags[filled] = known[FILL_FLAGS]
        if known[SOURCE] == FILLED:
            pfn = filled
    if known[COPIES]:
        pfn = take(world, ANON, world.anon_returned)
        world.refcount[pfn] = known[COPY_REF]
        world.mapcount[pfn] = known[COPY_MAP]
        world.page_flags[pfn] = known[COPY_FLAGS]
    world.entries[slot] = pfn << PTE_PFN_SHIFT | known[NEW_BITS]


def available(world: World, which: int) -> int:
    """Return how many numbers of a lent free list are left."""
    free = world.free
    return int(free[which, DEPTH] + free[which, END_NUMBER] - free[which, NEXT_NUMBER])


def take(world: World, which: int, returned: Ints) -> int:
    """Take the number that FreeList.pop() would return next, or -1."""
    free = world.free
    if free[which, DEPTH] > 0:
        free[which, DEPTH] -= 1
        return int(returned[free[which, DEPTH]])
    if free[which, NEXT_NUMBER] == free[which, END_NUMBER]:
        return -1
    free[which, NEXT_NUMBER] += 1
    return int(free[which, NEXT_NUMBER]) - 1
