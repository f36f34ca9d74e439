"""What a recording needs of a live mount besides its faults: state at its start, then each change.

The stream is in the order of the trio thread: nothing here awaits, so an item stands before the
first fault that it can have had a say in. The filesystem is watched from outside, by a subclass
that tells what it was asked: so no part of it needs to know that it is recorded. While nobody
records, a call costs one look.

A file's state is told before anything else of it, once; an image with a million files costs a
recording nothing for those that are not used.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, Final

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.kernel_states import UNKNOWN
from xipfs.errors import FsError, ImageError
from xipfs.fs.moving import Moved
from xipfs.fs.types import Attr, PageKind, WriteOrigin
from xipfs.fuse.paths import NamedFilesystem
from xipfs.memory.region import Buffer
from xipfs.migrate.engine import runs
from xipfs.migrate.history import ChunkEvent
from xipfs.migrate.refusals import REASONS
from xipfs.mm.flags import VM_EXEC, VM_MAYSHARE, VM_READ, VM_WRITE
from xipfs.mm.vma import Vma
from xipfs.stats.fault_log import FaultLog, told_comm
from xipfs.stats.item_log import ItemLog
from xipfs.stats.trace_items import Row, event_row, row
from xipfs.trace import events as ev
from xipfs.units import PAGE_SHIFT

_PROT: Final = ((VM_READ, 1), (VM_WRITE, 2), (VM_EXEC, 4))


class RecordedFilesystem(NamedFilesystem):
    """A filesystem that tells its ``recorder`` what changes placement."""

    recorder: Recorder | None = None

    def write(
        self, ino: int, offset: int, data: Buffer, *, origin: WriteOrigin = WriteOrigin.PROGRAM
    ) -> int:
        """Write; what the kernel sends because of our own invalidation is told here."""
        if self.recorder is not None:
            self.recorder.file(ino)
        written = super().write(ino, offset, data, origin=origin)
        if origin is WriteOrigin.WRITEBACK and self.recorder is not None:
            now_ns = time.monotonic_ns()
            self.recorder.request(now_ns, "write", 0, ino, offset, written, "move")
        return written

    def setattr(self, ino: int, *, size_bytes: int | None = None, **others: Any) -> Attr:
        """Change attributes; a new size is told."""
        attr = super().setattr(ino, size_bytes=size_bytes, **others)
        if self.recorder is not None and size_bytes is not None:
            self.recorder.changed("size", ino, size_bytes=size_bytes)
        return attr

    def set_default_kind(self, ino: int, kind: PageKind) -> None:
        """Set the kind of new pages."""
        super().set_default_kind(ino, kind)
        if self.recorder is not None:
            self.recorder.changed("kind", ino, pagecache=kind is PageKind.PAGECACHE)

    def fsync(self, ino: int, datasync: bool = False) -> None:
        """Write one file home."""
        super().fsync(ino, datasync)
        if self.recorder is not None:
            self.recorder.changed("sync", ino)

    def sync(self) -> None:
        """Write everything home."""
        super().sync()
        if self.recorder is not None:
            self.recorder.note("sync")

    def write_back(self, limit: int, *, older_ns: int = 0) -> int:
        """Write the longest dirty pages home."""
        count = super().write_back(limit, older_ns=older_ns)
        if self.recorder is not None and count:
            self.recorder.note("write_back", pages=limit, older_ns=older_ns)
        return count

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name, which may free the file."""
        super().unlink(parent, name)
        self._tell_gone()

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Rename, which may free the file that had the new name."""
        super().rename(parent, name, new_parent, new_name, flags)
        self._tell_gone()

    def drop(self, ino: int, count: int = 1) -> None:
        """Give references back, which may free the file."""
        super().drop(ino, count)
        self._tell_gone()

    def new_pages_cached(self, ino: int) -> bool:
        """Return whether pages written into holes of the file become pagecache pages."""
        return self._core.inode(ino).pagecache

    def resident_pages(self) -> list[tuple[int, int, bool]]:
        """Return (inode, page, dirty) of all pages in RAM, the coldest first."""
        return self._core.cache.by_age()

    def _tell_gone(self) -> None:
        if self.recorder is not None and self.recorder.cut:
            self.recorder.tell_gone()


class Recorder:
    """Fills the item log of one mount while somebody reads it; used from the trio thread."""

    def __init__(self, fs: RecordedFilesystem, accountant: Accountant, fault_log: FaultLog) -> None:
        self._fs = fs
        self._accountant = accountant
        self._fault_log = fault_log
        self.log = ItemLog()
        self._told: set[int] = set()
        #: Files that lost all their pages since somebody looked whether they are still there.
        self.cut: set[int] = set()
        #: Returns what a trace says of the policy.
        self.policy: Callable[[], dict[str, Any]] = dict
        #: Returns what the policy knows from before a trace begins.
        self.before: Callable[[], dict[str, int]] = dict
        fs.recorder = self

    @property
    def active(self) -> bool:
        """Whether anybody records."""
        return self.log.active

    def since(self, cursor: int, now_s: float) -> dict[str, Any]:
        """Answer a reader; one whose cursor is beyond the end is told the state of now first.

        Only that one is told: for those who read already nothing has begun.
        """
        if not self.log.active:
            self._told.clear()
            self.cut.clear()
        self.log.wake(now_s)
        self._accountant.on_event = self.event
        self._accountant.on_around = self.around
        if cursor <= self.log.next_number:
            return self.log.since(cursor, now_s)
        state = self._state()
        return self.log.first(state, self._fault_log.next_number)

    def rest(self, now_s: float) -> None:
        """Stop when no reader has come for long."""
        self.log.rest(now_s)
        if not self.log.active:
            self._accountant.on_event = self._accountant.on_around = None

    def note(self, item: str, **values: Any) -> None:
        """Add an item that is of no file."""
        if self.log.active:
            values.setdefault("time_ns", time.monotonic_ns())
            self._add(row(item, values))

    def _add(self, made: Row) -> None:
        self.log.add(self._fault_log.next_number, self._named(made))

    def _named(self, made: Row) -> Row:
        """Complete a row by the names that its file and its process have now."""
        if ino := made.get("ino"):
            made["path"] = self._fs.paths.of(ino)
        if pid := made.get("pid"):
            made["comm"] = told_comm(self._accountant.comm(pid))
        return made

    # What the observer tells

    def event(self, event: ev.Event, cause: str) -> None:
        """Add an observer's event."""
        if type(event) is ev.Map:
            self.file(event.ino)
        made = event_row(event)
        if made is not None:
            if cause:
                made["cause"] = cause
            self._add(made)

    def around(self, event: ev.Around, mapped: dict[int, int]) -> None:
        """Add a fault-around with the pages it mapped, by the kernel's states of them."""
        values = dict(zip(event._fields, event, strict=True))
        del values["first"]
        self._add(row("around", {**values, "page": event.first, **_told(mapped)}))

    # What requests do

    def file(self, ino: int) -> None:
        """Tell a file's state unless it was told: comes before whatever changes it."""
        if self.log.active and ino not in self._told and (made := self._file_row(ino)) is not None:
            self._told.add(ino)
            self._add(made)

    def _file_row(self, ino: int) -> Row | None:
        try:
            attr = self._fs.getattr(ino)
            runs = [
                [run.first, run.count, run.kind.value]
                for run in self._fs.runs(ino)
                if run.kind is not PageKind.HOLE
            ]
        except (FsError, ImageError):
            return None  # freed meanwhile, no regular file, or damaged
        values = {
            "time_ns": time.monotonic_ns(),
            "ino": ino,
            "size_bytes": attr.size_bytes,
            "pagecache": self._fs.new_pages_cached(ino),
            "runs": runs,
        }
        return row("file", values)

    def request(
        self, now_ns: int, item: str, pid: int, ino: int, offset: int, size: int, cause: str
    ) -> None:
        """Add a READ or WRITE that was served."""
        if self.log.active and size > 0:
            self.file(ino)
            values = {"time_ns": now_ns, "pid": pid, "ino": ino, "offset": offset, "size": size}
            self.note(item, **(values | {"cause": cause} if cause else values))

    def page_io(
        self, now_ns: int, pid: int, ino: int, offset: int, size: int, *, write: bool
    ) -> None:
        """Add a READ or WRITE of a program."""
        if self.log.active and size > 0:
            first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
            cause = "" if write else self._accountant.causes.of_read(ino, first, last)
            self.request(now_ns, "write" if write else "read", pid, ino, offset, size, cause)

    def changed(self, item: str, ino: int, **values: Any) -> None:
        """Add a change of a file that was told; of another, its state will say it."""
        self.cut.discard(ino)
        if ino in self._told:
            self.note(item, ino=ino, **values)

    def file_cut(self, ino: int, first: int) -> None:
        """Hear that a file loses its pages from ``first`` on."""
        if first == 0 and ino in self._told and self.log.active:
            self.cut.add(ino)

    def tell_gone(self) -> None:
        """Tell which of the files that lost all pages are freed."""
        cut, self.cut = self.cut, set()
        for ino in sorted(cut):
            try:
                self._fs.getattr(ino)
            except FsError as error:
                if error.errno != errno.ENOENT:
                    raise
                self._told.discard(ino)
                self.note("gone", ino=ino)

    def moved(self, now_ns: int, chunk: ChunkEvent, result: Moved) -> None:
        """Add a step of a migration that was carried out."""
        if not self.log.active:
            return
        self.note(
            "move",
            time_ns=now_ns,
            ino=chunk.ino,
            page=chunk.first,
            pages=chunk.last + 1 - chunk.first,
            to=chunk.to,
            by=_by(chunk),
            reason=chunk.reason,
            moved=runs_of(result.moved),
            refused={REASONS[code]: runs_of(which) for code, which in result.refused.items()},
        )

    def gave_up(self, chunk: ChunkEvent, pages: list[int], reason: str) -> None:
        """Add that pages of a chunk are not tried again, and why they do not move."""
        if self.log.active:
            values = {"ino": chunk.ino, "to": chunk.to, "by": _by(chunk), "reason": reason}
            self.note("give_up", **values, given=runs_of(pages))

    # The start

    def _state(self) -> list[Row]:
        """Return what a reader that begins now has to know, as rows."""
        now_ns = time.monotonic_ns()
        mms = self._accountant.mms
        resident = self._fs.resident_pages()
        mappings = [(number, vma) for number, mm in sorted(mms.items()) for vma in mm]
        maps = [_as_event(number, vma) for number, vma in mappings]
        known = {ino for ino, _, _ in resident} | {event.ino for event in maps}
        for ino in sorted(known):
            self.file(ino)  # new to those who read already, too
        files = [self._file_row(ino) for ino in sorted(self._told)]
        start = row(
            "start",
            {
                "time_ns": now_ns,
                "resident": [[ino, index, int(dirty)] for ino, index, dirty in resident],
                "faults": self._accountant.ledger.total.pgfault,
                "ptes": sum(
                    1 for _, vma in mappings
                    for _ in vma.mm.tables.populated(vma.start, vma.end)
                ),
                **self.before(),
            },
        )  # fmt: skip
        policy = row("policy", {"time_ns": now_ns, **self.policy()})
        told = [*files, start, policy]
        for (number, vma), event in zip(mappings, maps, strict=True):
            told += [event_row(event), self._mapped(now_ns, number, vma, event)]
        return [self._named(made) for made in told if made is not None]

    def _mapped(self, now_ns: int, number: int, vma: Vma, event: ev.Map) -> Row | None:
        """Return what the kernel has mapped there, as far as is known."""
        states = {
            vma.pgoff_of(address): state
            for address, state in self._accountant.kernel.populated(number, vma.start, vma.end)
        }
        pid = self._accountant.kernel.pids.get(number, 0)
        values = {"time_ns": now_ns, "mm": number, "pid": pid, "ino": event.ino}
        return row("mapped", values | _told(states)) if states else None


def _told(states: dict[int, int]) -> dict[str, Any]:
    """Return pages of a file, mapped as the kernel's states say, as members of a row."""
    return {
        "pages": len(states),
        "mapped": runs_of(sorted(page for page, state in states.items() if state < UNKNOWN)),
        "unsure": runs_of(sorted(page for page, state in states.items() if state >= UNKNOWN)),
    }


def _by(chunk: ChunkEvent) -> str:
    return "manual" if chunk.policy is None else "policy"


def runs_of(pages: list[int]) -> list[list[int]]:
    """Return sorted page numbers as [first, count] pairs.

    >>> runs_of([3, 4, 5, 9])
    [[3, 3], [9, 1]]
    """
    return [[first, count] for _, first, count in runs([(0, page) for page in pages])]


def _as_event(number: int, vma: Vma) -> ev.Map:
    """Return the event that a mapping which is there already would be told by."""
    assert vma.file is not None, vma
    assert isinstance(vma.file.name, int), vma
    prot = sum(bit for flag, bit in _PROT if vma.flags & flag)
    return ev.Map(
        0, number, 0, vma.start, vma.end, vma.file.name, vma.pgoff, prot,
        shared=bool(vma.flags & VM_MAYSHARE), prot_known=True, fresh=False,
    )  # fmt: skip
