"""``charge_loop.run`` compiled: made at the first import on a machine, then loaded from disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.extending import register_jitable

from xipfs.accounting import cached_pages, charge_loop, kernel_states
from xipfs.memory import frames
from xipfs.mm import bulk, bulk_loop, flags, pte, rules
from xipfs.trace import fault_batch
from xipfs.trace.compiled import version_of

bulk.make_callable()
for _function in (
    charge_loop.entry_of,
    charge_loop.frame_of,
    charge_loop.cached_entry,
    charge_loop.row_of,
    charge_loop.charge_model,
    charge_loop.charge_fault,
    charge_loop.map_window,
    charge_loop.charge_around,
):
    register_jitable(forceinline=True)(_function)

_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
_run = numba.njit(**_OPTIONS)(charge_loop.run)


def _make(version: int) -> Callable[[charge_loop.Charging], int]:
    def run(charging: charge_loop.Charging) -> int:
        # A value from outside the function is part of the key of numba's cache, which does not
        # notice changes of the functions that are called.
        return _run(charging) if version else -1

    compiled: Callable[[charge_loop.Charging], int] = numba.njit(cache=True, **_OPTIONS)(run)
    return compiled


run = _make(
    version_of(
        charge_loop, cached_pages, kernel_states, fault_batch, bulk_loop, pte, rules, flags, frames
    )
)
