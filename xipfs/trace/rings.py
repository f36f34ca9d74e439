"""The rings of one observer, one for each instance and CPU: emptied, bounded, read in time order.

``pump`` moves sub-buffers out of the kernel's rings, undecoded, so that a consumer that is busy
with what it has does not let a ring run over; ``read`` decodes them and what came since. The two
may run in different threads.

Three bounds hold whatever happens. Undecoded records take ``pumped_bytes_max`` of memory; beyond
that the kernel overwrites the oldest, and counts them. One ``read`` decodes some ``rows_max`` rows
of a ring, and no ring is read far ahead of the others. The kernel's own rings are doubled when one
was half full at a pump, up to ``BUFFER_KIB_MAX`` a CPU: how fast records come is not known before
they do, and a pump may come late on a busy machine.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import ObserverError
from xipfs.trace.ring import CHUNK_PAGES, Decoder, Rows

#: Undecoded records kept in memory: some seven million.
PUMPED_BYTES_MAX: Final = 256 << 20
#: Rows of one ring in one read: 32 MiB.
ROWS_MAX: Final = 1 << 19
BUFFER_KIB_MAX: Final = 65536

Pages = npt.NDArray[np.uint8]


class _Ring:
    """One CPU's raw file, and what was taken from it and not decoded yet."""

    def __init__(self, path: Path) -> None:
        self.instance = path.parents[2]
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.pumped: deque[Pages] = deque()
        #: The last row that was decoded.
        self.seen_ns = 0


class Rings:
    """Every ring of some instances."""

    def __init__(
        self,
        instances: Sequence[Path],
        page_bytes: int,
        *,
        pumped_bytes_max: int = PUMPED_BYTES_MAX,
        rows_max: int = ROWS_MAX,
    ) -> None:
        self._page_bytes = page_bytes
        self._pumped_pages_max = pumped_bytes_max // page_bytes
        self._rows_max = rows_max
        self._lock = threading.Lock()
        self._buffer = np.zeros((CHUNK_PAGES, page_bytes), np.uint8)
        #: When the records of each sub-buffer in it begin.
        self._stamps = self._buffer.view(np.uint64)[:, 0]
        self._pumped_pages = 0
        self._rings: list[_Ring] = []
        self._unread = select.poll()
        #: KiB a CPU, by instance.
        self.buffer_kib: dict[Path, int] = {}
        try:
            for instance in instances:
                self.buffer_kib[instance] = int((instance / "buffer_size_kb").read_text())
                for cpu in sorted((instance / "per_cpu").iterdir()):
                    ring = _Ring(cpu / "trace_pipe_raw")
                    self._rings.append(ring)
                    self._unread.register(ring.fd, select.POLLIN)
        except OSError:
            self.close()
            raise

    @property
    def pumped_bytes(self) -> int:
        """Undecoded records in memory now."""
        return self._pumped_pages * self._page_bytes

    @property
    def buffer_bytes(self) -> int:
        """The kernel's rings."""
        return sum(self.buffer_kib[ring.instance] << 10 for ring in self._rings)

    def pump(self) -> None:
        """Take what the rings hold into memory, as far as its bound allows; enlarge the full."""
        fullest = dict.fromkeys(self.buffer_kib, 0)
        until_ns = time.monotonic_ns()
        for ring in self._rings:
            taken, whole = 0, False
            while not whole and self._pumped_pages + CHUNK_PAGES <= self._pumped_pages_max:
                with self._lock:
                    count, whole = self._fill(ring.fd, until_ns)
                    if count:
                        ring.pumped.append(self._buffer[:count].copy())
                        self._pumped_pages += count
                taken += count
            fullest[ring.instance] = max(fullest[ring.instance], taken)
        for instance, pages in fullest.items():
            if 2 * pages * self._page_bytes > self.buffer_kib[instance] << 10:
                self._enlarge(instance)

    def empty(self) -> bool:
        """Return whether there is nothing to read, in any ring.

        One call for all rings, where to read of each costs ten times as much (see
        ``Instance.configure`` for when the kernel calls a ring readable).
        """
        with self._lock:  # or ``pump`` may have what was looked for on its way
            return not any(ring.pumped for ring in self._rings) and not self._unread.poll(0)

    def read(self, decoder: Decoder, until_ns: int) -> tuple[list[Rows], int]:
        """Return rows, those of one ring in time order, and a time not above ``until_ns``.

        All that happened up to that time is among these rows and those of earlier calls. It is
        ``until_ns`` unless there is more to decode than one call does.
        """
        batches: list[Rows] = []
        reached_ns = until_ns
        # What lags most comes first; the others are then read as far as it got, and no further.
        for ring in sorted(self._rings, key=lambda ring: ring.seen_ns):
            if ring.seen_ns <= reached_ns:
                reached_ns = self._read_ring(ring, decoder, reached_ns, batches)
        return batches, reached_ns

    def _read_ring(self, ring: _Ring, decoder: Decoder, until_ns: int, batches: list[Rows]) -> int:
        """Decode one ring up to ``until_ns`` or the bound; return up to when it is decoded."""
        rows, whole = 0, False
        while not whole:
            pages, whole = self._next(ring, until_ns)
            if not len(pages):
                continue
            decoded = decoder.decode(pages)
            if not len(decoded):
                continue
            batches.append(decoded)
            rows += len(decoded)
            ring.seen_ns = int(decoded[-1, 0])
            if ring.seen_ns > until_ns:
                return until_ns
            if rows >= self._rows_max and not whole:
                return ring.seen_ns
        return until_ns

    def _next(self, ring: _Ring, until_ns: int) -> tuple[Pages, bool]:
        """Return a ring's next sub-buffers, oldest first; are these all up to ``until_ns``?"""
        with self._lock:
            if ring.pumped:
                self._pumped_pages -= len(ring.pumped[0])
                return ring.pumped.popleft(), False
            count, whole = self._fill(ring.fd, until_ns)
            return self._buffer[:count].copy(), whole

    def _fill(self, fd: int, until_ns: int) -> tuple[int, bool]:
        """Read pages into the buffer; return how many, and whether no more are wanted.

        That is when the ring is empty or what it gives is of after ``until_ns``: a ring that is
        being written to gives a few records a read for as long as one reads on.
        """
        for number in range(CHUNK_PAGES):
            try:
                got = os.readv(fd, [self._buffer[number]])
            except BlockingIOError:
                return number, True
            if got == 0:
                return number, True
            if got != self._page_bytes:
                raise ObserverError(
                    f"tracefs returned {got} bytes of a sub-buffer",
                    expected=f"{self._page_bytes}",
                )
            if self._stamps[number] > until_ns:
                return number + 1, True
        return CHUNK_PAGES, False

    def _enlarge(self, instance: Path) -> None:
        """Double the rings of an instance; where there is no memory for that they stay."""
        wanted_kib = min(2 * self.buffer_kib[instance], BUFFER_KIB_MAX)
        if wanted_kib > self.buffer_kib[instance]:
            try:
                (instance / "buffer_size_kb").write_text(str(wanted_kib))
            except OSError:
                return
            self.buffer_kib[instance] = wanted_kib

    def close(self) -> None:
        """Close the files; the instances can be removed only then."""
        while self._rings:
            os.close(self._rings.pop().fd)
