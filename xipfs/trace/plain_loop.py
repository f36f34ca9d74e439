"""The records of plain faults, put together as ``faults`` does it: flat loops for numba.

A fault is *plain* when nothing new is learnt from it: its thread and mapping are known and told,
and its records are those of an exception with at most one fault-around. ``run`` goes through
records in time order and stops, having changed nothing, at the first that belongs to anything
else; ``Faults`` then takes that one. So every rule that is not about plain faults is only there.

Runs without numba too, which is how its tests compare the two.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from xipfs.trace import fault_batch as batch
from xipfs.trace.records import FAULT, PF_KERNEL
from xipfs.units import PAGE_MASK, PAGE_SHIFT

Ints = npt.NDArray[np.int64]

# Columns of Plain.threads: the fields pf_* of a Thread, and where its mappings are.
TID: Final = 0
PID: Final = 1
MM: Final = 2
FIRST_ROW: Final = 3  #: its mappings are rows [FIRST_ROW, END_ROW) of Plain.vmas
END_ROW: Final = 4
OPEN: Final = 5
TIME: Final = 6
LAST: Final = 7
ADDRESS: Final = 8
ERROR: Final = 9
KERNEL: Final = 10
INO: Final = 11  #: -1: none
INDEX: Final = 12
FAULTS: Final = 13
RETRIES: Final = 14
ADDED: Final = 15
MAPPED_LAST: Final = 16
AROUND_FIRST: Final = 17  #: above AROUND_LAST: no fault-around
AROUND_LAST: Final = 18
VMA: Final = 19  #: row of the mapping that the open fault is in; -1: none, -2: as it was
TRAPPED: Final = 20  #: a trap was taken in since the thread was handed over
THREAD_COLUMNS: Final = 21

# Columns of Plain.vmas, sorted by address within one address space.
START: Final = 0
END: Final = 1
VMA_INO: Final = 2  #: -1: unknown
PGOFF: Final = 3
TOLD: Final = 4
PROT: Final = 5  #: what faults have needed so far; 7 where it is known
VMA_COLUMNS: Final = 6

# Places in Plain.tally.
AT: Final = 0  #: the next record
CELLS: Final = 1  #: faults put out
MAJOR: Final = 2  #: of them, major
TALLY: Final = 3

# Why ``run`` returned.
FINISHED: Final = 0
NEEDS_THREAD: Final = 1
NOT_PLAIN: Final = 2


class Plain(NamedTuple):
    """All that the loop reads and writes.

    ``rows``: records (see ``records``) as int64, of kinds up to MAP_PAGES only. ``places``: a hash
    table of rows of ``threads`` by thread id, -1 where empty, its length a power of two.
    ``cells``: the faults put out (see ``fault_batch``).
    """

    rows: Ints
    places: Ints
    threads: Ints
    vmas: Ints
    cells: Ints
    tally: Ints
    around_pages: int


def run(plain: Plain) -> int:
    """Take records from tally[AT] on while they are of plain faults; say why it stopped."""
    rows = plain.rows
    at = plain.tally[AT]
    reason = FINISHED
    while at < len(rows):
        kind = rows[at, 1] & 0xFFFFFFFF
        place = find_thread(plain, rows[at, 1] >> 32)
        if place < 0:
            reason = NEEDS_THREAD
            break
        thread = plain.threads[place]
        if kind <= PF_KERNEL:
            plain_record = trap(plain, thread, rows[at], kind == PF_KERNEL)
        elif kind == FAULT:
            plain_record = fault(thread, rows[at])
        else:
            plain_record = map_pages(plain, thread, rows[at])
        if not plain_record:
            reason = NOT_PLAIN
            break
        at += 1
    plain.tally[AT] = at
    return reason


def find_thread(plain: Plain, tid: int) -> int:
    """Return the row of thread ``tid``, or -1."""
    mask = len(plain.places) - 1
    slot = tid & mask
    while plain.places[slot] >= 0:
        if plain.threads[plain.places[slot], TID] == tid:
            return int(plain.places[slot])
        slot = slot + 1 & mask
    return -1


def find_vma(plain: Plain, thread: Ints, address: int) -> int:
    """Return the row of the thread's mapping that holds ``address``, or -1."""
    low, end = thread[FIRST_ROW], thread[END_ROW]
    while low < end:
        middle = low + end >> 1
        if plain.vmas[middle, START] <= address:
            low = middle + 1
        else:
            end = middle
    low -= 1
    if low >= thread[FIRST_ROW] and address < plain.vmas[low, END]:
        return int(low)
    return -1


def trap(plain: Plain, thread: Ints, row: Ints, kernel: bool) -> bool:
    """Close the open fault and begin another; False, nothing changed, where that is not plain."""
    address, error = row[2], row[3]
    if address < 0:
        return False
    vma = find_vma(plain, thread, address)
    known = vma >= 0 and plain.vmas[vma, VMA_INO] >= 0
    if known:
        needed = 1
        if error & batch.ERROR_WRITE:
            needed |= 2
        if error & batch.ERROR_EXEC:
            needed |= 4
        if not plain.vmas[vma, TOLD] or needed & ~plain.vmas[vma, PROT]:
            return False
    # The same page again, of which nothing was mapped (see threads.did_nothing).
    nothing = thread[FAULTS] == 0 and thread[MAPPED_LAST] == 0
    nothing &= (error | thread[ERROR]) & batch.ERROR_PROTECTION == 0
    nothing &= address >> PAGE_SHIFT == thread[ADDRESS] >> PAGE_SHIFT
    if thread[OPEN] and thread[INO] >= 0 and not nothing and not close(plain, thread):
        return False
    thread[OPEN] = 1
    thread[TIME] = thread[LAST] = row[0]
    thread[ADDRESS] = address
    thread[ERROR] = error
    thread[KERNEL] = kernel
    thread[FAULTS] = thread[RETRIES] = thread[ADDED] = thread[MAPPED_LAST] = 0
    thread[AROUND_FIRST] = 1
    thread[AROUND_LAST] = 0
    thread[TRAPPED] = 1
    if known:
        thread[VMA] = vma
        thread[INO] = plain.vmas[vma, VMA_INO]
        thread[INDEX] = plain.vmas[vma, PGOFF] + (address - plain.vmas[vma, START] >> PAGE_SHIFT)
    else:
        thread[VMA] = thread[INO] = -1
    return True


def fault(thread: Ints, row: Ints) -> bool:
    """Take a mm_filemap_fault of the open fault's own page."""
    if not thread[OPEN] or thread[INO] != row[3] or thread[INDEX] != row[4] or thread[INO] < 0:
        return False
    if thread[AROUND_FIRST] <= thread[AROUND_LAST]:
        return False  # its window was a probe
    if thread[FAULTS] and not thread[MAPPED_LAST]:
        thread[RETRIES] += 1
    thread[FAULTS] += 1
    thread[MAPPED_LAST] = 0
    thread[LAST] = row[0]
    return True


def map_pages(plain: Plain, thread: Ints, row: Ints) -> bool:
    """Take the first fault-around of the open fault."""
    first, last = row[4], row[5]
    if first < 0 or last < 0 or not thread[OPEN] or thread[INO] < 0 or thread[INO] != row[3]:
        return False
    in_window = first <= thread[INDEX] < max(last + 1, first + plain.around_pages)
    if not in_window or thread[MAPPED_LAST]:
        return False
    if first <= last:
        if thread[AROUND_FIRST] <= thread[AROUND_LAST]:
            return False
        thread[AROUND_FIRST] = first
        thread[AROUND_LAST] = last
    if thread[FAULTS]:
        thread[RETRIES] += 1
    thread[MAPPED_LAST] = 1
    thread[LAST] = row[0]
    return True


def close(plain: Plain, thread: Ints) -> bool:
    """Put the open fault out; False where its window does not lie in one mapping that was told."""
    first, last = thread[AROUND_FIRST], thread[AROUND_LAST]
    if first <= last:
        start = (thread[ADDRESS] & PAGE_MASK) + (first - thread[INDEX] << PAGE_SHIFT)
        vma = find_vma(plain, thread, start)
        if vma < 0 or start + (last - first + 1 << PAGE_SHIFT) > plain.vmas[vma, END]:
            return False
        if not plain.vmas[vma, TOLD] or plain.vmas[vma, VMA_INO] < 0:
            return False
    major = thread[ADDED] or thread[RETRIES] > 1
    cell = plain.cells[plain.tally[CELLS]]
    cell[batch.TIME] = thread[TIME]
    cell[batch.EFFECT] = thread[LAST]
    cell[batch.MM] = thread[MM]
    cell[batch.PID] = thread[PID]
    cell[batch.TID] = thread[TID]
    cell[batch.ADDRESS] = thread[ADDRESS]
    cell[batch.INO] = thread[INO]
    cell[batch.INDEX] = thread[INDEX]
    cell[batch.ERROR] = thread[ERROR] | (batch.FROM_KERNEL if thread[KERNEL] else 0)
    cell[batch.VERDICT] = 1 if major else 0
    cell[batch.AROUND_FIRST] = first
    cell[batch.AROUND_LAST] = last
    plain.tally[CELLS] += 1
    if major:
        plain.tally[MAJOR] += 1
    return True
