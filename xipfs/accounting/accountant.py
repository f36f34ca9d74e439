"""From events to charges.

Events come in time order and change a modelled machine whose VMAs are VM_MIXEDMAP over the
image's files. Each real fault is charged once: the model takes as many faults as its rules need
until the access is allowed. The first is the real one (``pgfault``), the others are those that
VM_MIXEDMAP would have taken on top (``pgfault_extra``), and what the PTE maps at the end decides
which of ``pgfault_xip``, ``pgfault_pagecache``, ``pgfault_cow`` it counts in. A fault that maps
nothing (beyond the end of the file) counts in ``pgfault_sigbus`` instead.

A fault is major (rule F4) if a page-cache frame had to be filled for it: now, or by the READ
request that this very fault sent before its events could be read.

Nothing here awaits; the caller consumes a batch in one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from xipfs.accounting.bulk_charging import BulkCharger
from xipfs.accounting.causes import HINT, Causes
from xipfs.accounting.charges import KINDS, Charge, ChargeBatch, Ledger, PteKind
from xipfs.accounting.effects import Look
from xipfs.accounting.fault_around import map_around
from xipfs.accounting.hints import Hints, Page
from xipfs.accounting.kernel_ptes import KernelPtes
from xipfs.accounting.kernel_states import ANON, CALLS_UNSEEN, SILENT_CALL
from xipfs.accounting.live_file import LiveFile
from xipfs.accounting.runs import Runs
from xipfs.fs.filesystem import Filesystem
from xipfs.mm import audit
from xipfs.mm.access import access, maps_what
from xipfs.mm.bug import InvariantError, KernelBug
from xipfs.mm.flags import VM_EXEC, VM_MAYSHARE, VM_MAYWRITE, VM_READ, VM_SHARED, VM_WRITE
from xipfs.mm.fork import dup_mmap
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import do_mmap, do_munmap, mprotect
from xipfs.mm.mremap import move_mapping
from xipfs.mm.rules import Rules
from xipfs.mm.zap import exit_mmap, unmap_mapping_range
from xipfs.trace import events as ev
from xipfs.trace.fault_batch import FaultBatch, expanded
from xipfs.units import PAGE_SHIFT

_PROT = ((1, VM_READ), (2, VM_WRITE), (4, VM_EXEC))


def vm_prot(prot: int) -> int:
    """Return the VM_READ, VM_WRITE, VM_EXEC bits of PROT_ bits."""
    return sum(vm_bit for bit, vm_bit in _PROT if prot & bit)


class Accountant:
    """One mount's modelled machine and its ledger.

    ``comm(pid)`` names a process. ``unfollowed`` counts, by name, what was seen and could not be
    charged or mapped exactly; ``around_pages`` the PTEs that fault-around filled without a fault.
    """

    def __init__(
        self,
        fs: Filesystem,
        rules: Rules,
        comm: Callable[[int], str],
        *,
        root_of: Callable[[int], int | None] = lambda _pid: None,
        readahead: bool = False,
    ) -> None:
        self.fs = fs
        self.comm = comm
        self.machine = Machine(fs.memory, rules)
        self.ledger = Ledger()
        self.hints = Hints()
        self.runs = Runs(root_of, comm)
        self.causes = Causes()
        self.unfollowed: Counter[str] = Counter()
        #: Told each fault with its charge, or many with theirs.
        self.on_charge: Callable[[ev.Fault, Charge], None] | None = None
        #: Whether charges tell their effects, and faults are charged one by one for that.
        self.detailed = False
        self.on_charges: Callable[[FaultBatch, ChargeBatch], None] | None = None
        #: Told each other event before it is applied, and what of xipfs's doing caused it.
        self.on_event: Callable[[ev.Event, str], None] | None = None
        #: Told each fault-around with the pages it mapped, by their states (kernel_states).
        self.on_around: Callable[[ev.Around, dict[int, int]], None] | None = None
        self.around_pages = 0
        self._files: dict[int, LiveFile] = {}
        #: The modelled address spaces by their number in the events.
        self.mms: dict[int, MmStruct] = {}
        self.kernel = KernelPtes(readahead=readahead)
        self.sparse_pfn = fs.memory.alloc_anon()
        self.bulk = BulkCharger(self)
        self._handlers: dict[type, Callable[..., Charge | None]] = {
            ev.Map: self._map,
            ev.Unmap: self._unmap,
            ev.Protect: self._protect,
            ev.Move: self._move,
            ev.Zap: self._zap,
            ev.Doubt: self._doubt,
            ev.Registered: self.runs.registered,
            ev.Split: self._split,
            ev.Extent: self.kernel.extent,
            ev.Cloud: self.kernel.cloud,
            ev.Reclaim: self.kernel.reclaim,
            ev.Lost: self._lost,
            ev.Incomplete: lambda event: self.ledger.mark_incomplete(event.mm),
            ev.Fork: self._fork,
            ev.Exit: self._exit,
            ev.ThreadExit: self.kernel.thread_exit,
            ev.Fault: self._fault,
            ev.Around: self.around,
            ev.CacheAdd: self.kernel.cache_add,
            ev.CacheDelete: self._cache_delete,
        }

    def consume(self, events: Iterable[ev.Event | FaultBatch]) -> list[Charge]:
        """Apply a batch of events; return what its faults were charged, in order."""
        charges = []
        for event in expanded(events):
            if self.on_event is not None and type(event) not in (ev.Fault, ev.Around):
                self.on_event(event, self.causes.of_event(event))
            if type(event) is ev.CowBroken:
                charges += self._cow_broken(event)
                continue
            handle = self._handlers.get(type(event))
            if handle is not None:
                charge = handle(event)
                if charge is not None:
                    charges.append(charge)
        return charges

    def charge(self, step: list[ev.Event] | FaultBatch) -> ChargeBatch | list[Charge]:
        """``consume`` a step; plain faults many at a time where that pays."""
        if not isinstance(step, FaultBatch):
            return self.consume(step)
        many = None if self.detailed else self.bulk.charge(step)
        return self.consume(step.expand()) if many is None else many

    def check(self) -> str:
        """Recount the modelled machine (T1 to T9); return what is broken, empty if nothing is."""
        held: dict[int, int] = {self.machine.zero_pfn: 1, self.sparse_pfn: 1}
        held |= dict.fromkeys(self.fs.resident_frames(), 1)
        try:
            audit.check(self.machine, holders=held)
        except InvariantError as broken:
            return str(broken)
        return ""

    # What the filesystem tells: its pages lose their frames or their place.

    def is_mapped(self, ino: int) -> bool:
        """Return whether any address space is known to map the file."""
        file = self._files.get(ino)
        return file is not None and len(file.mapped.i_mmap) > 0

    def pids_mapping(self, ino: int) -> set[int]:
        """Return the processes that are known to map the file."""
        file = self._files.get(ino)
        if file is None:
            return set()
        numbers = {vma.mm.name for vma in file.mapped.i_mmap.overlapping(0, 1 << 52)}
        return {self.kernel.pids[number] for number in numbers if number in self.kernel.pids}

    def maps_any(self, number: int, inos: set[int]) -> bool:
        """Return whether address space ``number`` is known to map one of the files."""
        return any(vma.file is not None and vma.file.name in inos for vma in self.mms[number])

    def unmap_pages(self, ino: int, first: int, count: int) -> None:
        """Zap every PTE of a run of file pages; private copies stay (rules R1, K7)."""
        file = self._files.get(ino)
        if file is not None:
            file.forget(first, count)
            unmap_mapping_range(file.mapped, first, count, even_cows=False)

    def cut(self, ino: int, first: int) -> None:
        """Zap every PTE of a file from page ``first`` on, private copies too (rule K15)."""
        file = self._files.get(ino)
        if file is not None:
            file.forget(first, 1 << 52)
            self.kernel.cut(file.mapped, first)
            unmap_mapping_range(file.mapped, first, 0, even_cows=True)

    def mark_hints(self, count: int) -> list[Page]:
        """Choose up to ``count`` mapped pages for hint faults, mark and return them, sorted.

        The caller has them invalidated; nothing may be consumed between the two.
        """
        pages = sorted(self.hints.sample(self.mms, count))
        for ino, index in pages:
            self.hints.mark(self.file(ino).mapped, index)
        return pages

    # What the observer tells.

    def file(self, ino: int) -> LiveFile:
        """Return the file of inode ``ino`` as mm sees it."""
        file = self._files.get(ino)
        if file is None:
            file = LiveFile(self.fs, self.machine, ino, self.sparse_pfn, self.kernel.pool)
            self._files[ino] = file
        return file

    def mm(self, number: int) -> MmStruct:
        """Return the modelled address space with that number in the events."""
        mm = self.mms.get(number)
        if mm is None:
            mm = self.mms[number] = MmStruct(self.machine, number)
        return mm

    def _map(self, event: ev.Map) -> None:
        # Whether a shared mapping's file was opened for writing shows only in its protection;
        # a later mprotect to writable proves it (see _protect).
        writable = not event.shared or bool(event.prot & 2)
        address = do_mmap(
            self.mm(event.mm),
            self.file(event.ino).mapped,
            (event.end - event.start) >> PAGE_SHIFT,
            vm_prot(event.prot),
            pgoff=event.pgoff,
            shared=event.shared,
            file_writable=writable,
            address=event.start,
        )
        assert address == event.start, (event, address)
        self.kernel.map(event)

    def _unmap(self, event: ev.Unmap) -> None:
        do_munmap(self.mm(event.mm), event.start, event.end)
        self.kernel.unmap(event.mm, event.start, event.end)
        self.causes.forget(event.mm, event.start, event.end)

    def _protect(self, event: ev.Protect) -> None:
        mm = self.mm(event.mm)
        prot = vm_prot(event.prot)
        if prot & VM_WRITE:
            for vma in mm.overlapping(event.start, event.end):
                if vma.flags & VM_MAYSHARE:
                    vma.flags |= VM_SHARED | VM_MAYWRITE
        mprotect(mm, event.start, event.end, prot)

    def _move(self, event: ev.Move) -> None:
        self.kernel.move(event)
        self.causes.forget(event.mm, event.start, event.end)
        move_mapping(
            self.mm(event.mm),
            event.start,
            event.end,
            event.new_start,
            event.new_end,
            keep_old=event.keep_old,
        )

    def _zap(self, event: ev.Zap) -> None:
        mm = self.mm(event.mm)
        self.kernel.zap(event.mm, event.start, event.end)
        self.causes.forget(event.mm, event.start, event.end)
        for vma in mm.overlapping(event.start, event.end):
            self.bulk.zap(vma, max(vma.start, event.start), min(vma.end, event.end))

    def _doubt(self, event: ev.Doubt) -> None:
        reason = CALLS_UNSEEN if event.calls_unseen else SILENT_CALL
        self.kernel.doubt(event.mm, event.start, event.end, reason)

    def _cow_broken(self, event: ev.CowBroken) -> list[Charge]:
        """Charge the write faults that made copies of mapped file pages: no record tells them."""
        mm = self.mm(event.mm)
        charges = []
        for address, state in list(self.kernel.populated(event.mm, event.start, event.end)):
            vma = mm.find_vma(address)
            if state == ANON or vma is None or vma.file is None:
                continue
            assert isinstance(vma.file.name, int)
            fault = ev.Fault(
                event.time_ns, event.mm, event.pid, event.tid, address,
                vma.file.name, vma.pgoff_of(address),
                write=True, execute=False, user=False, protection=True,
                verdict=ev.MINOR, origin=ev.POPULATE,
            )  # fmt: skip
            charge = self._fault(fault)
            if charge is not None:
                charges.append(charge)
        return charges

    def _split(self, event: ev.Split) -> None:
        # What a later copy gives its anon_vma to is one piece only, here as in the kernel.
        self.mm(event.mm).isolate(event.start, event.end)

    def _lost(self, _event: ev.Lost) -> None:
        self.kernel.lost(self.mms.values())

    def _fork(self, event: ev.Fork) -> None:
        self.kernel.fork(event, self.mm(event.mm))
        child = dup_mmap(self.mm(event.mm), event.child_mm)
        assert isinstance(child, MmStruct), child  # only page-table memory could be short
        for start, end in event.dontfork:
            do_munmap(child, start, end)
        self.mms[event.child_mm] = child

    def _exit(self, event: ev.Exit) -> None:
        mm = self.mms.pop(event.mm, None)
        if mm is not None:
            exit_mmap(mm)
        self.hints.exit(event.mm)
        self.causes.exit(event.mm)
        self.kernel.exit(event.mm)
        self.ledger.exit(event.mm)
        self.runs.exit(event.mm)

    def around(self, event: ev.Around) -> None:
        """Map what the kernel mapped without a fault of its own."""
        mapped = map_around(self, event)
        if self.on_around is not None:
            self.on_around(event, mapped)

    def _cache_delete(self, event: ev.CacheDelete) -> None:
        file = self._files.get(event.ino)
        if file is not None:
            self.causes.deleted(event, file.mapped, self.kernel)
        self.kernel.cache_delete(event, None if file is None else file.mapped)

    def _fault(self, event: ev.Fault) -> Charge | None:
        vma = self.mm(event.mm).find_vma(event.address)
        if event.origin == ev.POPULATE and not event.write and vma is not None:
            # Its record named a window only; populate passes over what is mapped already.
            passed = self.kernel.mapped_run(event.mm, event.address, vma.end)
            event = event._replace(
                address=event.address + (passed << PAGE_SHIFT), index=event.index + passed
            )
        charge = self.take(event)
        if charge is not None:
            self.ledger.charge(event.mm, self.comm(event.pid), charge)
            if self.on_charge is not None:
                self.on_charge(event, charge)
        return charge

    def take(self, event: ev.Fault) -> Charge | None:
        """Take a fault in both columns; return what it is to be charged, which is not entered."""
        look = Look(self, event) if self.detailed else None
        self.kernel.fault(event, self.mm(event.mm).find_vma(event.address))
        self.runs.fault(event)
        if event.verdict == ev.SIGSEGV:
            return None  # the access was not allowed: no fault handler ran
        hinted = self.hints.take(event.mm, event.address)
        cause = self.causes.take(event.mm, event.address)
        # A fault-around between the mark and the invalidation that it announced takes the mark.
        hinted = hinted or cause == HINT
        kind, major, faults = self._outcome(event)
        hint = hinted and not faults and kind is not PteKind.NONE
        charge = Charge(
            event.time_ns,
            event.pid,
            event.ino,
            event.index,
            kind,
            event.write,
            major and not hint,
            max(faults - 1, 0),
            hint,
            cause,
            None if look is None else look.effect(),
        )
        self.fs.touch(event.ino, event.index)
        return charge

    def _outcome(self, event: ev.Fault) -> tuple[PteKind, bool, int]:
        """Take the fault by the rules; return what its PTE maps, major or not, faults taken."""
        # Both are taken in any case: they belong to this page's next fault, whatever comes of it.
        filled = self.fs.take_fill_mark(event.ino, event.index)
        evicted = self.fs.take_evicted_fill(event.ino, event.index)
        mm = self.mm(event.mm)
        caused_read = event.verdict == ev.MAJOR
        if evicted and not filled and caused_read and not _copies(mm, event):
            # RAM was so short that the page went again, with its PTE, before we came to charge
            # it. Taking the fault now would fill a second frame for it.
            return PteKind.PAGECACHE, True, 1
        try:
            taken = access(mm, event.address, write=event.write)
        except KernelBug as bug:
            self.unfollowed[f"kernel BUG by the rules: {bug.condition}"] += 1
            return PteKind.NONE, False, 0
        kind = PteKind.NONE
        if not taken.signal:
            kind = KINDS[maps_what(mm, event.address)]
        elif taken.signal == "SIGSEGV":
            self.unfollowed["faults outside the mappings known of their process"] += 1
        elif taken.signal == "SIGKILL":
            self.unfollowed["faults while every frame of RAM was pinned"] += 1
        return kind, bool(taken.major) or (filled and caused_read), taken.faults


def _copies(mm: MmStruct, event: ev.Fault) -> bool:
    """Return whether the access ends in a private copy, which stays when the page goes."""
    vma = mm.find_vma(event.address)
    return event.write and vma is not None and not vma.flags & VM_SHARED
