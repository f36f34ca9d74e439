"""The loop that charges plain faults: what ``Accountant`` does for each, where nothing is new.

Written as ``mm.bulk_loop`` is, and made of it: the model's faults are outcomes that the slow path
showed before. What is added here is the rest of charging: the kernel's own column, the file's
frame, fault-around. ``run`` stops at what it cannot do, having changed nothing of it, and the
accountant does that one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xipfs.accounting.cached_pages import SETTLED
from xipfs.accounting.kernel_states import ANON, FILE, NONE
from xipfs.memory.frames import PG_ANON
from xipfs.mm import bulk_loop as bulk
from xipfs.mm import rules
from xipfs.mm.pte import PTE_PFN_SHIFT, pte_after_access, pte_permits
from xipfs.trace import fault_batch as batch
from xipfs.units import PAGE_SHIFT

Ints = npt.NDArray[np.int64]

# A file page's frame entry: pfn + 1 where it lies, 0 where that is not known, and two bits.
#: Its next fault takes a mark (``Filesystem.has_fill_mark``), which is for the accountant to do.
#: Fault-around may map the page all the same.
MARKED: Final = 1 << 48
#: The page is a hole, and pfn that of what a read maps in its place; fault-around maps nothing.
HOLE: Final = 1 << 49
PFN_MASK: Final = MARKED - 1

# Columns of Charging.live, one row a VMA as in World.rows.
INO: Final = 0
PRIVATE: Final = 1
PAGE_PROT: Final = 2
SHADOW: Final = 3  #: entry of shadow_middles for the first gibibyte of the VMA
FILE_MIDDLES: Final = 4  #: entry of cached_middles and frame_middles for pages from pgoff on
LIVE_COLUMNS: Final = 5

# Columns of Charging.results.
OUTCOME: Final = 0  #: of World.outcomes, or one of the next
BY_HAND: Final = -1  #: charged by the accountant
HIT_XIP: Final = -2  #: the PTE let it pass already, mapping this
HIT_PAGECACHE: Final = -3
HIT_COW: Final = -4
FRAME: Final = 1  #: the file page's pfn, -1: unknown
RESULT_COLUMNS: Final = 2

# Columns of Charging.sums, one row an address space.
CHANGES: Final = 0
AROUND_FILLED: Final = 1  #: PTEs that the model's fault-around filled
AROUND_PRIVATE: Final = 2  #: PTEs that the kernel's filled, in private mappings
AROUND_SHARED: Final = 3  #: and in shared ones
UNSURE: Final = 2  #: at AROUND_PRIVATE + UNSURE etc.: of them, those that it filled only perhaps
FAULTS: Final = 6
MAPPED: Final = 7  #: of them, those that found no page mapped
HITS: Final = 12  #: at HITS + HIT_XIP etc.: of them, those that the model's PTE let pass
SUM_COLUMNS: Final = 11

# Places in Charging.tally.
AT: Final = 0
PART: Final = 1  #: 0: the fault is next, 1: its fault-around is
BLIND: Final = 2  #: fault-around windows over pages that the model cannot map so
UNCACHED: Final = 3  #: the kernel's state of a page in a window that is 0 among cached pages
TALLY: Final = 4

# Why ``run`` returned.
FINISHED: Final = 0
NEEDS_FAULT: Final = 1
NEEDS_AROUND: Final = 2
NEEDS_TABLES: Final = 3
NEEDS_SHADOW: Final = 4  #: a leaf of the kernel's column for the fault at AT

_SLOT_MASK: Final = 511


class Charging(NamedTuple):
    """What the loop reads and writes.

    ``process``: the address space of each fault, a row of ``world.first_row``. ``marked``: 1 where
    the accountant has to take the fault itself, 2 its window, 3 both. ``shadow``: the
    entries of the observer's tables: the kernel's column, which pages are cached (see
    ``cached_pages``), and the frame entries of file pages.
    """

    world: bulk.World
    cells: Ints
    process: Ints
    marked: Ints
    live: Ints
    shadow: Ints
    shadow_middles: Ints
    cached_middles: Ints
    frame_middles: Ints
    results: Ints
    sums: Ints
    tally: Ints


def run(charging: Charging) -> int:
    """Charge faults from tally[AT] on; say why it stopped."""
    tally = charging.tally
    reason = FINISHED
    while tally[AT] < len(charging.cells):
        if tally[PART] == 0:
            reason = charge_fault(charging, tally[AT])
            if reason != FINISHED:
                break
            tally[PART] = 1
        reason = charge_around(charging, tally[AT])
        if reason != FINISHED:
            break
        tally[PART] = 0
        tally[AT] += 1
    return int(reason)


def entry_of(shadow: Ints, middles: Ints, first: int, base: int, number: int) -> int:
    """Return where page ``number`` has its entry; below 512 where it has none.

    ``first``: place in ``middles`` of the gibibyte that page ``base`` lies in.
    """
    middle = middles[first + (number >> 18) - (base >> 18)]
    leaf = shadow[middle + (number >> 9 & _SLOT_MASK)]
    return int(leaf + (number & _SLOT_MASK))


def frame_entry(charging: Charging, row: int, index: int) -> int:
    """Return the frame entry of the file's page ``index``."""
    first, base = charging.live[row, FILE_MIDDLES], charging.world.rows[row, bulk.PGOFF]
    entry = entry_of(charging.shadow, charging.frame_middles, first, base, index)
    return int(charging.shadow[entry])


def frame_of(charging: Charging, row: int, index: int) -> int:
    """Return the pfn of the file's page ``index``, -1 where it is not known."""
    return (frame_entry(charging, row, index) & PFN_MASK) - 1


def cached_entry(charging: Charging, row: int, index: int) -> int:
    """Return where it stands whether the kernel caches page ``index`` of the file."""
    first, base = charging.live[row, FILE_MIDDLES], charging.world.rows[row, bulk.PGOFF]
    return entry_of(charging.shadow, charging.cached_middles, first, base, index)


def row_of(charging: Charging, at: int, page: int) -> int:
    """Return the VMA of the fault's address space that holds virtual page ``page``, or -1."""
    world = charging.world
    process = charging.process[at]
    row = bulk.find_row(world.rows, world.first_row[process], world.first_row[process + 1], page)
    if row < 0 or charging.live[row, INO] != charging.cells[at, batch.INO]:
        return -1
    return row


def charge_fault(charging: Charging, at: int) -> int:
    """Charge the fault of ``cells[at]``: the model's PTE, then the kernel's."""
    world = charging.world
    cell = charging.cells[at]
    page = cell[batch.ADDRESS] >> PAGE_SHIFT
    write = cell[batch.ERROR] & batch.ERROR_WRITE != 0
    world.wanted[bulk.KEY] = -1
    row = row_of(charging, at, page)
    if row < 0 or not rules.vma_permits(world.rows[row, bulk.FLAGS], write):
        return NEEDS_FAULT
    if charging.marked[at] & 1:
        return NEEDS_FAULT
    index = cell[batch.INDEX]
    if index != world.rows[row, bulk.PGOFF] + page - world.rows[row, bulk.START]:
        return NEEDS_FAULT
    entry = frame_entry(charging, row, index)
    frame = (entry & PFN_MASK) - 1
    if frame < 0 or entry & MARKED or charging.shadow[cached_entry(charging, row, index)] > SETTLED:
        return NEEDS_FAULT
    start = world.rows[row, bulk.START]
    shadow = entry_of(
        charging.shadow, charging.shadow_middles, charging.live[row, SHADOW], start, page
    )
    if shadow <= _SLOT_MASK:
        return NEEDS_SHADOW
    reason = charge_model(charging, at, row, page, write, frame)
    if reason != FINISHED:
        return reason
    before = charging.shadow[shadow]
    if charging.live[row, PRIVATE] and write:
        charging.shadow[shadow] = ANON
    elif before != ANON and (not cell[batch.ERROR] & batch.ERROR_PROTECTION or before == NONE):
        charging.shadow[shadow] = FILE
    charging.results[at, FRAME] = frame
    sums = charging.sums[charging.process[at]]
    sums[CHANGES] += 1
    sums[FAULTS] += 1
    if not cell[batch.ERROR] & batch.ERROR_PROTECTION:
        sums[MAPPED] += 1
    return FINISHED


def charge_model(charging: Charging, at: int, row: int, page: int, write: bool, frame: int) -> int:
    """Take the fault by the model: a hit, or an outcome seen before."""
    world = charging.world
    start = world.rows[row, bulk.START]
    middle = world.middles[world.rows[row, bulk.MIDDLE] + (page >> 18) - (start >> 18)]
    leaf = world.entries[middle + (page >> 9 & _SLOT_MASK)]
    slot = leaf + (page & _SLOT_MASK)
    pte = world.entries[slot]
    if pte_permits(pte, write):
        flags = world.rows[row, bulk.FLAGS]
        index = world.rows[row, bulk.PGOFF] + page - start
        kind = bulk.pte_kind(world, flags, index, pte)
        if kind == rules.BAD:
            return NEEDS_FAULT
        world.entries[slot] = pte_after_access(pte, write)
        charging.results[at, OUTCOME] = HIT_XIP
        if kind == rules.NORMAL:
            anonymous = world.page_flags[pte >> PTE_PFN_SHIFT] & PG_ANON
            charging.results[at, OUTCOME] = HIT_COW if anonymous else HIT_PAGECACHE
        charging.sums[charging.process[at], HITS + charging.results[at, OUTCOME]] += 1
        return FINISHED
    outcome = bulk.find_outcome(world, row, page, write, pte, frame)
    if outcome >= 0 and middle == 0:
        # Known, but the loop makes leaves only; there is nothing to learn from it again.
        world.wanted[bulk.KEY] = -1
        return NEEDS_FAULT
    if outcome < 0:
        return NEEDS_FAULT
    if leaf == 0:
        leaf = bulk.take(world, bulk.TABLES, world.tables_returned) * (_SLOT_MASK + 1)
        if leaf < 0:
            return NEEDS_TABLES
        world.entries[middle + (page >> 9 & _SLOT_MASK)] = leaf
        world.leaves_made[charging.process[at]] += 1
        slot = leaf + (page & _SLOT_MASK)
    bulk.apply(world, world.outcomes[outcome], row, page, slot, frame)
    world.uses[outcome] += 1
    charging.results[at, OUTCOME] = outcome
    return FINISHED


def charge_around(charging: Charging, at: int) -> int:
    """Map what came with the fault of ``cells[at]``, in both columns (see ``Accountant.around``).

    Only a window within one VMA and one page table, over pages that are surely uptodate or not
    cached; the kernel makes others where a mapping was cut here but not there.
    """
    cell = charging.cells[at]
    first, last = cell[batch.AROUND_FIRST], cell[batch.AROUND_LAST]
    if first > last:
        return FINISHED
    world = charging.world
    page = (cell[batch.ADDRESS] >> PAGE_SHIFT) + first - cell[batch.INDEX]
    row = row_of(charging, at, page)
    end = page + last - first
    if row < 0 or end >= world.rows[row, bulk.END] or page >> 9 != end >> 9:
        return NEEDS_AROUND
    if charging.marked[at] & 2:
        return NEEDS_AROUND
    start = world.rows[row, bulk.START]
    if first != world.rows[row, bulk.PGOFF] + page - start:
        return NEEDS_AROUND
    shadow = entry_of(
        charging.shadow, charging.shadow_middles, charging.live[row, SHADOW], start, page
    )
    middle = world.middles[world.rows[row, bulk.MIDDLE] + (page >> 18) - (start >> 18)]
    leaf = world.entries[middle + (page >> 9 & _SLOT_MASK)]
    if shadow <= _SLOT_MASK or leaf == 0:
        return NEEDS_AROUND
    for index in range(first, last + 1):
        cached = charging.shadow[cached_entry(charging, row, index)]
        if cached > SETTLED or (cached > 0 and frame_of(charging, row, index) < 0):
            return NEEDS_AROUND
    slot = leaf + (page & _SLOT_MASK)
    map_window(charging, at, row, first, last, shadow, slot)
    return FINISHED


def map_window(
    charging: Charging, at: int, row: int, first: int, last: int, shadow: int, slot: int
) -> None:
    """Map the cached pages first..last, whose entries begin at ``shadow`` and at ``slot``."""
    world = charging.world
    process = charging.process[at]
    kernels = AROUND_PRIVATE if charging.live[row, PRIVATE] else AROUND_SHARED
    blind = False
    for index in range(first, last + 1):
        place = index - first
        cached = charging.shadow[cached_entry(charging, row, index)]
        if cached <= 0:
            perhaps = charging.tally[UNCACHED] if cached == 0 else NONE
            if perhaps != NONE and charging.shadow[shadow + place] == NONE:
                charging.shadow[shadow + place] = perhaps
                charging.sums[process, kernels] += 1
                charging.sums[process, kernels + UNSURE] += 1
            continue
        if charging.shadow[shadow + place] == NONE:
            charging.shadow[shadow + place] = FILE
            charging.sums[process, kernels] += 1
        if world.entries[slot + place] != 0:
            continue
        entry = frame_entry(charging, row, index)
        pfn = (entry & PFN_MASK) - 1
        if entry & HOLE or pfn >= len(world.refcount):
            blind = True
            continue
        # A page-cache page: what page_add_rmap counts, with the reference of its PTE.
        world.refcount[pfn] += 1
        world.mapcount[pfn] += 1
        world.entries[slot + place] = pfn << PTE_PFN_SHIFT | charging.live[row, PAGE_PROT]
        charging.sums[process, AROUND_FILLED] += 1
    charging.sums[process, CHANGES] += 1
    if blind:
        charging.tally[BLIND] += 1
