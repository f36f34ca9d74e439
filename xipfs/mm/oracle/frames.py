"""The header's physical pages as frames of one PhysicalMemory, and their names back.

``region:number`` names a frame; consecutive numbers of a region are consecutive pfns. A region
whose frames have struct pages lies in RAM, any other in the NVRAM. The first pfns stay unused, so
that no pfn can be mistaken for a file offset where a VMA's pgoff may be either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from xipfs.memory.frames import PG_RESERVED, PhysicalMemory

#: pfns below this are no frames of a recording; file offsets are far below.
_UNUSED_PFNS: Final = 1 << 13
_RAM_PAGES: Final = 1 << 15
#: Every NVRAM region has this many pfns to itself.
_NVRAM_REGION_PAGES: Final = 1 << 16

Json = dict[str, Any]


def split_name(name: str) -> tuple[str, int]:
    """Return region and number of a frame's name.

    >>> split_name("own:7")
    ('own', 7)
    """
    region, _, number = name.partition(":")
    return region, int(number)


class Frames:
    """Names to pfns and back, for one header. ``memory`` holds the frames; ``zero`` is a pfn."""

    def __init__(self, header: Json) -> None:
        described: dict[str, Json] = header["frames"]
        self.memory = PhysicalMemory(
            ram_pages=_RAM_PAGES,
            nvram_pages=16 * _NVRAM_REGION_PAGES,
            # One more than asked for: the zero page is taken from them.
            anon_pages=header.get("anon_pages", _RAM_PAGES) + 1,
        )
        for _ in range(_UNUSED_PFNS):
            # Taken and held by nobody: never handed out, never counted.
            self.memory.ref[self.memory.alloc_ram()] = 0
        self._names: dict[int, str] = {}
        self._bases: dict[str, int] = {}
        self._described = described
        self.zero = self.memory.alloc_anon()
        self.memory.flags[self.zero] = PG_RESERVED
        self._names[self.zero] = "zero"
        self.devmap: set[int] = set()
        #: Frames that are in nobody's page table and cache but are held: pfn to references.
        self.held: dict[int, int] = {self.zero: 1}
        highest: dict[str, int] = {}
        for name in _mentioned(header):
            region, number = split_name(name)
            highest[region] = max(highest.get(region, 0), number)
        for region, last in sorted(highest.items()):
            self._make_region(region, last)
        for name, frame in described.items():
            self._describe(name, frame)

    def _make_region(self, region: str, last: int) -> None:
        frames = [frame for name, frame in self._described.items() if name.startswith(f"{region}:")]
        if region != "own" and not any(frame["struct_page"] for frame in frames):
            used = sum(base >= self.memory.nvram_base_pfn for base in self._bases.values())
            base = int(self.memory.nvram_pfn(used * _NVRAM_REGION_PAGES))
            self._bases[region] = base
            return
        pfns = [int(self.memory.alloc_ram()) for _ in range(last + 1)]
        assert pfns == list(range(pfns[0], pfns[0] + last + 1)), "frames of a region adjoin"
        self._bases[region] = pfns[0]
        for number, pfn in enumerate(pfns):
            self._names[pfn] = f"{region}:{number}"
            self.held[pfn] = 1

    def _describe(self, name: str, frame: Json) -> None:
        pfn = self.pfn(name)
        if not self.memory.pfn_valid(pfn):
            return
        references = frame.get("refcount", 1)
        self.memory.ref[pfn] = self.held[pfn] = references
        if frame.get("reserved"):
            self.memory.flags[pfn] |= PG_RESERVED
        if frame.get("devmap"):
            self.devmap.add(pfn)

    def data(self) -> Iterator[tuple[int, bytes]]:
        """Yield (pfn, first bytes) of the frames whose content the header gives."""
        for name, frame in self._described.items():
            if frame.get("data"):
                yield self.pfn(name), frame["data"].encode("latin-1")

    def pfn(self, name: str) -> int:
        """Return the pfn of the frame ``name``; KeyError if its region does not exist."""
        if name == "zero":
            return self.zero
        region, number = split_name(name)
        return self._bases[region] + number

    def has(self, name: str) -> bool:
        """Whether the header knows the region of the frame ``name``."""
        return name == "zero" or split_name(name)[0] in self._bases

    def name(self, pfn: int) -> str | None:
        """Return the name of a frame of the header, or of one that ``call`` named."""
        known = self._names.get(pfn)
        if known is not None or self.memory.pfn_valid(pfn):
            return known
        for region, base in self._bases.items():
            if base <= pfn < base + _NVRAM_REGION_PAGES and not self.memory.pfn_valid(base):
                return f"{region}:{pfn - base}"
        return None

    def call(self, pfn: int, name: str) -> None:
        """Name a frame that was allocated later (page cache)."""
        self._names[pfn] = name

    def is_online(self, pfn: int) -> bool:
        """Whether /proc/kpageflags finds a page: ordinary RAM, and the zero page."""
        if not self.memory.pfn_valid(pfn) or pfn in self.devmap:
            return False
        return pfn == self.zero or not self.memory.flags[pfn] & PG_RESERVED


def _mentioned(header: Json) -> Iterator[str]:
    """Every frame name of the header but the zero page's, ends of ranges included."""
    for name in header["frames"]:
        if name != "zero":
            yield name
    for thing in header["objects"].values():
        for name in [*(thing.get("frame") or []), *thing.get("device_pages", [])]:
            if name is not None and name != "zero":
                yield name
        if thing.get("migratable"):
            yield from (f"{region}:{thing['pages'] - 1}" for region in ("own", "xip"))
        calls = thing.get("at_mmap")
        for call in calls if isinstance(calls, list) else []:
            if call.get("frame") not in (None, "zero"):
                region, number = split_name(call["frame"])
                yield f"{region}:{number + call.get('pages', 1) - 1}"
