"""Private copies that no page fault explains.

get_user_pages (O_DIRECT, vmsplice) makes the same copies as a write to memory, without an exception
and, where the page was mapped, without any record but the growth of the anonymous Rss. A write's
own fault makes such a record too, one; those are dropped here before anything else is done with the
records, since a program that copies pages makes as many of them as faults.
"""

from __future__ import annotations

import numpy as np

from xipfs.trace import records
from xipfs.trace.ring import Rows

_WRITE = np.uint64(2)
_KIND = np.uint64(0xFFFFFFFF)
_TID_SHIFT = np.uint64(32)


def without_explained(rows: Rows) -> Rows:
    """Return ``rows`` (see ``records``) less the growths of Rss that a fault among them explains.

    One is explained by a write fault of its thread before it, if nothing but records of that fault
    lies between. One whose fault came with an earlier batch stays, for ``Grammar`` to judge.
    """
    kinds = rows[:, 1] & _KIND
    if not np.any(kinds == records.RSS_ANON):
        return rows
    tids = rows[:, 1] >> _TID_SHIFT
    order = np.argsort(tids, kind="stable")
    kind, tid = kinds[order], tids[order]
    places = np.arange(len(rows))
    is_fault = kind <= records.PF_KERNEL
    of_a_fault = (kind <= records.MAP_PAGES) | (kind == records.CACHE_ADD)
    fault = np.maximum.accumulate(np.where(is_fault, places, -1))
    # The last record before each that ends a fault, or that one fault may make only once.
    barrier = np.maximum.accumulate(np.where(of_a_fault, -1, places))
    barrier = np.concatenate([[-1], barrier[:-1]])
    explained = (kind == records.RSS_ANON) & (fault > barrier)
    explained &= tid[fault] == tid
    explained &= rows[order[fault], 3] & _WRITE != 0
    kept = np.ones(len(rows), np.bool_)
    kept[order[explained]] = False
    return rows[kept]
