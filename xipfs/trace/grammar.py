"""Rows of trace records, in time order, to events: the dispatch by kind and thread.

What a fault is made of is in ``faults``, what a system call changes in ``syscalls``, who a thread
is in ``processes``. Here are the order between them (whatever a thread does next closes its fault)
and the question when a fault is complete though its thread has done nothing since.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from xipfs.trace import events, proc, records
from xipfs.trace.fault_batch import ERROR_WRITE
from xipfs.trace.faults import Faults
from xipfs.trace.pids import Adoption
from xipfs.trace.processes import CLONE_VM, Processes
from xipfs.trace.syscalls import SystemCalls
from xipfs.trace.threads import Space, Thread
from xipfs.trace.vmas import Vma

Row = Sequence[int]
#: What ``Thread.pf_over`` says of a fault that was not found over: it waits, or may be.
_ANSWERS: Final = {False: -1, None: 0}
#: ptrace, process_vm_readv, process_vm_writev and process_madvise, as ``proc.call_of`` begins;
#: of a machine that is not here their end is believed once the thread waits anywhere.
_FOREIGN_CALLS: Final = {
    "x86_64": {"101", "310", "311", "440"},
    "aarch64": {"117", "270", "271", "440"},
}.get(platform.machine(), set[str]())
_OF_FILES: Final = frozenset({records.FAULT, records.MAP_PAGES})


def _text(low: int, high: int) -> str:
    """Return the comm that two arguments hold."""
    raw = low.to_bytes(8, "little") + high.to_bytes(8, "little")
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def _is_untold(thread: Thread) -> bool:
    """Tell whether the thread has a fault of the mount open that was not reported."""
    return thread.pf_open and thread.pf_ino >= 0 and not thread.pf_reported


class Grammar:
    """Feeds rows to the machines; faults and changes go to ``processes.output``."""

    def __init__(
        self,
        processes: Processes,
        adoptions: Callable[[int], Adoption],
        fault_around_pages: int = 16,
        call_of: Callable[[int], str] = proc.call_of,
    ) -> None:
        self._processes = processes
        self._threads = processes.threads
        self._emit = processes.output.emit
        self._unfollowed = processes.unfollowed
        self._calls = SystemCalls(processes)
        self._adoptions = adoptions
        #: Threads inside a call on another process's memory, and whose; 0: anybody's.
        self._foreign: dict[int, int] = {}
        #: Of these, those whose end may be among lost records.
        self._maybe_back: set[int] = set()
        self._call_of = call_of
        #: (time, first page, page after) of what left the page cache since ``settle``, by inode.
        self._deleted: dict[int, list[tuple[int, int, int]]] = {}
        #: The last record of the oldest fault that ``settle`` did not report and that may be over.
        self.unsettled_ns: int | None = None
        self.faults = Faults(processes, self._calls, fault_around_pages)
        self._handlers: dict[int, Callable[[Thread, Row], None]] = {
            records.MA_WRITE: self._ma_write,
            records.NEWTASK: self._newtask,
            records.PREPARE_EXEC: self._prepare_exec,
            records.EXEC: self._exec,
            records.EXIT: self._exit,
            records.RENAME: self._rename,
            records.SIGNAL: self._signal,
            records.RSS_ANON: self._rss_anon,
            records.SYS_ENTER: self._sys_enter,
            records.SYS_EXIT: self._sys_exit,
        }

    def feed(self, rows: Iterable[Row]) -> None:
        """Process rows (see ``records``) in time order."""
        threads, handlers, faults = self._threads, self._handlers, self.faults
        for row in rows:
            kind = row[1] & 0xFFFFFFFF
            if kind > records.MAP_PAGES and kind not in handlers:
                self._unthreaded(kind, row)
                continue
            if self._foreign and kind in _OF_FILES and row[1] >> 32 in self._foreign:
                continue  # on behalf of another process, whose doubt is told
            thread = threads.get(row[1] >> 32) or self._unknown(row, kind)
            if thread is None:
                continue
            if kind <= records.PF_KERNEL:
                if thread.stores:
                    self._flush_stores(row[0], thread)
                faults.trap(thread, row[0], row[2], row[3], kind == records.PF_KERNEL)
            elif kind == records.MAP_PAGES:
                faults.map_pages(thread, row[0], row[3], row[4], row[5])
            elif kind == records.FAULT:
                faults.fault(thread, row[0], row[3], row[4])
            else:
                handlers[kind](thread, row)

    def look(
        self,
        is_over: Callable[[Thread], bool | None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> bool:
        """Ask of the faults that nothing closed whether they are over (see ``settling``).

        Return whether one is. The look is later than the records that were fed, and a fault may
        have made its last ones in between: feed those up to now before ``settle``.
        """
        found = False
        for thread in list(self._threads.values()):
            if _is_untold(thread):
                last_ns = thread.pf_last_ns
                if thread.pf_over[0] != last_ns or thread.pf_over[1] <= 0:
                    answer = is_over(thread)
                    thread.pf_over = (last_ns, clock() if answer else _ANSWERS[answer])
                found |= thread.pf_over[1] > 0
        return found

    def settle(self, fed_ns: int) -> None:
        """Report the faults that were found over, now that all records up to ``fed_ns`` were fed.

        Of the others remember what left the page cache meanwhile: if such a fault turns out to have
        been over before, its page is not mapped any more.
        """
        self.unsettled_ns = None
        for thread in list(self._threads.values()):
            if not _is_untold(thread):
                continue
            last_ns, over_ns = thread.pf_over
            if last_ns != thread.pf_last_ns:
                over_ns = _ANSWERS[None]
            if 0 < over_ns <= fed_ns:
                self.faults.report(thread)
                continue
            if self._deleted_since(thread):
                thread.pf_crossed_ns = thread.pf_last_ns
            if over_ns != _ANSWERS[False]:
                self.unsettled_ns = min(thread.pf_last_ns, self.unsettled_ns or thread.pf_last_ns)
        self._deleted.clear()

    def _note_deleted(self, time_ns: int, ino: int, first: int, end: int) -> None:
        ranges = self._deleted.setdefault(ino, [])
        if ranges and ranges[-1][2] == first:
            first = ranges.pop()[1]
        ranges.append((time_ns, first, end))

    def _deleted_since(self, thread: Thread) -> bool:
        """Tell whether the page of the open fault left the cache after the fault's last record."""
        return any(
            time_ns > thread.pf_last_ns and first <= thread.pf_index < end
            for time_ns, first, end in self._deleted.get(thread.pf_ino, ())
        )

    def changing(self) -> frozenset[int]:
        """Return the address spaces that a thread is changing now, in a system call or a fault."""
        foreign = {
            space.id
            for pid in set(self._foreign.values())
            for space in self._spaces_of(pid)
            if space.told
        }
        return frozenset(foreign).union(
            thread.space.id
            for thread in self._threads.values()
            if _is_untold(thread) or self._calls.is_changing(thread)
        )

    def bury(self, now_ns: int) -> None:
        """End the threads whose exit made no record: untraced ones, and after a loss any.

        And after a loss calls on other processes' memory.
        """
        for thread in self._processes.vanished():
            self.faults.close(thread)
            # No second exit follows, not even of a leader that an exec was about to replace.
            thread.awaits_exit = False
            self._processes.exit(now_ns, thread)
        self._processes.forget_dead(now_ns)
        for tid in sorted(self._maybe_back):
            call = self._call_of(tid)
            if call != proc.RUNNING and call.split(" ")[0] not in _FOREIGN_CALLS:
                self._leave_foreign(now_ns, tid)

    def _unknown(self, row: Row, kind: int) -> Thread | None:
        traced = kind not in _OF_FILES
        thread = self._processes.unknown(row[1] >> 32, traced)
        if thread is None and not traced:
            self._unfollowed["fault of a thread that has exited"] += 1
        return thread

    def _unthreaded(self, kind: int, row: Row) -> None:
        """Handle what may come from any thread, the daemon's own among them."""
        time_ns = row[0]
        if kind == records.CACHE_ADD:
            ino, index, pages = row[3], row[4], 1 << row[5]
            thread = self._threads.get(row[1] >> 32)
            if thread is not None:
                self.faults.added(thread, time_ns, ino, index, pages)
            self._emit(time_ns, events.CacheAdd(time_ns, ino, index, pages))
        elif kind == records.CACHE_DELETE:
            ino, index, pages = row[3], row[4], 1 << row[5]
            self._note_deleted(time_ns, ino, index, index + pages)
            self._emit(time_ns, events.CacheDelete(time_ns, ino, index, pages))
        elif kind == records.LOST:
            for thread in self._threads.values():
                self.faults.close(thread)
                # Its end may be among them. If not, it will be a call seen only at its end.
                self._calls.finish(thread)
            self._maybe_back |= self._foreign.keys()
            self._emit(time_ns, events.Lost(time_ns, row[2]))
            for space in self._processes.lost(time_ns):
                self._calls.resynchronise(time_ns, space)
        elif kind == records.RECLAIM:
            self._emit(time_ns, events.Reclaim(time_ns))
        elif kind == records.FOREIGN_ENTER:
            self._foreign[row[1] >> 32] = row[2]
            self._cloud(time_ns, row[2])
        elif kind == records.FOREIGN_EXIT:
            self._leave_foreign(time_ns, row[1] >> 32)
        elif kind == records.ADOPT:
            self._processes.adopt(self._adoptions(row[2]))
        else:
            raise AssertionError(f"row of unknown kind {kind}")

    def _leave_foreign(self, time_ns: int, tid: int) -> None:
        self._maybe_back.discard(tid)
        target = self._foreign.pop(tid, None)
        if target is not None:
            self._cloud(time_ns, target)

    def _cloud(self, time_ns: int, pid: int) -> None:
        """Another process gets at the memory of thread ``pid``; 0: of whom is not known."""
        for space in self._spaces_of(pid):
            for vma in space.vmas:
                vma.fresh = False
            if space.told:
                self._emit(time_ns, events.Cloud(time_ns, space.id, events.FOREIGN))

    def _spaces_of(self, pid: int) -> Iterable[Space]:
        if pid == 0:
            return {thread.space.id: thread.space for thread in self._threads.values()}.values()
        thread = self._threads.get(pid)
        return () if thread is None else (thread.space,)

    def _rss_anon(self, thread: Thread, row: Row) -> None:
        """The anonymous Rss changed: by the open fault, a call that was seen, or else by a copy."""
        if thread.exec_window or thread.call >= 0:
            return
        if thread.pf_open and thread.pf_error & ERROR_WRITE and not thread.pf_copied:
            thread.pf_copied = True
            return
        space = thread.space
        if any(vma.told and not vma.shared for vma in space.vmas):
            self._emit(row[0], events.Cloud(row[0], space.id, events.COPIED))

    # -- the life of address spaces ----------------------------------------------------------------

    def _ma_write(self, thread: Thread, row: Row) -> None:
        time_ns, start, end, stored = row[0], row[2], row[3] + 1, bool(row[4])
        if thread.exec_window:
            self._calls.remove(time_ns, thread.space, start, end)
            if stored:
                thread.space.extents.store(start, end)
                thread.space.vmas.insert(Vma(start, end, prot_known=False))
        elif thread.call < 0 or self._calls.replaces(thread):
            thread.stores.append((start, end, stored))
        elif stored:
            self._processes.store(time_ns, thread.space, start, end)

    def _flush_stores(self, time_ns: int, thread: Thread) -> None:
        """Take in the stores of a call that has ended, or of none that we saw."""
        stores, thread.stores = thread.stores, []
        for start, end, stored in stores:
            if thread.call < 0:
                self._unseen_call(time_ns, thread.space, start, end, stored)
            if stored:
                self._processes.store(time_ns, thread.space, start, end)

    def _unseen_call(self, time_ns: int, space: Space, start: int, end: int, stored: bool) -> None:
        """Something changed ``[start, end)``: brk, a growing stack, or a call without events."""
        held = space.vmas.meeting(start, end)
        if not any(vma.told for vma in held):
            return
        self._unfollowed["mapping changed by a call that is not seen"] += 1
        if not stored:
            self._calls.remove(time_ns, space, start, end)
        else:
            self._calls.resynchronise(time_ns, space)

    def _newtask(self, thread: Thread, row: Row) -> None:
        self.faults.close(thread)
        if not row[3] & CLONE_VM:
            # They filled the child's tree.
            thread.stores = []
        self._processes.fork(row[0], thread, row[2], row[3], _text(row[4], row[5]))

    def _prepare_exec(self, thread: Thread, row: Row) -> None:
        self.faults.close(thread)
        leader = self._threads.get(thread.pid)
        if leader is not None:
            self.faults.close(leader)
        self._processes.prepare_exec(row[0], thread)

    def _exec(self, thread: Thread, row: Row) -> None:
        self.faults.close(thread)
        self._processes.exec_done(row[0], thread, row[3])

    def _exit(self, thread: Thread, row: Row) -> None:
        self.faults.close(thread)
        self._processes.exit(row[0], thread)

    def _rename(self, thread: Thread, row: Row) -> None:
        if thread.tid == thread.pid:
            self._processes.comms[thread.pid] = _text(row[3], row[4])

    def _signal(self, thread: Thread, row: Row) -> None:
        if row[3] == thread.tid:
            self.faults.signal(thread, row[0], row[2])

    def _sys_enter(self, thread: Thread, row: Row) -> None:
        self.faults.close(thread)
        self._flush_stores(row[0], thread)
        self._calls.enter(row[0], thread, row[2], tuple(row[3:]))

    def _sys_exit(self, thread: Thread, row: Row) -> None:
        self.faults.close(thread)
        self._calls.leave(row[0], thread, row[2], row[3])
        self._flush_stores(row[0], thread)
        if thread.buffered:
            self.faults.replay(thread)
        self._calls.finish(thread)
