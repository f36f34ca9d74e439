"""The machine a command file runs on: processes, objects, and labels of mappings."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from xipfs.errors import XipfsError
from xipfs.mm.gup import LIVELOCK, put_user_pages
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.oracle.frames import Frames
from xipfs.mm.oracle.fsdax import FsdaxFile
from xipfs.mm.oracle.objects import Device, RecordedObject, VmOpsCalls
from xipfs.mm.oracle.pagecache import CramfsFile, TmpfsFile
from xipfs.mm.pte import PTE_PRESENT, pte_pfn
from xipfs.mm.quirks import NAMES, STALE_HOST_MAPPING
from xipfs.mm.remote import Pipe
from xipfs.mm.rules import Rules
from xipfs.units import PAGE_SHIFT

Json = dict[str, Any]

#: User Mode Linux has no soft-dirty bits, and its kernel cannot map device memory for itself.
_UM: Final = "um"


class RecordedMachine(Machine):
    """A machine whose anonymous pages have identities: a frame that is reused is a new page."""

    def __init__(self, frames: Frames, rules: Rules, header: Json) -> None:
        super().__init__(
            frames.memory,
            rules,
            track_data=True,
            zero_pfn=frames.zero,
            devmap_pfns=frozenset(frames.devmap),
            thp=header["thp"],
            ksm=header["ksm"],
            soft_dirty=header["arch"] != _UM,
            swap_on=header["swap"],
            quirks=NAMES.intersection(header["quirks"]),
        )
        self._identities: dict[int, int] = {}
        self._allocated = 0

    def alloc_page(self) -> int:
        """Return a fresh frame with an identity of its own."""
        pfn = super().alloc_page()
        self._allocated += 1
        self._identities[pfn] = self._allocated
        return pfn

    def identity(self, pfn: int) -> int:
        """Return the identity of an anonymous page."""
        return self._identities[pfn]


class UnansweredError(XipfsError):
    """One step cannot be run; those after it can."""


def errno_name(number: int) -> str:
    """Return the name of a negative errno, or LIVELOCK for a call that never returns (G2)."""
    return "LIVELOCK" if number == LIVELOCK else errno.errorcode[-number]


@dataclass
class Mapping:
    """Where a label points: pages are counted from ``start``; ``pages`` is how many were ever."""

    start: int
    pages: int

    @property
    def end(self) -> int:
        """The address after the last page."""
        return self.start + (self.pages << PAGE_SHIFT)

    def at(self, page: int, offset: int = 0) -> int:
        """Return the address of a byte of page ``page``."""
        return self.start + (page << PAGE_SHIFT) + offset


@dataclass
class Process:
    """One ``who``: its address space and the labels it knows."""

    mm: MmStruct
    labels: dict[str, Mapping] = field(default_factory=dict)
    #: Pages that the host of a User Mode Linux still maps though the VMA is gone: address to pfn.
    stale: dict[int, int] = field(default_factory=dict)

    def mapping(self, label: str) -> Mapping:
        """Return where ``label`` points; UnansweredError if this process has no such mapping."""
        if label not in self.labels:
            raise UnansweredError(f"no mapping {label!r} in this process")
        return self.labels[label]


class Bench:
    """What a header describes, made. ``rules`` replaces the era and the bit that it names."""

    def __init__(self, header: Json, rules: Rules | None = None) -> None:
        self.header = header
        if rules is None:
            rules = Rules(pte_special=header["pte_special"], debug_vm=header["debug_vm"])
        self.frames = Frames(header)
        self.machine = RecordedMachine(self.frames, rules, header)
        assert self.machine.data is not None
        self.data = self.machine.data
        for pfn, content in self.frames.data():
            self.data.of(pfn)[: len(content)] = content
        self.calls = VmOpsCalls()
        self.pipe = Pipe(self.machine)
        #: Pages that ``hold`` took: for whom, which, and whether by FOLL_PIN.
        self.holding: list[tuple[MmStruct, int, bool]] = []
        self.objects: dict[str, RecordedObject] = {}
        for name, description in header["objects"].items():
            make = _KINDS.get(description["kind"])
            if make is not None:
                self.objects[name] = make(self, name, description)
        #: Files behind shared anonymous mappings.
        self.nameless: list[RecordedObject] = []
        first = header["processes"][0]
        self.processes = {first: Process(MmStruct(self.machine, first))}

    def object(self, name: str) -> RecordedObject:
        """Return the object ``name``; UnansweredError if its kind is not known."""
        if name not in self.objects:
            raise UnansweredError(f"object {name!r} does not exist or is of no known kind")
        return self.objects[name]

    def anonymous_file(self, pages: int) -> RecordedObject:
        """Return the nameless shared-memory file behind a shared anonymous mapping."""
        description = {"kind": "tmpfs-file", "pages": pages, "cached": [False] * pages}
        # Shared memory has an fsync that does nothing (noop_fsync), so msync succeeds.
        description["fsync"] = True
        file = TmpfsFile("shared anonymous", description, self.machine, self.frames)
        self.nameless.append(file)
        return file

    def holders(self) -> dict[int, int]:
        """Return the references that drivers and page caches hold, by pfn (rule T1)."""
        held = dict(self.frames.held)
        for thing in [*self.objects.values(), *self.nameless]:
            if isinstance(thing, CramfsFile | TmpfsFile):
                held.update(dict.fromkeys(thing.cache.values(), 1))
        return held

    def release_held(self) -> None:
        """Let go of the page that ``hold`` took first."""
        mm, pfn, pin = self.holding.pop(0)
        put_user_pages(mm, [pfn], pin=pin)

    def page_name(self, pfn: int) -> str:
        """Return a page's name as observations give it."""
        known = self.frames.name(pfn)
        return known if known is not None else f"anon:{self.machine.identity(pfn)}"

    def text(self, pfn: int, offset: int, count: int) -> str:
        """Return bytes of a page as text, up to the first zero byte."""
        content = bytes(self.data.of(pfn)[offset : offset + count])
        return content.split(b"\0", 1)[0].decode("latin-1")

    def fork(self, parent: Process, child: str, mm: MmStruct) -> None:
        """Enter a child; with the quirk, what the host still maps for it."""
        labels = {name: Mapping(m.start, m.pages) for name, m in parent.labels.items()}
        made = Process(mm, labels)
        if STALE_HOST_MAPPING in self.machine.quirks:
            for vma in parent.mm:
                if mm.find_vma(vma.start) is None:
                    for address, pte in parent.mm.tables.populated(vma.start, vma.end):
                        if pte & PTE_PRESENT:
                            made.stale[address] = pte_pfn(pte)
        self.processes[child] = made


def _device(bench: Bench, name: str, description: Json) -> RecordedObject:
    can_access = bench.header["arch"] != _UM
    return Device(
        name, description, bench.machine, bench.frames, bench.calls, can_access=can_access
    )


def _file(
    kind: type[CramfsFile] | type[TmpfsFile] | type[FsdaxFile],
) -> Callable[[Bench, str, Json], RecordedObject]:
    def make(bench: Bench, name: str, description: Json) -> RecordedObject:
        return kind(name, description, bench.machine, bench.frames)

    return make


_KINDS: Final[dict[str, Callable[[Bench, str, Json], RecordedObject]]] = {
    "device": _device,
    "memory-device": _device,
    "cramfs-file": _file(CramfsFile),
    "tmpfs-file": _file(TmpfsFile),
    "fsdax-file": _file(FsdaxFile),
}
