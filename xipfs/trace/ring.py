"""Binary ring sub-buffers to rows of integers.

The layout is that of the kernel's kernel/trace/ring_buffer.c: a sub-buffer is a 64-bit time stamp,
a commit word (bytes of records; bit 31: records before this page were overwritten, bit 30: how many
is stored behind the records) and records. A record's first 32 bits are a type or length (5 bits)
and the nanoseconds since the record before (27 bits). A padding record moves no time
(rb_update_read_stamp).

Two decoders of one meaning: ``PlainDecoder`` here, with struct, and ``compiled.py`` for speed. Each
is the other's test. Text was never an option: ``trace_pipe`` tops out below 0.7 million lines a
second.
"""

from __future__ import annotations

import struct
import sys
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from xipfs.errors import ObserverError
from xipfs.trace.formats import EventFormat, PageFormat
from xipfs.trace.records import ARGS, COLUMNS, LOST, Tracepoint

Rows = npt.NDArray[np.uint64]
"""Shape (n, COLUMNS): see ``records``."""

MISSED_EVENTS: Final = 1 << 31
MISSED_STORED: Final = 1 << 30
COMMIT_MASK: Final = MISSED_STORED - 1
TYPE_PADDING: Final = 29
TYPE_TIME_EXTEND: Final = 30
TYPE_TIME_STAMP: Final = 31
#: An absolute stamp has 59 bits; the upper ones come from the stamp before (rb_fix_abs_ts).
STAMP_BITS: Final = 59
#: Pages decoded in one go: bounds the scratch memory, whatever the backlog.
CHUNK_PAGES: Final = 64
_COMMON_PID_OFFSET: Final = 4

assert sys.byteorder == "little", "rows are read as little-endian words"


class Plan:
    """Which record types are decoded, and from which bytes each argument comes.

    ``kinds[type]`` is the kind or 0; ``sources[type]`` has shape (ARGS, 2): byte offset and size of
    each argument, size 0 where there is none. ``constants[type]`` is argument 0 where size is 0.
    """

    def __init__(self, events: list[tuple[Tracepoint, EventFormat]], page: PageFormat) -> None:
        self.page = page
        types = 1 + max((found.id for _, found in events), default=0)
        self.kinds = np.zeros(types, np.uint64)
        self.constants = np.zeros(types, np.uint64)
        self.sources = np.zeros((types, ARGS, 2), np.int64)
        for point, found in events:
            if found.fields["common_pid"].offset != _COMMON_PID_OFFSET:
                raise ObserverError(f"{point.name}: common_pid is not at {_COMMON_PID_OFFSET}")
            self.kinds[found.id] = point.kind
            slot = 0
            if point.constant is not None:
                self.constants[found.id] = point.constant
                slot = 1
            for name in point.fields:
                field = found.fields[name]
                for start in range(0, field.size, 8):
                    assert slot < ARGS, f"{point.name} has more than {ARGS} arguments"
                    self.sources[found.id, slot] = field.offset + start, min(8, field.size - start)
                    slot += 1


class Decoder(Protocol):
    """Turns whole sub-buffers into rows, and rows of several rings into one order."""

    def decode(self, pages: npt.NDArray[np.uint8]) -> Rows:
        """Return the rows of ``pages``, shape (n, bytes of a sub-buffer), in order."""
        ...

    def merge(self, rows: Rows) -> Rows:
        """Return the rows in time order; among equal times their order stays."""
        ...


def sorted_rows(rows: Rows) -> Rows:
    """Return the rows in time order; among equal times their order stays."""
    return rows.take(np.argsort(rows[:, 0], kind="stable"), axis=0)


class _Unpacker:
    """One record type's arguments by one struct; ``order`` puts them in argument order."""

    CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}

    def __init__(self, kind: int, constant: int, sources: npt.NDArray[np.int64]) -> None:
        self.kind = kind
        self.head = [constant] if sources[0, 1] == 0 else []
        wanted = [(int(o), int(size), slot) for slot, (o, size) in enumerate(sources) if size]
        layout, at = "<", 0
        for offset, size, _ in sorted(wanted):
            layout += f"{offset - at}x{self.CODES[size]}"
            at = offset + size
        self.struct = struct.Struct(layout)
        slots = [slot for _, _, slot in sorted(wanted)]
        self.order = [slots.index(slot) for _, _, slot in wanted]
        self.tail = [0] * (ARGS - len(self.head) - len(wanted))

    def arguments(self, page: memoryview, record: int) -> list[int]:
        """Return the ARGS arguments of the record that starts at byte ``record`` of ``page``."""
        values = self.struct.unpack_from(page, record)
        return [*self.head, *[values[i] for i in self.order], *self.tail]


class PlainDecoder:
    """Needs nothing but Python: what runs until, or instead of, the compiled one."""

    def __init__(self, plan: Plan) -> None:
        self._page = plan.page
        self._unpackers = {
            number: _Unpacker(int(kind), int(plan.constants[number]), plan.sources[number])
            for number, kind in enumerate(plan.kinds)
            if kind
        }

    def decode(self, pages: npt.NDArray[np.uint8]) -> Rows:
        """Return the rows of ``pages``, shape (n, bytes of a sub-buffer), in order."""
        rows: list[list[int]] = []
        for page in pages:
            self._decode_page(np.ascontiguousarray(page).data, rows)
        return np.array(rows, np.uint64).reshape(-1, COLUMNS)

    def merge(self, rows: Rows) -> Rows:
        """Return the rows in time order; among equal times their order stays."""
        return sorted_rows(rows)

    def _decode_page(self, page: memoryview, rows: list[list[int]]) -> None:
        word = struct.Struct("<I").unpack_from
        time_ns, commit = (
            struct.unpack_from("<Q", page, 0)[0],
            word(page, self._page.commit_offset)[0],
        )
        at = self._page.data_offset
        end = at + (commit & COMMIT_MASK)
        if commit & MISSED_EVENTS:
            stored = struct.unpack_from("<Q", page, end)[0] if commit & MISSED_STORED else 1
            rows.append([time_ns, LOST, stored] + [0] * (COLUMNS - 3))
        while at < end:
            head = word(page, at)[0]
            code, delta = head & 31, head >> 5
            if code == TYPE_TIME_EXTEND:
                time_ns += (word(page, at + 4)[0] << 27) + delta
                at += 8
                continue
            if code == TYPE_TIME_STAMP:
                stamp = (word(page, at + 4)[0] << 27) + delta
                time_ns = (time_ns >> STAMP_BITS << STAMP_BITS) | stamp
                at += 8
                continue
            if code == TYPE_PADDING:
                if delta == 0:
                    return
                at += 4 + word(page, at + 4)[0]
                continue
            time_ns += delta
            if code == 0:
                record, at = at + 8, at + 4 + word(page, at + 4)[0]
            else:
                record, at = at + 4, at + 4 + code * 4
            unpacker = self._unpackers.get(word(page, record)[0] & 0xFFFF)
            if unpacker is not None:
                tid = word(page, record + _COMMON_PID_OFFSET)[0]
                rows.append([time_ns, unpacker.kind | tid << 32, *unpacker.arguments(page, record)])
