"""Threads, the address spaces they share, and how fork, exec and exit change both.

A thread id says whose record it is; the address space is what faults fall into. clone with CLONE_VM
shares it, without copies it, exec leaves it for a new one, and it ends with its last thread.
Address spaces are numbered by us, so a recycled pid never meets the mappings of the one before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from xipfs.trace import events
from xipfs.trace.output import Output
from xipfs.trace.pids import Adoption
from xipfs.trace.proc import Identity, MapsLine
from xipfs.trace.threads import Space, Thread
from xipfs.trace.vmas import Vma, VmaMap
from xipfs.units import PAGE_SHIFT

CLONE_VM: Final = 0x100
CLONE_THREAD: Final = 0x10000
#: How long a thread that exited is remembered: the end of its address space still makes records.
GRAVE_NS: Final = 2_000_000_000


class Processes:
    """All threads whose records are read.

    ``look`` answers who a thread is and ``maps`` what its process maps of the mount, both from
    /proc and both None when it is gone; a test passes its own.
    """

    def __init__(
        self,
        output: Output,
        look: Callable[[int], Identity | None],
        maps: Callable[[int], list[MapsLine] | None],
    ) -> None:
        self.output = output
        self.unfollowed: Counter[str] = Counter()
        self.threads: dict[int, Thread] = {}
        self.comms: dict[int, str] = {}
        #: Processes that stem from a followed command, and its own process.
        self.roots: dict[int, int] = {}
        #: Threads seen at the mount that the pid filter does not have yet.
        self.newcomers: list[int] = []
        #: Records were lost since the last ``vanished``: any exit may be among them.
        self.exits_lost = False
        #: Records were lost at some time: the birth of any process may have been among them.
        self.births_lost = False
        #: Living threads that opened a file of the mount, or may have.
        self.openers: set[int] = set()
        self._untraced: set[int] = set()
        self._dead: dict[int, Thread] = {}
        self._forgettable: list[int] = []
        self._look = look
        self.maps = maps
        self._next_space = 1

    def new_space(self, pid: int) -> Space:
        """Return an empty address space with a number of its own."""
        space = Space(self._next_space, pid)
        self._next_space += 1
        return space

    def uses_mount(self, space: Space) -> bool:
        """Return whether the process is one of the mount's: of others nothing may be told."""
        return space.told or not self.openers.isdisjoint(space.tids)

    def tell(self, time_ns: int, space: Space, vma: Vma) -> None:
        """Emit ``vma``'s Map unless the consumer has it; inode and offset are known."""
        if vma.told:
            return
        assert vma.ino is not None
        assert vma.pgoff is not None
        first = not space.told
        vma.told = space.told = True
        self.output.emit(
            time_ns,
            events.Map(
                time_ns,
                space.id,
                space.pid,
                vma.start,
                vma.end,
                vma.ino,
                vma.pgoff,
                vma.prot,
                vma.shared,
                vma.prot_known,
                vma.fresh,
            ),
        )
        for start, end, _ in space.extents.meeting(vma.start, vma.end):
            self.output.emit(time_ns, events.Extent(time_ns, space.id, start, end))
        if first and space.incomplete:
            self.output.emit(time_ns, events.Incomplete(time_ns, space.id, space.pid))
        if first and space.compat:
            self.output.emit(
                time_ns, events.Doubt(time_ns, space.id, 0, 1 << 64, calls_unseen=True)
            )

    def lost(self, time_ns: int) -> list[Space]:
        """Records were lost: mark the address spaces that live; return those that were told."""
        self.exits_lost = self.births_lost = True
        spaces = {thread.space.id: thread.space for thread in self.threads.values()}
        for space in spaces.values():
            if space.told and not space.incomplete:
                self.output.emit(time_ns, events.Incomplete(time_ns, space.id, space.pid))
            space.incomplete = True
        return [space for space in spaces.values() if space.told]

    def store(self, time_ns: int, space: Space, start: int, end: int) -> None:
        """Take in that ``[start, end)`` is one VMA of the kernel's now."""
        space.extents.store(start, end)
        if any(vma.told for vma in space.vmas.meeting(start, end)):
            self.output.emit(time_ns, events.Extent(time_ns, space.id, start, end))

    def zapped(self, space: Space, start: int, end: int) -> None:
        """PTEs of [start, end) went: those of faults that are open may be among them."""
        for tid in space.tids:
            thread = self.threads[tid]
            if thread.pf_open and start <= thread.pf_address < end:
                thread.pf_crossed_ns = thread.pf_last_ns

    def around(self, time_ns: int, thread: Thread, address: int, first: int, last: int) -> None:
        """Emit a fault-around of the open fault's file, pages first..last, first at ``address``.

        The kernel's record lies within one of its mappings, which our system calls may have cut
        into pieces that it has not (an madvise splits nothing): each piece maps this file too.
        """
        space, ino = thread.space, thread.pf_ino
        for vma in space.vmas.meeting(address, address + (last - first + 1 << PAGE_SHIFT)):
            index = first + (vma.start - address >> PAGE_SHIFT)
            if vma.ino is None and vma.pgoff in (None, index) and index >= 0:
                vma.ino, vma.pgoff = ino, index
            if vma.ino == ino:
                self.tell(time_ns, space, vma)
        self.output.emit(
            time_ns, events.Around(time_ns, space.id, thread.pid, address, ino, first, last)
        )

    # -- who is it ---------------------------------------------------------------------------------

    def unknown(self, tid: int, traced: bool) -> Thread | None:
        """Return the thread of a record whose birth and adoption were not seen.

        None for one that has exited, whose last records belong to no program.
        """
        dead = self._dead.get(tid)
        if dead is not None:
            return None
        identity = self._look(tid)
        if identity is None:
            self.unfollowed["a thread that ended before it was known"] += 1
            identity = Identity(tid, 0, "")
        thread = self._join(identity, tid)
        thread.traced = traced
        if not traced:
            self.newcomers.append(tid)
            self._untraced.add(tid)
        if len(thread.space.tids) == 1:
            thread.space.incomplete = traced and self.births_lost
            self.read_maps(thread.space)
        return thread

    def adopt(self, adoption: Adoption) -> None:
        """Take in a process that was running when the filter got it."""
        identity = adoption.identity
        for tid in adoption.tids:
            thread = self.threads.get(tid)
            if thread is None or thread.pid != identity.tgid:
                thread = self._join(identity, tid)
            thread.traced = True
        if adoption.tids:
            self.merge_maps(self.threads[min(adoption.tids)].space, adoption.maps)

    def _join(self, identity: Identity, tid: int) -> Thread:
        """Create thread ``tid``, in its process's address space where one is known."""
        leader = self.threads.get(identity.tgid)
        if leader is None:
            leader = next((t for t in self.threads.values() if t.pid == identity.tgid), None)
        space = leader.space if leader is not None else self.new_space(identity.tgid)
        space.compat |= identity.compat
        if identity.comm:
            self.comms[identity.tgid] = identity.comm
        return self._enter(Thread(tid, identity.tgid, space))

    def _enter(self, thread: Thread) -> Thread:
        self._dead.pop(thread.tid, None)
        self.threads[thread.tid] = thread
        thread.space.tids.add(thread.tid)
        return thread

    def read_maps(self, space: Space) -> bool:
        """Add what /proc says now to ``space``; False when the process is gone."""
        lines = self.maps(space.pid)
        if lines is None:
            return False
        self.merge_maps(space, lines)
        return True

    def merge_maps(self, space: Space, lines: Iterable[MapsLine]) -> None:
        """Add mappings read from /proc where the shadow has none or an unknown one.

        The reading is a little older or newer than the records around it, so what the records said
        stands.
        """
        for line in lines:
            held = space.vmas.isolate(line.start, line.end)
            if any(vma.ino is not None for vma in held):
                continue
            space.extents.store(line.start, line.end)
            space.vmas.carve(line.start, line.end)
            space.vmas.insert(
                Vma(
                    line.start,
                    line.end,
                    ino=line.ino,
                    pgoff=line.pgoff,
                    prot=line.prot,
                    shared=line.shared,
                    fresh=False,
                )
            )

    # -- fork, exec, exit --------------------------------------------------------------------------

    def fork(self, time_ns: int, parent: Thread, child_tid: int, flags: int, comm: str) -> None:
        """task_newtask: ``parent`` made thread or process ``child_tid``."""
        stale = self.threads.get(child_tid)
        if stale is not None:
            self.unfollowed["an exit that was not seen"] += 1
            self.exit(time_ns, stale)
        pid = parent.pid if flags & CLONE_THREAD else child_tid
        if flags & CLONE_VM:
            space = parent.space
        else:
            space = self._copy(time_ns, parent, child_tid)
        self._enter(Thread(child_tid, pid, space))
        if not flags & CLONE_THREAD:
            self.comms[child_tid] = comm
            self._inherit(parent.pid, child_tid)

    def _inherit(self, parent: int, child: int) -> None:
        root = self.roots.get(parent)
        if root is not None:
            self.roots[child] = root
        else:
            self.roots.pop(child, None)  # of an earlier process with this number

    def _copy(self, time_ns: int, parent: Thread, child_pid: int) -> Space:
        source, space = parent.space, self.new_space(child_pid)
        space.compat, space.extents = source.compat, source.extents.copy()
        dontfork = []
        told = False
        for vma in source.vmas:
            told |= vma.told
            if vma.dontfork:
                if vma.told:
                    dontfork.append((vma.start, vma.end))
                space.extents.cut(vma.start, vma.end)
                continue
            copy = vma.piece(vma.start, vma.end)
            copy.locked = False  # as dup_mmap does
            space.vmas.insert(copy)
        if told:
            space.told = True
            self.output.emit(
                time_ns,
                events.Fork(time_ns, source.id, space.id, source.pid, child_pid, tuple(dontfork)),
            )
        return space

    def prepare_exec(self, time_ns: int, thread: Thread) -> None:
        """sched_prepare_exec: from here on the process runs in a new address space.

        The kernel now kills the process's other threads, gives the caller the leader's id, and maps
        the new program; all that comes next under the leader's id, after the leader's own exit.
        """
        leader = thread.pid
        self._leave(time_ns, thread)
        other = None
        if thread.tid != leader:
            del self.threads[thread.tid]
            other = self.threads.get(leader)
            if other is not None:
                self._leave(time_ns, other)
        heir = Thread(leader, leader, self.new_space(leader))
        heir.exec_window = True
        heir.awaits_exit = other is not None
        self._enter(heir)

    def exec_done(self, time_ns: int, thread: Thread, old_tid: int) -> None:
        """sched_process_exec: the new program is mapped."""
        identity = self._look(thread.tid)
        compat = identity is not None and identity.compat
        if thread.exec_window:
            thread.exec_window = False
            thread.space.compat = compat
            return
        # This kernel has no sched_prepare_exec: what exec mapped is only in /proc.
        self._leave(time_ns, thread)
        if old_tid != thread.tid and old_tid in self.threads:
            self._leave(time_ns, self.threads.pop(old_tid))
        thread = self._enter(Thread(thread.tid, thread.pid, self.new_space(thread.pid)))
        thread.space.compat = compat
        if not self.read_maps(thread.space):
            self.unfollowed["exec of a process gone before /proc was read"] += 1

    def exit(self, time_ns: int, thread: Thread) -> None:
        """sched_process_exit: the thread runs no user code any more."""
        if thread.awaits_exit:
            # The leader that another thread's exec replaces; the id goes on with the new program.
            thread.awaits_exit = False
            return
        self._leave(time_ns, thread)
        self.openers.discard(thread.tid)
        del self.threads[thread.tid]
        thread.dead_ns = time_ns
        self._dead[thread.tid] = thread

    def _leave(self, time_ns: int, thread: Thread) -> None:
        space = thread.space
        space.tids.discard(thread.tid)
        if not space.tids:
            if space.told:
                self.output.emit(time_ns, events.Exit(time_ns, space.id))
            space.vmas = VmaMap()
        elif space.told:
            self.output.emit(time_ns, events.ThreadExit(time_ns, space.id, thread.tid))

    def vanished(self) -> list[Thread]:
        """Return the threads that have ended without a record of it, as /proc says."""
        doubtful = list(self.threads) if self.exits_lost else self._untraced & self.threads.keys()
        self.exits_lost = False
        gone = [self.threads[tid] for tid in doubtful if self._look(tid) is None]
        self._untraced = {
            tid for tid in self._untraced & self.threads.keys() if not self.threads[tid].traced
        }
        return gone

    def forget_dead(self, now_ns: int) -> None:
        """Drop threads that exited long enough ago, and at the next call names nobody bears.

        Not at once: the consumer has yet to ask for them, with the events of this drain.
        """
        for pid in self._forgettable:
            if pid not in self.threads:
                self.comms.pop(pid, None)
                self.roots.pop(pid, None)
        self._forgettable = []
        for tid in [t for t, dead in self._dead.items() if now_ns - dead.dead_ns > GRAVE_NS]:
            self._forgettable.append(self._dead.pop(tid).pid)
