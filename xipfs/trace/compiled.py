"""The compiled twin of ``ring.PlainDecoder``.

numba is an extra, and importing it takes most of a second: nothing here is imported before
``start_compiling`` runs in its own thread, and until that has ended the plain decoder works.  The
machine code is cached beside this file (or where numba can write), so only the first run compiles.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xipfs.trace.records import COLUMNS, LOST
from xipfs.trace.ring import (
    CHUNK_PAGES,
    COMMIT_MASK,
    MISSED_EVENTS,
    MISSED_STORED,
    STAMP_BITS,
    TYPE_PADDING,
    TYPE_TIME_EXTEND,
    TYPE_TIME_STAMP,
    Plan,
    Rows,
)

_LOST: Final = np.uint64(LOST)
#: A record is at least its header and the common fields: 12 bytes.
_MIN_RECORD_BYTES: Final = 12


def _decode(
    words: npt.NDArray[np.uint32],
    commit_word: int,
    data_word: int,
    kinds: npt.NDArray[np.uint64],
    constants: npt.NDArray[np.uint64],
    sources: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint64],
) -> int:
    """Decode sub-buffers as 32-bit ``words`` of shape (pages, words) into ``out``; return the rows.

    Written for numba: scalars and flat loops.  See ``ring`` for the format.
    """
    rows = 0
    for page in words:
        time_ns = np.uint64(page[0]) | np.uint64(page[1]) << np.uint64(32)
        commit = np.int64(page[commit_word])
        at = data_word
        end = at + ((commit & COMMIT_MASK) >> 2)
        if commit & MISSED_EVENTS:
            out[rows, :] = 0
            out[rows, 0] = time_ns
            out[rows, 1] = _LOST
            out[rows, 2] = 1
            if commit & MISSED_STORED:
                out[rows, 2] = np.uint64(page[end]) | np.uint64(page[end + 1]) << np.uint64(32)
            rows += 1
        while at < end:
            head = page[at]
            code = np.int64(head & np.uint32(31))
            delta = np.uint64(head >> np.uint32(5))
            if code == TYPE_TIME_EXTEND or code == TYPE_TIME_STAMP:
                stamp = (np.uint64(page[at + 1]) << np.uint64(27)) + delta
                if code == TYPE_TIME_EXTEND:
                    time_ns += stamp
                else:
                    upper = (time_ns >> np.uint64(STAMP_BITS)) << np.uint64(STAMP_BITS)
                    time_ns = upper | stamp
                at += 2
                continue
            if code == TYPE_PADDING:
                if delta == np.uint64(0):
                    break
                at += 1 + (np.int64(page[at + 1]) >> 2)
                continue
            time_ns += delta
            if code == 0:
                record = at + 2
                at += 1 + (np.int64(page[at + 1]) >> 2)
            else:
                record = at + 1
                at += 1 + code
            number = np.int64(page[record] & np.uint32(0xFFFF))
            if number >= len(kinds) or kinds[number] == 0:
                continue
            out[rows, 0] = time_ns
            out[rows, 1] = kinds[number] | np.uint64(page[record + 1]) << np.uint64(32)
            for slot in range(sources.shape[1]):
                size = sources[number, slot, 1]
                if size == 0:
                    out[rows, 2 + slot] = constants[number] if slot == 0 else np.uint64(0)
                    continue
                offset = sources[number, slot, 0]
                word = record + (offset >> 2)
                value = np.uint64(page[word]) >> np.uint64(8 * (offset & 3))
                if size == 8:
                    value |= np.uint64(page[word + 1]) << np.uint64(32)
                elif size < 4:
                    value &= np.uint64((1 << (8 * size)) - 1)
                out[rows, 2 + slot] = value
            rows += 1
    return rows


_compile_lock = threading.Lock()
_compiled: Callable[..., int] | None = None


def _compile() -> Callable[..., int]:
    """Return ``_decode`` compiled, once per process; numba's own cache serves later processes."""
    global _compiled
    with _compile_lock:
        if _compiled is None:
            import numba

            _compiled = numba.njit(cache=True, nogil=True)(_decode)
        return _compiled


class CompiledDecoder:
    """``PlainDecoder``'s interface and results, by machine code."""

    def __init__(self, plan: Plan) -> None:
        offsets = plan.sources[:, :, 0] & 3
        sizes = plan.sources[:, :, 1]
        assert not (((sizes == 8) & (offsets != 0)) | (offsets + sizes > 4) & (sizes < 8)).any()
        self._plan = plan
        self._run = _compile()
        records = (plan.page.size - plan.page.data_offset) // _MIN_RECORD_BYTES
        self._out = np.zeros((CHUNK_PAGES * (records + 1), COLUMNS), np.uint64)
        self._call(np.zeros((0, plan.page.size), np.uint8))

    def decode(self, pages: npt.NDArray[np.uint8]) -> Rows:
        """Return the rows of ``pages``, shape (n, bytes of a sub-buffer), in order."""
        return self._out[: self._call(pages)].copy()

    def _call(self, pages: npt.NDArray[np.uint8]) -> int:
        assert len(pages) <= CHUNK_PAGES, len(pages)
        plan = self._plan
        arguments: tuple[Any, ...] = (
            pages.view(np.uint32),
            plan.page.commit_offset >> 2,
            plan.page.data_offset >> 2,
            plan.kinds,
            plan.constants,
            plan.sources,
            self._out,
        )
        return int(self._run(*arguments))


def start_compiling(
    plan: Plan, ready: Callable[[CompiledDecoder], None]
) -> threading.Thread | None:
    """Prepare the compiled decoder in a thread of its own and hand it to ``ready``.

    Returns None where numba is not installed: the plain decoder then stays.
    """
    if importlib.util.find_spec("numba") is None:
        return None
    thread = threading.Thread(
        target=lambda: ready(CompiledDecoder(plan)), name="xipfs-trace-compile", daemon=True
    )
    thread.start()
    return thread
