"""The compiled decoder's loops: scalars and flat arrays, the way numba wants it.

numba is an extra, and importing it takes most of a second, so only ``compiled`` imports this
module, late and in a thread of its own. What the bytes mean is said in ``ring``, whose
``PlainDecoder`` must give the same rows. The functions are compiled at their first call and cached
beside this file (or where numba can write). Nothing here checks bounds: ``compiled`` sized ``out``,
and a sub-buffer's lengths are the kernel's own.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np
import numpy.typing as npt

from xipfs.trace.records import LOST
from xipfs.trace.ring import (
    COMMIT_MASK,
    MISSED_EVENTS,
    MISSED_STORED,
    STAMP_BITS,
    TYPE_PADDING,
    TYPE_TIME_EXTEND,
    TYPE_TIME_STAMP,
)

Words = npt.NDArray[np.uint32]
Columns = npt.NDArray[np.uint64]

_LOST: Final = np.uint64(LOST)
_STAMP_BITS: Final = np.uint64(STAMP_BITS)


@numba.njit(cache=True, nogil=True)
def _put_lost(page: Words, end: np.int64, commit: np.int64, row: Columns) -> None:
    """Fill ``row`` with the records that were overwritten before this page."""
    row[:] = 0
    row[0] = np.uint64(page[0]) | np.uint64(page[1]) << np.uint64(32)
    row[1] = _LOST
    row[2] = 1
    if commit & MISSED_STORED:
        row[2] = np.uint64(page[end]) | np.uint64(page[end + 1]) << np.uint64(32)


@numba.njit(cache=True, nogil=True)
def _put_arguments(
    page: Words, record: np.int64, sources: npt.NDArray[np.int64], constant: np.uint64, row: Columns
) -> None:
    """Fill the arguments of ``row`` from the record that starts at word ``record``."""
    for slot in range(sources.shape[0]):
        size = sources[slot, 1]
        if size == 0:
            row[2 + slot] = constant if slot == 0 else np.uint64(0)
            continue
        offset = sources[slot, 0]
        word = record + (offset >> 2)
        value = np.uint64(page[word]) >> np.uint64(8 * (offset & 3))
        if size == 8:
            value |= np.uint64(page[word + 1]) << np.uint64(32)
        elif size < 4:
            value &= np.uint64((1 << (8 * size)) - 1)
        row[2 + slot] = value


@numba.njit(cache=True, nogil=True)
def decode(
    words: Words,
    commit_word: int,
    data_word: int,
    kinds: Columns,
    constants: Columns,
    sources: npt.NDArray[np.int64],
    out: Columns,
) -> int:
    """Decode sub-buffers, 32-bit ``words`` of shape (pages, words); return the rows in ``out``."""
    rows = 0
    for page in words:
        time_ns = np.uint64(page[0]) | np.uint64(page[1]) << np.uint64(32)
        commit = np.int64(page[commit_word])
        at = np.int64(data_word)
        end = at + ((commit & COMMIT_MASK) >> 2)
        if commit & MISSED_EVENTS:
            _put_lost(page, end, commit, out[rows])
            rows += 1
        while at < end:
            head = page[at]
            code = np.int64(head & np.uint32(31))
            delta = np.uint64(head >> np.uint32(5))
            # The second word: what the codes need that do not fit all into the first.
            length = np.int64(page[at + 1]) if at + 1 < end else np.int64(0)
            if code == TYPE_TIME_EXTEND:
                time_ns += (np.uint64(length) << np.uint64(27)) + delta
                at += 2
            elif code == TYPE_TIME_STAMP:
                stamp = (np.uint64(length) << np.uint64(27)) + delta
                time_ns = (time_ns >> _STAMP_BITS) << _STAMP_BITS | stamp
                at += 2
            elif code == TYPE_PADDING:
                if delta == np.uint64(0):
                    break
                at += 1 + (length >> 2)
            else:
                time_ns += delta
                record = at + (2 if code == 0 else 1)
                at += 1 + (length >> 2 if code == 0 else code)
                number = np.int64(page[record] & np.uint32(0xFFFF))
                if number < len(kinds) and kinds[number] != 0:
                    row = out[rows]
                    row[0] = time_ns
                    row[1] = kinds[number] | np.uint64(page[record + 1]) << np.uint64(32)
                    _put_arguments(page, record, sources[number], constants[number], row)
                    rows += 1
    return rows


@numba.njit(cache=True, nogil=True)
def merge(
    rows: Columns, heads: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], out: Columns
) -> None:
    """Fill ``out`` with the sorted runs [heads, ends) of ``rows`` in time order; moves ``heads``.

    Of equal times the earlier run's come first.
    """
    for place in range(len(out)):
        best = -1
        earliest = np.uint64(0)
        for run in range(len(heads)):
            if heads[run] < ends[run]:
                time_ns = rows[heads[run], 0]
                if best < 0 or time_ns < earliest:
                    best = run
                    earliest = time_ns
        for column in range(out.shape[1]):
            out[place, column] = rows[heads[best], column]
        heads[best] += 1
