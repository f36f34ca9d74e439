"""The records of one page fault, put together: one state machine per thread.

The records of one fault on a file page (fact 3 as measured; mm/memory.c do_fault and mm/filemap.c):

    read, page cached        PF  map
    read, page not cached    PF  map  fault  add  [I/O]  map
    private or shared write  PF  fault                       not cached: PF fault add [I/O] fault
    write to a mapped page   PF(protection)                  COW, or a shared page made writable
    past the end of the file PF  signal
    inside MAP_POPULATE etc. the same without PF

``PF`` comes once per fault however often the kernel retries, so it opens a fault, and the thread's
next PF, system call, fork, exec or exit closes it. A ``map`` may map the page or be a probe that
maps only neighbours; a ``fault`` after it tells which. The fault belongs to the mount when one of
its filemap records does (they are filtered by device) or when its address lies in a mapping known
to be of the mount.

The kernel calls a fault major when the page was not cached at first look, which shows as an ``add``
of that page by the same thread, or when it was retried once more after a retry (FAULT_FLAG_TRIED,
mm_account_fault).
"""

from __future__ import annotations

from typing import Final

from xipfs.trace import events
from xipfs.trace.fault_batch import ERROR_EXEC, ERROR_PROTECTION, ERROR_USER, ERROR_WRITE, as_cells
from xipfs.trace.proc import PROT_EXEC, PROT_READ, PROT_WRITE
from xipfs.trace.processes import Processes
from xipfs.trace.syscalls import SystemCalls
from xipfs.trace.threads import Thread, did_nothing
from xipfs.trace.vmas import Vma
from xipfs.trace.windows import Windows, elsewhere, mapped_at, plain_window
from xipfs.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

_SIGBUS: Final = 7
_DISAGREED: Final = "mapping disagreed with the shadow"


class Faults:
    """Takes the fault records of all threads, in time order, and emits whole faults."""

    def __init__(
        self, processes: Processes, calls: SystemCalls, fault_around_pages: int = 16
    ) -> None:
        self.total = self.major = self.minor = 0
        self._processes = processes
        self._calls = calls
        self._emit = processes.output.emit
        self._emit_batch = processes.output.emit_batch
        self._unfollowed = processes.unfollowed
        self._windows = Windows(fault_around_pages)

    # -- records -----------------------------------------------------------------------------------

    def trap(self, thread: Thread, time_ns: int, address: int, error: int, kernel: bool) -> None:
        """page_fault_user or page_fault_kernel: a fault begins."""
        if thread.pf_open and not did_nothing(thread, address, error):
            self.close(thread)
        thread.traced = True
        self._open(thread, time_ns, address, error, kernel, events.TRAP)
        vma = thread.space.vmas.find(address)
        if vma is not None and vma.ino is not None:
            thread.pf_vma = vma
            thread.pf_ino = vma.ino
            thread.pf_index = vma.index_at(address)
            # At once: other threads may fork or unmap before anything closes this fault.
            self._processes.tell(time_ns, thread.space, vma)

    def fault(self, thread: Thread, time_ns: int, ino: int, index: int) -> None:
        """mm_filemap_fault: the kernel looks page ``index`` up, at first or again."""
        self._place_probe(thread, ino, index)
        known = thread.pf_open and thread.pf_ino >= 0
        matches = known and thread.pf_ino == ino and thread.pf_index == index
        if not matches and not self._attribute(thread, time_ns, ino, index, index, index):
            if self._calls.address_unknown(thread):
                thread.buffered.append((time_ns, 0, ino, index, index))
            return
        # The window was a probe that mapped the neighbours; this page's own I/O may take long.
        self._report_arounds(thread)
        if thread.pf_faults and not thread.pf_mapped_last:
            thread.pf_retries += 1
        thread.pf_faults += 1
        thread.pf_mapped_last = False
        thread.pf_last_ns = time_ns

    def map_pages(self, thread: Thread, time_ns: int, ino: int, first: int, last: int) -> None:
        """mm_filemap_map_pages: the kernel tries to map the cached ones of ``first..last``."""
        known = thread.pf_open and thread.pf_ino >= 0
        matches = (
            known
            and thread.pf_ino == ino
            and self._windows.holds(thread.pf_index, first, last)
            and not thread.pf_mapped_last
        )
        if not matches and not self._attribute(thread, time_ns, ino, None, first, last):
            if self._calls.address_unknown(thread):
                thread.buffered.append((time_ns, 1, ino, first, last))
            return
        if thread.pf_faults:
            thread.pf_retries += 1
        thread.pf_mapped_last = True
        thread.pf_last_ns = time_ns
        if first <= last:
            thread.pf_arounds.append((first, last))

    def added(self, thread: Thread, time_ns: int, ino: int, first: int, pages: int) -> None:
        """mm_filemap_add_to_page_cache by ``thread``: its own fault, or its readahead."""
        if not thread.pf_open or thread.pf_ino != ino or not thread.pf_faults:
            return
        if first <= thread.pf_index < first + pages:
            thread.pf_added = True
            thread.pf_last_ns = time_ns
            if thread.pf_reported:
                self._unfollowed["major fault told as minor"] += 1

    def signal(self, thread: Thread, time_ns: int, number: int) -> None:
        """signal_generate: the kernel ends the thread's fault with SIGBUS or SIGSEGV."""
        if thread.pf_open:
            thread.pf_signal = number
            thread.pf_last_ns = time_ns
            if number == _SIGBUS and thread.pf_ino < 0:
                self._place_sigbus(thread, time_ns)

    def _place_sigbus(self, thread: Thread, time_ns: int) -> None:
        """Find the file that a fault is past the end of: the kernel looks nothing up there."""
        vma = thread.space.vmas.find(thread.pf_address)
        if vma is None or vma.ino is None:
            if not self._processes.read_maps(thread.space):
                self._tell_unplaced(thread, vma)
                return
            vma = thread.space.vmas.find(thread.pf_address)
        if vma is not None and vma.ino is not None:
            thread.pf_vma, thread.pf_ino = vma, vma.ino
            thread.pf_index = vma.index_at(thread.pf_address)
            self._processes.tell(time_ns, thread.space, vma)

    def _tell_unplaced(self, thread: Thread, vma: Vma | None) -> None:
        """Tell what is known of a SIGBUS whose file is not: it may be of another filesystem."""
        self._unfollowed["SIGBUS in a mapping that is not known"] += 1
        if vma is None or vma.pgoff is None or not self._processes.uses_mount(thread.space):
            return
        write, fetch = thread.pf_error & ERROR_WRITE, thread.pf_error & ERROR_EXEC
        self._emit(
            thread.pf_time_ns,
            events.Unplaced(
                thread.pf_time_ns,
                thread.space.id,
                thread.pid,
                thread.tid,
                thread.pf_address,
                vma.index_at(thread.pf_address),
                "exec" if fetch else "write" if write else "read",
                "kernel" if thread.pf_kernel else "user",
            ),
        )

    def replay(self, thread: Thread) -> None:
        """Take the records of a populating mmap, whose address is known only now."""
        buffered, thread.buffered = thread.buffered, []
        if self._calls.address_unknown(thread):
            self._unfollowed["pages of an mmap that failed"] += len(buffered)
            return
        for time_ns, is_map, ino, first, last in buffered:
            if is_map:
                self.map_pages(thread, time_ns, ino, first, last)
            else:
                self.fault(thread, time_ns, ino, first)
        self.close(thread)

    def close(self, thread: Thread) -> None:
        """End the thread's open fault, if there is one: nothing more can come of it."""
        if not thread.pf_open:
            return
        thread.pf_open = False
        if thread.pf_ino >= 0:
            self.report(thread)

    def report(self, thread: Thread) -> None:
        """Emit the open fault once, and the fault-around that came since the last report."""
        vma = thread.pf_vma
        assert vma is not None
        if not thread.pf_reported:
            thread.pf_reported = True
            self._learn_prot(thread, vma)
            fault, window = self._finished(thread), plain_window(thread)
            if window is None:
                self._emit(thread.pf_last_ns, fault)
            else:
                self._emit_batch(as_cells(fault, thread.pf_last_ns, *window))
                thread.pf_arounds = []
        self._report_arounds(thread)
        at_ns, space = thread.pf_last_ns, thread.space.id
        if thread.pf_ambiguous:
            self._emit(at_ns, events.Cloud(at_ns, space, events.AMBIGUOUS))
        if thread.pf_crossed_ns == at_ns:
            self._emit(at_ns, events.Cloud(at_ns, space, events.CROSSED))

    def _report_arounds(self, thread: Thread) -> None:
        base = thread.pf_address & PAGE_MASK
        for first, last in thread.pf_arounds:
            address = base + (first - thread.pf_index << PAGE_SHIFT)
            self._processes.around(thread.pf_last_ns, thread, address, first, last)
        thread.pf_arounds = []

    # -- putting a fault together ------------------------------------------------------------------

    def _open(
        self, thread: Thread, time_ns: int, address: int, error: int, kernel: bool, origin: str
    ) -> None:
        thread.pf_open = True
        thread.pf_time_ns = thread.pf_last_ns = time_ns
        thread.pf_address = address
        thread.pf_error = error
        thread.pf_kernel = kernel
        thread.pf_origin = origin
        thread.pf_ino = -1
        thread.pf_vma = None
        thread.pf_faults = thread.pf_retries = thread.pf_signal = 0
        thread.pf_added = thread.pf_mapped_last = thread.pf_reported = False
        thread.pf_copied = thread.pf_ambiguous = False
        thread.pf_arounds.clear()

    def _finished(self, thread: Thread) -> events.Fault:
        error = thread.pf_error
        if thread.pf_signal:
            verdict = events.SIGBUS if thread.pf_signal == _SIGBUS else events.SIGSEGV
        elif thread.pf_added or thread.pf_retries > 1:
            verdict = events.MAJOR
            self.major += 1
        else:
            verdict = events.MINOR
            self.minor += 1
        self.total += 1
        return events.Fault(
            thread.pf_time_ns,
            thread.space.id,
            thread.pid,
            thread.tid,
            thread.pf_address,
            thread.pf_ino,
            thread.pf_index,
            error & ERROR_WRITE != 0,
            error & ERROR_EXEC != 0,
            not thread.pf_kernel,
            error & ERROR_PROTECTION != 0,
            verdict,
            thread.pf_origin,
        )

    def _learn_prot(self, thread: Thread, vma: Vma) -> None:
        """A mapping that exec made has at least the protection its faults needed."""
        if vma.prot_known or thread.pf_signal:
            return
        error = thread.pf_error
        prot = vma.prot | PROT_READ
        prot |= PROT_WRITE if error & ERROR_WRITE else 0
        prot |= PROT_EXEC if error & ERROR_EXEC else 0
        if prot != vma.prot:
            vma.prot = prot
            if vma.told:
                self._emit(
                    thread.pf_time_ns,
                    events.Protect(thread.pf_time_ns, thread.space.id, vma.start, vma.end, prot),
                )

    # -- whose page is it --------------------------------------------------------------------------

    def _attribute(
        self, thread: Thread, time_ns: int, ino: int, index: int | None, first: int, last: int
    ) -> bool:
        """Give a filemap record a fault to belong to; False when it has to wait or cannot.

        ``index`` is the faulting page where the record names it, else it lies in ``first..last``.
        """
        fresh = (
            thread.pf_open
            and not thread.pf_error & ERROR_PROTECTION
            and thread.pf_origin == events.TRAP
            and not thread.pf_faults
            and not thread.pf_mapped_last
        )
        if fresh and thread.pf_ino >= 0:
            # The trap's own first record contradicts what we believed was mapped there.
            self._unfollowed[_DISAGREED] += 1
            assert thread.pf_vma is not None
            gone = thread.pf_vma
            self._calls.remove(time_ns, thread.space, gone.start, gone.end)
            thread.pf_ino = -1
        if fresh and self._at_trap(thread, time_ns, ino, index, first, last):
            return True
        if self._calls.address_unknown(thread):
            return False
        return self._without_trap(thread, time_ns, ino, index, first, last)

    def _at_trap(
        self, thread: Thread, time_ns: int, ino: int, index: int | None, first: int, last: int
    ) -> bool:
        """Resolve the mapping at the open trap's address; False when there is none."""
        address = thread.pf_address
        vma = thread.space.vmas.find(address)
        if vma is None:
            if mapped_at(thread.space, ino, first) is not None:
                return False
            self._processes.read_maps(thread.space)
            vma = thread.space.vmas.find(address)
            if vma is None:
                if mapped_at(thread.space, ino, first) is not None:
                    return False
                vma = self._minimal(thread, ino, index)
                if vma is None:
                    return False
        page = self._windows.page_at(vma, address, index, first, last)
        if page is None and vma.ino is None:
            # Another file's mapping, whose fault is over: the record is of something later.
            return False
        if page is None or vma.ino not in (None, ino):
            self._unfollowed[_DISAGREED] += 1
            self._calls.remove(time_ns, thread.space, vma.start, vma.end)
            minimal = self._minimal(thread, ino, index)
            if minimal is None or index is None:
                return False
            vma, page = minimal, index
        vma.ino = ino
        thread.pf_vma, thread.pf_ino, thread.pf_index = vma, ino, page
        self._learn_prot(thread, vma)
        self._processes.tell(thread.pf_time_ns, thread.space, vma)
        return True

    def _minimal(self, thread: Thread, ino: int, index: int | None) -> Vma | None:
        """Map just the page that the record proves; None when it names no page."""
        if index is None:
            return None
        self._unfollowed["mapping known by one page only"] += 1
        start = thread.pf_address & PAGE_MASK
        vma = Vma(start, start + PAGE_SIZE, ino=ino, pgoff=index, prot_known=False, fresh=False)
        thread.space.vmas.insert(vma)
        return vma

    def _place_probe(self, thread: Thread, ino: int, index: int) -> None:
        """Correct the page of a fault without exception that began with a probe."""
        if (
            thread.pf_open
            and thread.pf_origin != events.TRAP
            and thread.pf_mapped_last
            and not thread.pf_faults
            and thread.pf_vma is not None
            and index - thread.pf_index << PAGE_SHIFT < thread.pf_vma.end - thread.pf_address
            and thread.pf_ino == ino
            and thread.pf_arounds
            and self._windows.holds(index, *thread.pf_arounds[-1])
        ):
            thread.pf_address += index - thread.pf_index << PAGE_SHIFT
            thread.pf_index = index
            thread.populate_next = thread.pf_address + PAGE_SIZE

    def _without_trap(
        self, thread: Thread, time_ns: int, ino: int, index: int | None, first: int, last: int
    ) -> bool:
        """Open a fault that the kernel took without an exception; False when none can be named."""
        self.close(thread)
        populates = self._calls.populates(thread)
        found = self._calls.populated(thread, ino, first, last) if populates else None
        page = first if index is None else index
        if found is None:
            found = mapped_at(thread.space, ino, page)
        if found is None and self._processes.read_maps(thread.space):
            found = mapped_at(thread.space, ino, page)
        if found is None:
            self._unfollowed["fault in a mapping that is not known"] += 1
            return False
        vma, address = found
        vma.ino = ino
        origin = events.POPULATE if populates else events.GUP
        if not thread.traced:
            origin = events.UNTRACED
        write = populates and self._calls.populates_by_writing(thread, vma.prot, vma.shared)
        error = ERROR_USER | (ERROR_WRITE if write else 0)
        # Whose access an untraced fault was is unknown; most are the program's own.
        kernel = origin != events.UNTRACED
        self._open(thread, time_ns, address, error, kernel, origin)
        thread.pf_ambiguous = not populates and elsewhere(thread.space, ino, first, vma)
        thread.pf_vma, thread.pf_ino, thread.pf_index = vma, ino, vma.index_at(address)
        self._learn_prot(thread, vma)
        self._processes.tell(time_ns, thread.space, vma)
        thread.populate_next = address + PAGE_SIZE
        return True
