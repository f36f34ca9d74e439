"""``plain_loop.run`` compiled: made at the first import on a machine, then loaded from disk.

numba's cache notices a change of the file that holds the compiled function, not of those it calls;
so their sources are made part of the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import register_jitable

from xipfs.trace import fault_batch, plain_loop, records
from xipfs.trace.compiled import version_of

for _function in (
    plain_loop.find_thread,
    plain_loop.find_vma,
    plain_loop.close,
    plain_loop.trap,
    plain_loop.fault,
    plain_loop.map_pages,
):
    register_jitable(forceinline=True)(_function)

_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
_run = numba.njit(**_OPTIONS)(plain_loop.run)


def _make(version: int) -> Callable[[plain_loop.Plain], int]:
    def run(plain: plain_loop.Plain) -> int:
        # A value from outside the function is part of the cache's key.
        return _run(plain) if version else -1

    compiled: Callable[[plain_loop.Plain], int] = numba.njit(cache=True, **_OPTIONS)(run)
    return compiled


run = _make(version_of(plain_loop, fault_batch, records))
_NOTHING = np.zeros((0, records.COLUMNS), np.int64)
run(
    plain_loop.Plain(
        _NOTHING,
        np.full(16, -1, np.int64),
        np.zeros((8, plain_loop.THREAD_COLUMNS), np.int64),
        np.zeros((0, plain_loop.VMA_COLUMNS), np.int64),
        np.zeros((0, fault_batch.CELL_COLUMNS), np.int64),
        np.zeros(plain_loop.TALLY, np.int64),
        16,
    )
)
