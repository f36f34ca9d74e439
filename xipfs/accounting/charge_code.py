"""``charge_loop.run`` compiled: made at the first import on a machine, then loaded from disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import register_jitable

from xipfs.accounting import cached_pages, charge_loop, kernel_states
from xipfs.memory import frames
from xipfs.mm import bulk, bulk_loop, bulk_zap, flags, pte, rules
from xipfs.mm.bulk_learn import Outcomes
from xipfs.mm.machine import Machine
from xipfs.trace import fault_batch
from xipfs.trace.compiled import version_of

bulk.make_callable()
for _function in (
    charge_loop.entry_of,
    charge_loop.frame_entry,
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
_zap = numba.njit(**_OPTIONS)(bulk_zap.run)


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


def _make_zap(version: int) -> bulk_zap.Run:
    def zap(
        stretches: Any,
        entries: Any,
        refcount: Any,
        mapcount: Any,
        page_flags: Any,
        vm_flags: int,
        zero_pfn: int,
    ) -> tuple[int, int, int]:
        if not version:
            return 0, 0, 1
        raw, files, left = _zap(
            stretches, entries, refcount, mapcount, page_flags, vm_flags, zero_pfn
        )
        return raw, files, left

    compiled: bulk_zap.Run = numba.njit(cache=True, **_OPTIONS)(zap)
    return compiled


zap = _make_zap(version_of(bulk_zap, pte, rules, flags, frames))


def _warm() -> None:
    """Call both as ``bulk_charging`` does, for nothing: what is called later is there then."""
    machine = Machine(frames.PhysicalMemory(ram_pages=1, nvram_pages=1))
    tables, memory = machine.table_pool.array, machine.memory
    ints, table = np.zeros(0, np.int64), np.zeros((0, 1), np.int64)

    def charge(world: bulk_loop.World) -> int:
        charged = (table, ints, ints, table, tables, ints, ints, ints, table, table)
        return run(charge_loop.Charging(world, *charged, np.zeros(charge_loop.TALLY, np.int64)))

    bulk.lend(
        machine,
        Outcomes(1),
        charge,
        trace=(np.zeros(0, np.int32), ints, np.zeros(0, np.bool_)),
        first_row=ints,
        rows=table,
        middles=ints,
        frames=ints,
        leaves_made=ints,
        wanted=ints,
        tally=ints,
    )
    counts = (memory.refcount, memory.mapcount, memory.page_flags)
    zap(table, tables, *counts, 0, machine.zero_pfn)


_warm()
