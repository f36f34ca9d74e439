"""The compiled twins of ``ring.PlainDecoder`` and ``plain_loop``: when they are made, how called.

Importing numba and loading what it compiled takes most of a second, which no mount should wait for.
So ``start_compiling`` does both in a thread of its own, and until that has ended the plain decoder
works, and the grammar alone. Compiling itself takes many seconds: ``cli/compiling.py`` sees to it
that this is done before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.trace.plain_loop import Plain
from xipfs.trace.records import COLUMNS
from xipfs.trace.ring import CHUNK_PAGES, Plan, Rows, sorted_rows

log = logging.getLogger(__name__)

#: A record is at least its header and the common fields: 12 bytes.
_MIN_RECORD_BYTES: Final = 12
#: Each row is compared with the head of each run: with more of them sorting is as fast.
_RUNS_MAX: Final = 16


class CompiledDecoder:
    """``PlainDecoder``'s interface and results, by machine code."""

    def __init__(self, plan: Plan) -> None:
        # The first import in a process, and where numba is not installed the one that fails.
        from xipfs.trace import machine_code

        offsets = plan.sources[:, :, 0] & 3
        sizes = plan.sources[:, :, 1]
        assert not (((sizes == 8) & (offsets != 0)) | ((offsets + sizes > 4) & (sizes < 8))).any()
        self._plan = plan
        self._decode, self._merge = machine_code.decode, machine_code.merge
        records = (plan.page.size - plan.page.data_offset) // _MIN_RECORD_BYTES
        self._out = np.zeros((CHUNK_PAGES * (records + 1), COLUMNS), np.uint64)
        self._call(np.zeros((0, plan.page.size), np.uint8))
        self.merge(np.array([[1] * COLUMNS, [0] * COLUMNS], np.uint64))

    def decode(self, pages: npt.NDArray[np.uint8]) -> Rows:
        """Return the rows of ``pages``, shape (n, bytes of a sub-buffer), in order."""
        return self._out[: self._call(pages)].copy()

    def merge(self, rows: Rows) -> Rows:
        """Return the rows in time order; among equal times their order stays."""
        times = rows[:, 0]
        # A ring's own rows are in order: there are few runs.
        starts = np.flatnonzero(times[1:] < times[:-1]) + 1
        if not len(starts):
            return rows
        if len(starts) >= _RUNS_MAX:
            return sorted_rows(rows)
        merged = np.empty_like(rows)
        heads = np.concatenate([[0], starts])
        self._merge(rows, heads, np.concatenate([starts, [len(rows)]]), merged)
        return merged

    def _call(self, pages: npt.NDArray[np.uint8]) -> int:
        assert len(pages) <= CHUNK_PAGES, len(pages)
        plan = self._plan
        return self._decode(
            pages.view(np.uint32),
            plan.page.commit_offset >> 2,
            plan.page.data_offset >> 2,
            plan.kinds,
            plan.constants,
            plan.sources,
            self._out,
        )


def version_of(*modules: ModuleType) -> int:
    """Return a number that changes with the source of ``modules``."""
    digest = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None, module
        digest.update(Path(module.__file__).read_bytes())
    return int.from_bytes(digest.digest()[:7], "little") | 1


def start_compiling(
    plan: Plan,
    use_decoder: Callable[[CompiledDecoder], None],
    use_run: Callable[[Callable[[Plain], int]], None],
) -> threading.Thread | None:
    """Prepare the compiled decoder and loop in a thread of its own and hand both on.

    Returns None where numba is not installed: plain decoder and grammar then stay.
    """
    if importlib.util.find_spec("numba") is None:
        return None

    def prepare() -> None:
        try:
            use_decoder(CompiledDecoder(plan))
            from xipfs.trace import plain_code

            use_run(plain_code.run)
        except Exception:
            log.exception("records are decoded without compiled code")

    thread = threading.Thread(target=prepare, name="xipfs-trace-compile", daemon=True)
    thread.start()
    return thread
