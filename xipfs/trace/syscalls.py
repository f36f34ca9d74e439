"""What each memory system call does to the shadow of the caller's address space.

Effects are applied at the call's exit record, where its result is known; faults that other threads
take while a call runs are ordered by their own records and may fall on either side of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from xipfs.trace import events
from xipfs.trace.proc import PROT_WRITE
from xipfs.trace.processes import Processes
from xipfs.trace.records import SYSTEM_CALLS
from xipfs.trace.threads import Space, Thread
from xipfs.trace.vmas import Vma
from xipfs.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

_ERROR_MIN: Final = (1 << 64) - 4095
#: Above every address.
_END: Final = 1 << 64
_MAP_TYPE: Final = 0x0F
_MAP_PRIVATE: Final = 0x02
_MAP_ANONYMOUS: Final = 0x20
_MREMAP_DONTUNMAP: Final = 4
_MADV_REMOVE: Final = 9
_MADV_DONTFORK: Final = 10
_MADV_DOFORK: Final = 11
_MADV_PAGEOUT: Final = 21
#: "xipf": no kernel's advice. The library of exact mode calls it to be seen (preload/register.c).
_MADV_REGISTERED: Final = 0x78697066
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
#: DONTNEED, DONTNEED_LOCKED, GUARD_INSTALL: each takes the PTEs away and leaves the mapping.
_MADV_ZAP: Final = frozenset({4, 24, 102})
#: NORMAL, RANDOM, SEQUENTIAL, DONTFORK, DOFORK, DONTDUMP, DODUMP: flags of the mapping, no PTEs.
_MADV_FLAGS: Final = frozenset({0, 1, 2, _MADV_DONTFORK, _MADV_DOFORK, 16, 17})
#: Calls whose first two arguments are all the memory whose PTEs they change.
_OF_A_RANGE: Final = frozenset(
    {"mmap", "munmap", "mprotect", "pkey_mprotect", "madvise", "mlock", "mlock2", "munlock"}
)
#: Advice that changes no PTE of a file mapping.
_MADV_HARMLESS: Final = frozenset({3, 8, 12, 13, 14, 15, 18, 19, 20, 25, 103})


def _writable_private(pieces: list[Vma]) -> list[Vma]:
    return [vma for vma in pieces if vma.prot & PROT_WRITE and not vma.shared]


def _page_up(size: int) -> int:
    return (size + PAGE_SIZE - 1) & PAGE_MASK


class SystemCalls:
    """Applies completed system calls to the callers' address spaces."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._output = processes.output
        self._unfollowed = processes.unfollowed
        self._effects: dict[int, Callable[[int, Thread, int], None]] = {
            SYSTEM_CALLS.index(name): effect
            for name, effect in {
                "mmap": self._mmap,
                "munmap": self._munmap,
                "mremap": self._mremap,
                "mprotect": self._mprotect,
                "pkey_mprotect": self._mprotect,
                "madvise": self._madvise,
                "mlock": self._mlock,
                "mlock2": self._mlock2,
                "mlockall": self._mlockall,
                "munlock": self._munlock,
                "munlockall": self._munlockall,
                "remap_file_pages": self._remap_file_pages,
            }.items()
        }

    def enter(self, time_ns: int, thread: Thread, number: int, arguments: tuple[int, ...]) -> None:
        """Note that ``thread`` entered system call ``number`` (an index of SYSTEM_CALLS)."""
        thread.call = number
        thread.call_args = arguments
        # Faults inside the call walk its range upwards from here; mmap's is known at its exit.
        thread.populate_next = arguments[0] & PAGE_MASK
        if SYSTEM_CALLS[number] == "mmap":
            thread.populate_next = -1
        elif SYSTEM_CALLS[number] in ("mlock", "mlock2"):
            # Cut before anything is populated: only the locked piece gets an anon_vma by that.
            self._range(time_ns, thread)

    def populates(self, thread: Thread) -> bool:
        """Tell whether the call that ``thread`` is in may fault pages of its range in."""
        if thread.call < 0:
            return False
        name = SYSTEM_CALLS[thread.call]
        if name == "madvise":
            return thread.call_args[2] in (_MADV_POPULATE_READ, _MADV_POPULATE_WRITE)
        return name in ("mmap", "mlock", "mlock2", "mlockall", "mremap", "mprotect")

    def populates_by_writing(self, thread: Thread, prot: int, shared: bool) -> bool:
        """Tell whether the call faults pages of such a mapping in for writing.

        populate_vma_page_range writes to private writable mappings, to break COW beforehand.
        """
        if thread.call >= 0 and SYSTEM_CALLS[thread.call] == "madvise":
            return thread.call_args[2] == _MADV_POPULATE_WRITE
        return prot & PROT_WRITE != 0 and not shared

    def populated(self, thread: Thread, ino: int, first: int, last: int) -> tuple[Vma, int] | None:
        """Return mapping and address of the page that a populating call reaches next."""
        lowest = thread.populate_next
        for vma in thread.space.vmas:
            if vma.end <= lowest or vma.pgoff is None or vma.ino not in (None, ino):
                continue
            page = max(first, vma.index_at(max(lowest, vma.start)))
            address = vma.address_of(page)
            if page <= last and address is not None:
                return vma, address
        return None

    def address_unknown(self, thread: Thread) -> bool:
        """Tell whether only the call's exit will say where its pages are: an mmap."""
        return thread.call >= 0 and thread.populate_next < 0

    def replaces(self, thread: Thread) -> bool:
        """Tell whether the call may put mappings where others are: these go first."""
        name = SYSTEM_CALLS[thread.call]
        return name in ("mmap", "munmap", "mremap", "remap_file_pages")

    def is_changing(self, thread: Thread) -> bool:
        """Tell whether ``thread`` is in a call that may be changing PTEs that were told.

        What it has done so far nobody knows: its effect is applied when it ends.
        """
        if thread.call < 0 or not thread.space.told:
            return False
        held: Iterable[Vma] = thread.space.vmas
        if SYSTEM_CALLS[thread.call] in _OF_A_RANGE:
            start, length = thread.call_args[:2]
            held = thread.space.vmas.meeting(start & PAGE_MASK, _page_up(start + length))
        return any(vma.told for vma in held)

    def leave(self, time_ns: int, thread: Thread, number: int, result: int) -> None:
        """Apply system call ``number``, which returned ``result`` (an unsigned word)."""
        if thread.call != number:
            if number in self._effects:
                self._unfollowed["a system call seen only at its end"] += 1
                self._doubt(time_ns, thread.space, list(thread.space.vmas))
            return
        effect = self._effects.get(number)
        if effect is not None:
            effect(time_ns, thread, result)

    def finish(self, thread: Thread) -> None:
        """The call is over, and so are the faults it took."""
        thread.call = -1

    def resynchronise(self, time_ns: int, space: Space) -> None:
        """Make the shadow of ``space`` what /proc says now: something happened that was not seen.

        Later records are of before this reading or after it; either way what they say stands.
        """
        lines = self._processes.maps(space.pid)
        if lines is None:
            return
        for vma in [vma for vma in space.vmas if vma.ino is not None]:
            at = vma.start
            for line in lines:
                if not (vma.start < line.end and line.start < vma.end) or line.ino != vma.ino:
                    continue
                if vma.pgoff != line.pgoff + (vma.start - line.start >> PAGE_SHIFT):
                    continue
                if at < line.start:
                    self.remove(time_ns, space, at, line.start)
                at = min(line.end, vma.end)
            if at < vma.end:
                self.remove(time_ns, space, at, vma.end)
        self._processes.merge_maps(space, lines)

    def remove(self, time_ns: int, space: Space, start: int, end: int) -> list[Vma]:
        """Take ``[start, end)`` out of ``space``; tell the consumer if it knew any of it."""
        gone = space.vmas.carve(start, end)
        if any(vma.told for vma in gone):
            self._output.emit(time_ns, events.Unmap(time_ns, space.id, start, end))
        return gone

    def _mmap(self, time_ns: int, thread: Thread, result: int) -> None:
        _, length, flags, offset, prot = thread.call_args[:5]
        if result >= _ERROR_MIN:
            return
        end = result + _page_up(length)
        self.remove(time_ns, thread.space, result, end)
        if not flags & _MAP_ANONYMOUS:
            shared = flags & _MAP_TYPE != _MAP_PRIVATE
            thread.space.vmas.insert(
                Vma(result, end, pgoff=offset // PAGE_SIZE, prot=prot & 7, shared=shared)
            )
        thread.populate_next = result

    def _munmap(self, time_ns: int, thread: Thread, result: int) -> None:
        address, length = thread.call_args[:2]
        if result == 0:
            self.remove(time_ns, thread.space, address, address + _page_up(length))

    def _mremap(self, time_ns: int, thread: Thread, result: int) -> None:
        address, old_length, new_length, flags = thread.call_args[:4]
        if result >= _ERROR_MIN:
            return
        space = thread.space
        old_length, new_length = _page_up(old_length), _page_up(new_length)
        old_end, new_end = address + old_length, result + new_length
        if old_length == 0:
            self._duplicate(time_ns, space, address, result, new_end)
            return
        if new_length < old_length:
            self.remove(time_ns, space, address + new_length, old_end)
            old_end = address + new_length
        if result == address and new_end == old_end:
            return
        keep_old = bool(flags & _MREMAP_DONTUNMAP)
        moved = space.vmas.carve(address, old_end)
        self.remove(time_ns, space, old_end if result == address else result, new_end)
        for vma in moved:
            start, end = vma.start, vma.end
            new_start = result + (start - address)
            grown = new_end if end == old_end else new_start + (end - start)
            copy = vma.piece(start, end)
            copy.start, copy.end = new_start, grown
            space.vmas.insert(copy)
            if keep_old:
                space.vmas.insert(vma)
            if vma.told:
                self._output.emit(
                    time_ns,
                    events.Move(time_ns, space.id, start, end, new_start, grown, keep_old),
                )

    def _duplicate(self, time_ns: int, space: Space, source: int, start: int, end: int) -> None:
        """mremap with old length 0: a second mapping of a shared one, empty so far."""
        self.remove(time_ns, space, start, end)
        vma = space.vmas.find(source)
        if vma is not None:
            pgoff = None if vma.pgoff is None else vma.index_at(source)
            space.vmas.insert(
                Vma(start, end, ino=vma.ino, pgoff=pgoff, prot=vma.prot, shared=vma.shared)
            )

    def _mprotect(self, time_ns: int, thread: Thread, result: int) -> None:
        start, length, prot = thread.call_args[:3]
        end = start + _page_up(length)
        pieces = [
            piece
            for vma in thread.space.vmas.meeting(start, end)
            # What has this protection already is not split (mprotect_fixup).
            if not (vma.prot_known and vma.prot == prot & 7)
            for piece in thread.space.vmas.isolate(max(start, vma.start), min(end, vma.end))
        ]
        if result != 0:
            # It holds up to the first hole or refusal, which we cannot place.
            if any(vma.told for vma in pieces):
                self._unfollowed["mprotect that failed half way"] += 1
            return
        locked = [v for v in pieces if v.locked is not False and not v.prot & PROT_WRITE]
        for vma in pieces:
            vma.prot = prot & 7
            vma.prot_known = True
            if vma.told:
                self._output.emit(
                    time_ns,
                    events.Protect(time_ns, thread.space.id, vma.start, vma.end, vma.prot),
                )
        if prot & PROT_WRITE:
            # mprotect_fixup populates locked private memory that becomes writable.
            for sure in (True, None):
                now = [vma for vma in _writable_private(locked) if vma.locked is sure]
                self._populated_by_writing(time_ns, thread, now, start, end, broken=bool(sure))

    def _madvise(self, time_ns: int, thread: Thread, result: int) -> None:
        start, length, advice = thread.call_args[:3]
        end = start + _page_up(length)
        advice &= 0xFFFFFFFF
        # Only advice that a mapping keeps as a flag splits it, here as in the kernel.
        pieces = thread.space.vmas.meeting(start, end)
        if advice in _MADV_ZAP:
            # ENOMEM means a hole; all that is mapped was dropped none the less.
            if result in (0, (1 << 64) - 12):
                self._zap(time_ns, thread.space, pieces, start, end)
        elif advice in _MADV_FLAGS:
            if result == 0:
                self._flag(time_ns, thread.space, start, end, advice)
        elif advice == _MADV_POPULATE_WRITE:
            private = [vma for vma in pieces if not vma.shared]
            self._populated_by_writing(time_ns, thread, private, start, end, broken=result == 0)
            if result != 0 and any(vma.told for vma in pieces):
                self._unfollowed["MADV_POPULATE_WRITE that stopped half way"] += 1
        elif advice in (_MADV_PAGEOUT, _MADV_REMOVE):
            if any(vma.told for vma in pieces):
                name = {_MADV_PAGEOUT: "PAGEOUT", _MADV_REMOVE: "REMOVE"}
                self._unfollowed[f"MADV_{name[advice]}"] += 1
                self._doubt(time_ns, thread.space, pieces)
        elif advice == _MADV_REGISTERED:
            thread.space.told = True  # so that its end is told
            self._output.emit(time_ns, events.Registered(time_ns, thread.space.id, thread.pid))
        elif advice not in _MADV_HARMLESS and advice != _MADV_POPULATE_READ and result == 0:
            self._unfollowed[f"madvise advice {advice}"] += 1

    def _mlock(self, time_ns: int, thread: Thread, result: int) -> None:
        pieces = self._range(time_ns, thread)
        for vma in pieces:
            vma.locked = True if result == 0 else None
        self._populated_by_writing(
            time_ns, thread, _writable_private(pieces), 0, _END, broken=result == 0
        )

    def _mlock2(self, time_ns: int, thread: Thread, _result: int) -> None:
        # With MLOCK_ONFAULT, which is not among the fields read, nothing is faulted in.
        self._perhaps_locked(time_ns, thread, self._range(time_ns, thread))

    def _mlockall(self, time_ns: int, thread: Thread, _result: int) -> None:
        self._perhaps_locked(time_ns, thread, list(thread.space.vmas))

    def _perhaps_locked(self, time_ns: int, thread: Thread, pieces: list[Vma]) -> None:
        for vma in pieces:
            vma.locked = None
        self._populated_by_writing(
            time_ns, thread, _writable_private(pieces), 0, _END, broken=False
        )

    def _munlock(self, time_ns: int, thread: Thread, result: int) -> None:
        for vma in self._range(time_ns, thread):
            vma.locked = False if result == 0 else None

    def _munlockall(self, _time_ns: int, thread: Thread, _result: int) -> None:
        for vma in thread.space.vmas:
            vma.locked = False

    def _range(self, time_ns: int, thread: Thread) -> list[Vma]:
        """Cut out and return the pieces of the pages that the call's first two arguments touch."""
        start, length = thread.call_args[:2]
        first = start & PAGE_MASK
        return self._cut_out(time_ns, thread.space, first, first + _page_up(length + start - first))

    def _cut_out(self, time_ns: int, space: Space, start: int, end: int) -> list[Vma]:
        """Split the mappings at both ends, as a flag of [start, end) does, and say so."""
        pieces = space.vmas.isolate(start, end)
        if any(vma.told for vma in pieces):
            self._output.emit(time_ns, events.Split(time_ns, space.id, start, end))
        return pieces

    def _populated_by_writing(
        self,
        time_ns: int,
        thread: Thread,
        pieces: list[Vma],
        start: int,
        end: int,
        *,
        broken: bool,
    ) -> None:
        """Tell that all of ``pieces`` in [start, end) are copies now, or (not broken) may be."""
        for vma in pieces:
            first, stop = max(vma.start, start), min(vma.end, end)
            if not vma.told:
                continue
            space = thread.space.id
            if broken:
                self._output.emit(
                    time_ns,
                    events.CowBroken(time_ns, space, thread.pid, thread.tid, first, stop),
                )
            else:
                self._output.emit(time_ns, events.Doubt(time_ns, space, first, stop))

    def _doubt(self, time_ns: int, space: Space, pieces: list[Vma]) -> None:
        for vma in pieces:
            if vma.told:
                self._output.emit(time_ns, events.Doubt(time_ns, space.id, vma.start, vma.end))

    def _flag(self, time_ns: int, space: Space, start: int, end: int, advice: int) -> None:
        pieces = self._cut_out(time_ns, space, start, end)
        if advice in (_MADV_DONTFORK, _MADV_DOFORK):
            for vma in pieces:
                vma.dontfork = advice == _MADV_DONTFORK

    def _zap(self, time_ns: int, space: Space, pieces: list[Vma], start: int, end: int) -> None:
        for vma in pieces:
            if vma.told:
                first, stop = max(vma.start, start), min(vma.end, end)
                self._output.emit(time_ns, events.Zap(time_ns, space.id, first, stop))
                self._processes.zapped(space, first, stop)

    def _remap_file_pages(self, time_ns: int, thread: Thread, result: int) -> None:
        start, size = (word & PAGE_MASK for word in thread.call_args[:2])
        if result == 0:
            self._unfollowed["remap_file_pages"] += 1
            self.remove(time_ns, thread.space, start, start + size)
            self.resynchronise(time_ns, thread.space)
            for vma in [v for v in thread.space.vmas.meeting(start, start + size) if v.ino]:
                self._processes.tell(time_ns, thread.space, vma)  # it is populated already
