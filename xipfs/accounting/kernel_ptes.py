"""The first column: what the kernel itself has mapped, page by page, beside what the model has.

The model says what VM_MIXEDMAP would have mapped; this says what the running kernel did map, from
the same events, so that it can be compared with /proc/PID/pagemap and every missed or misread event
shows. Per address space and page it is nothing, a page of the file, a private (anonymous) copy, or
unknown with a reason: what the events do not decide is never guessed. Writable is not kept: the
kernel shows it nowhere, so no claim about it could be checked.

The rules, measured and read (mm/memory.c, mm/filemap.c, 6.18):

- A fault maps its page: a private write as a copy, everything else as a page of the file.
- Fault-around maps those of its pages that are cached, uptodate, unlocked, not marked for
  read-ahead, and not mapped yet (filemap_map_pages); which these are, ``cached_pages`` tells.
- A page that leaves the page cache is mapped nowhere as a file page; copies stay.
- The end of a file that moves down takes copies too (unmap_mapping_range, even_cows).
- fork copies the PTEs of a VMA that has ever had a private copy (vma_needs_copy: anon_vma); of
  others the child has none. It goes by the kernel's own VMAs, merged as they are (``Extent``).

States are kept as the model keeps its PTEs: leaves of 512 entries, where something was mapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.accounting.cached_pages import CachedPages
from xipfs.accounting.kernel_states import (
    AMBIGUOUS,
    ANON,
    BEFORE,
    COPIED,
    COPIES_UNKNOWN,
    CROSSED,
    FILE,
    FOREIGN,
    GUP,
    LOST,
    NONE,
    RECLAIMED,
    THREADS_FORK,
    THREADS_ZAP,
    UNKNOWN,
    UNTRACED,
)
from xipfs.mm.flags import VM_MAYSHARE, VM_WRITE
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import PageTables
from xipfs.mm.table_pool import TablePool
from xipfs.mm.vma import MappedFile, Vma
from xipfs.trace import events as ev
from xipfs.trace.extents import Extents, joined
from xipfs.units import PAGE_MASK, PAGE_SHIFT

#: Above every address.
_END: Final = 1 << 57
_OF_ANY_PAGE: Final = {ev.FOREIGN: FOREIGN, ev.AMBIGUOUS: AMBIGUOUS, ev.CROSSED: CROSSED}
_CLOUDS: Final = {ev.COPIED: COPIED, **_OF_ANY_PAGE}
#: A larger range (16 GiB) is not doubted page by page; its address space as a whole is.
DOUBT_PAGES_MAX: Final = 4 << 20


class KernelPtes:
    """The kernel's PTEs over files of one mount, by the numbers of their address spaces.

    ``changes`` counts, by address space, what has happened to it: two equal counts around a look at
    /proc mean that the look and the column are of one moment. ``readahead``: the kernel may mark
    pages for it. Memory: 8 bytes a page in leaves of 512.
    """

    def __init__(self, *, readahead: bool) -> None:
        self.pool = TablePool()
        self._tables: dict[int, PageTables] = {}
        self._threads: dict[int, set[int]] = {}
        #: The kernel's own VMAs; the mark: it has or had a private copy (its anon_vma).
        self._extents: dict[int, Extents] = {}
        self.cached = CachedPages(self.pool, readahead=readahead)
        self.pids: dict[int, int] = {}
        #: Address spaces of which nothing is claimed any more, and why.
        self.blurred: dict[int, int] = {}
        self.changes: Counter[int] = Counter()
        #: Address spaces in which pages became unknown since they were looked at; in that order.
        self.doubtful: dict[int, None] = {}
        #: Address spaces in which any page may have changed in ways that no event told, and which.
        self.clouds: dict[int, set[int]] = {}

    # Looking

    def state(self, mm: int, address: int) -> int:
        """Return the state of the page at ``address``."""
        tables = self._tables.get(mm)
        return NONE if tables is None else tables.get(address & PAGE_MASK)

    def populated(self, mm: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (address, state) of the pages in [start, end) that are not NONE."""
        tables = self._tables.get(mm)
        if tables is not None:
            yield from tables.populated(start, end)

    def mapped_run(self, mm: int, address: int, end: int) -> int:
        """Return how many pages from ``address`` on are mapped; 0 if all up to ``end`` are."""
        pages = 0
        while address + (pages << PAGE_SHIFT) < end:
            if self.state(mm, address + (pages << PAGE_SHIFT)) not in (FILE, ANON):
                return pages
            pages += 1
        return 0

    def is_cached(self, ino: int, index: int) -> bool:
        """Return whether the kernel's page cache holds the page."""
        return self.cached.get(ino, index) is not None

    # What happens to an address space

    def map(self, event: ev.Map) -> None:
        """A mapping is told; what is in it already is not known if it is older than our watch."""
        self._touch(event.mm)
        self.pids[event.mm] = event.pid
        if not event.fresh:
            self._extents_of(event.mm).store(event.start, event.end, None)
            self.doubt(event.mm, event.start, event.end, BEFORE)

    def zap(self, mm: int, start: int, end: int) -> None:
        """The PTEs of [start, end) went away; with threads about, one may have come back."""
        self._touch(mm)
        threaded = len(self._threads.get(mm, ())) > 1
        state = THREADS_ZAP if threaded else NONE
        if mm in self._tables and self._tables[mm].replace(start, end, state) and threaded:
            self.doubtful[mm] = None

    def unmap(self, mm: int, start: int, end: int) -> None:
        """Nothing of [start, end) is mapped any more."""
        self._touch(mm)
        self._extents_of(mm).cut(start, end)
        if mm in self._tables:
            self._tables[mm].replace(start, end, NONE)

    def extent(self, event: ev.Extent) -> None:
        """The kernel holds the range as one VMA now."""
        self._extents_of(event.mm).store(event.start, event.end)

    def move(self, event: ev.Move) -> None:
        """mremap takes the PTEs along."""
        moved = list(self.populated(event.mm, event.start, event.end))
        extents = self._extents_of(event.mm)
        mark = joined(mark for _, _, mark in extents.meeting(event.start, event.end))
        self.unmap(event.mm, event.start, event.end)
        extents.store(event.new_start, event.new_end, mark)
        if event.keep_old:
            extents.store(event.start, event.end)
        for address, state in moved:
            self._set(event.mm, event.new_start + address - event.start, state)

    def fork(self, event: ev.Fork, parent: MmStruct) -> None:
        """The child has what copy_page_range copies."""
        self._touch(event.child_mm)
        self.pids[event.child_mm] = event.child_pid
        threaded = len(self._threads.get(event.mm, ())) > 1
        if event.mm in self.blurred:
            self.blurred[event.child_mm] = self.blurred[event.mm]
        extents = self._extents[event.child_mm] = self._extents_of(event.mm).copy()
        for vma in parent:
            for start, end, mark in extents.cover(vma.start, vma.end):
                if mark is False:
                    continue
                doubt = COPIES_UNKNOWN if mark is None else THREADS_FORK if threaded else 0
                for address, state in self.populated(event.mm, start, end):
                    self._set(event.child_mm, address, doubt or state)
        for start, end in event.dontfork:
            self.unmap(event.child_mm, start, end)

    def thread_exit(self, event: ev.ThreadExit) -> None:
        """One thread less faults beside the others."""
        self._threads.get(event.mm, set()).discard(event.tid)

    def exit(self, mm: int) -> None:
        """The address space is gone."""
        tables = self._tables.pop(mm, None)
        if tables is not None:
            tables.replace(0, _END, NONE)
            tables.free(0, _END)
        self._extents.pop(mm, None)
        self._threads.pop(mm, None)
        self.pids.pop(mm, None)
        self.blurred.pop(mm, None)
        self.changes.pop(mm, None)
        self.doubtful.pop(mm, None)
        self.clouds.pop(mm, None)

    def fault(self, event: ev.Fault, vma: Vma | None) -> None:
        """One fault is over."""
        self._touch(event.mm)
        self.pids.setdefault(event.mm, event.pid)
        self._threads.setdefault(event.mm, set()).add(event.tid)
        if vma is None or event.verdict == ev.SIGSEGV:
            return
        if event.verdict == ev.SIGBUS:
            self._set(event.mm, event.address, NONE)
            return
        if self.is_cached(event.ino, event.index):
            self.cached.settle(event.ino, event.index)
        self._set(event.mm, event.address, self._after_fault(event, vma))

    def faulted(
        self,
        mm: int,
        pid: int,
        tids: Iterable[int],
        copied: Iterable[int],
        changes: int,
        *,
        unsure: bool,
    ) -> None:
        """Note what compiled code did: ``copied`` are the addresses of new private copies."""
        self.changes[mm] += changes
        if unsure:
            self.doubtful[mm] = None
        self.pids.setdefault(mm, pid)
        self._threads.setdefault(mm, set()).update(tids)
        extents = self._extents_of(mm)
        for address in copied:
            extents.mark(address)

    def tables_of(self, mm: int) -> PageTables:
        """Return the column of one address space."""
        tables = self._tables.get(mm)
        if tables is None:
            tables = self._tables[mm] = PageTables(self.pool)
        return tables

    def _after_fault(self, event: ev.Fault, vma: Vma) -> int:
        private = not vma.flags & VM_MAYSHARE
        before = self.state(event.mm, event.address)
        if private and event.origin == ev.UNTRACED:
            return UNTRACED
        if private and event.origin == ev.GUP and vma.flags & VM_WRITE:
            return GUP
        if private and event.write:
            return ANON
        # A protection fault that is no private write leaves what was mapped; so does a read that
        # lost against another thread's write, or that swapped a copy in.
        return before if before == ANON or (event.protection and before != NONE) else FILE

    def around(self, event: ev.Around, vma: Vma) -> dict[int, int]:
        """Fault-around tried the pages first..last of the file; return those that it mapped.

        Those that it may have mapped are among them; the state of each page tells.
        """
        self._touch(event.mm)
        first = max(event.first, vma.pgoff)
        last = min(event.last, vma.pgoff + vma.pages - 1)
        mapped = {}
        for index in range(first, last + 1):
            address = vma.address_of(index)
            if self.state(event.mm, address) != NONE:
                continue
            state = self.cached.in_window(event.ino, index, event.time_ns)
            if state == NONE:
                continue
            if state == FILE:
                self.cached.settle(event.ino, index)
            self._set(event.mm, address, state)
            mapped[index] = state
        return mapped

    def doubt(self, mm: int, start: int, end: int, reason: int) -> None:
        """Something happened in [start, end) that no event tells page by page."""
        self._touch(mm)
        if end - start >> PAGE_SHIFT > DOUBT_PAGES_MAX:
            self.blurred[mm] = reason
        elif end > start:
            self.doubtful[mm] = None
            self.tables_of(mm).fill(start, end, reason)

    def cloud(self, event: ev.Cloud) -> None:
        """The states that ``shade`` says are not sure, until all of it is looked at."""
        self._cloud(event.mm, _CLOUDS[event.why])

    def _cloud(self, mm: int, reason: int) -> None:
        self._touch(mm)
        self.clouds.setdefault(mm, set()).add(reason)
        self.doubtful[mm] = None

    def shade(self, vma: Vma, states: npt.NDArray[np.int64]) -> None:
        """Put the reason in place of each state that is not sure; ``states``: one a page of vma."""
        number = vma.mm.name
        assert isinstance(number, int)
        for reason in self.clouds.get(number, ()):
            if reason in _OF_ANY_PAGE.values():
                states[states < UNKNOWN] = reason
            elif reason == RECLAIMED or not vma.flags & VM_MAYSHARE:
                states[states == FILE] = reason
        if number in self.blurred:
            states[:] = self.blurred[number]

    def reclaim(self, _event: ev.Reclaim) -> None:
        """The kernel may have unmapped any file page, and kept it cached."""
        for mm in self.pids:
            self._cloud(mm, RECLAIMED)

    def lost(self, mms: Iterable[MmStruct]) -> None:
        """Records were overwritten unread: nothing that was believed is sure any more."""
        self.cached.lost()
        for mm in mms:
            assert isinstance(mm.name, int)
            for vma in mm:
                self.doubt(mm.name, vma.start, vma.end, LOST)

    def learn(self, mm: int, address: int, state: int) -> None:
        """Take over what /proc says of a page that was unknown, or believed wrongly."""
        assert state in (NONE, FILE, ANON), state
        self._set(mm, address, state)

    # What happens to a file

    def cache_add(self, event: ev.CacheAdd) -> None:
        """The page cache took pages in."""
        for index in range(event.first, event.first + event.pages):
            self.cached.add(event.ino, index, event.time_ns)

    def cache_delete(self, event: ev.CacheDelete, file: MappedFile | None) -> None:
        """The page cache dropped pages: no PTE maps them any more."""
        for index in range(event.first, event.first + event.pages):
            self.cached.remove(event.ino, index)
        if file is not None:
            self._drop(file, event.first, event.first + event.pages, even_cows=False)

    def cut(self, file: MappedFile, first: int) -> None:
        """The file ends before page ``first`` from now on."""
        self._drop(file, first, 1 << 52, even_cows=True)

    def _drop(self, file: MappedFile, first: int, stop: int, *, even_cows: bool) -> None:
        for vma in file.i_mmap.overlapping(first, stop):
            number = vma.mm.name
            assert isinstance(number, int)
            start = vma.address_of(max(first, vma.pgoff))
            end = vma.address_of(min(stop, vma.pgoff + vma.pages))
            shared = bool(vma.flags & VM_MAYSHARE)
            self._touch(number)
            for address, state in self.populated(number, start, end):
                if state == FILE or even_cows or (shared and state != ANON):
                    self._set(number, address, NONE)

    def _touch(self, mm: int) -> None:
        self.changes[mm] += 1

    def _set(self, mm: int, address: int, state: int) -> None:
        if state == NONE and mm not in self._tables:
            return
        self.tables_of(mm).set(address & PAGE_MASK, state)
        if state > ANON:
            self.doubtful[mm] = None
        elif state == ANON:
            self._extents_of(mm).mark(address)

    def _extents_of(self, mm: int) -> Extents:
        return self._extents.setdefault(mm, Extents())
