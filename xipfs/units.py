"""Page size, the types of the numbers that are easily confused, and parsing of sizes and ranges.

Everything in xipfs is counted in 4 KiB pages, as on the kernels whose behaviour is recorded.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from xipfs.errors import UsageError

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = ~(PAGE_SIZE - 1)

#: x86-64 SPARSEMEM: struct pages come and go in sections of this many bytes (rule P2).
SECTION_SIZE: Final = 128 << 20
PAGES_PER_SECTION: Final = SECTION_SIZE >> PAGE_SHIFT

Pfn = NewType("Pfn", int)
"""Physical page frame number."""
PageIndex = NewType("PageIndex", int)
"""Page number within a file (the kernel's pgoff_t)."""
Vaddr = NewType("Vaddr", int)
"""Virtual address in bytes."""
Ino = NewType("Ino", int)
"""Inode number; on a mount it is also the FUSE node id, hence tracefs' ``i_ino``."""

_SUFFIX: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE_RE: Final = re.compile(r"(\d+)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
#: Of a page number: files of 2**63 bytes, the largest that there can be, have fewer pages.
_DIGITS_MAX: Final = 16
_RANGE_RE: Final = re.compile(r"(\d+)(?:-(\d+))?")


def parse_size(text: str) -> int:
    """Return the number of bytes in ``text``: digits and an optional K, M, G, T or P (1024-based).

    >>> parse_size("256M")
    268435456
    >>> parse_size("4096")
    4096
    """
    match = _SIZE_RE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"size {text!r} is not a number of bytes",
            expected="digits and an optional K, M, G, T or P, as in 256M",
        )
    return int(match[1]) * _SUFFIX[match[2].upper()]


def parse_page_range(text: str) -> range:
    """Return the pages of ``A-B`` (both included) or of the single page ``A``.

    >>> parse_page_range("3-5")
    range(3, 6)
    """
    match = _RANGE_RE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"page range {text!r} is not valid", expected="A-B or A, as in 0-15")
    if max(len(number) for number in match.groups("")) > _DIGITS_MAX:
        raise UsageError(f"page range {text!r} lies beyond any file", expected="A-B, as in 0-15")
    first = int(match[1])
    last = int(match[2]) if match[2] is not None else first
    if last < first:
        raise UsageError(f"page range {text!r} runs backwards", expected="A-B with A <= B")
    return range(first, last + 1)


def parse_page_ranges(text: str) -> list[range]:
    """Return the pages of a comma-separated list of ranges, each page once, in order.

    >>> parse_page_ranges("3-5,0,4-7,8")
    [range(0, 1), range(3, 9)]
    """
    merged: list[range] = []
    for pages in sorted(map(parse_page_range, text.split(",")), key=lambda pages: pages.start):
        if merged and pages.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, pages.stop))
        else:
            merged.append(pages)
    return merged


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` with the largest 1024-based unit that leaves a number of 1 or more.

    >>> format_size(268435456)
    '256 MiB'
    >>> format_size(1536)
    '1.5 KiB'
    """
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} PiB"


def format_ns(time_ns: int) -> str:
    """Return ``time_ns`` in the largest unit up to seconds that leaves a number of 1 or more.

    >>> format_ns(5909)
    '5.909 us'
    >>> format_ns(0)
    '0 ns'
    """
    value = float(time_ns)
    for unit in ("ns", "us", "ms"):
        # What rounds to 1000 is 1 of the next unit.
        if abs(value) < 999.95:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} s" if abs(value) < 9999.5 else f"{value:.0f} s"


def pages_of(size_bytes: int) -> int:
    """Return how many pages hold ``size_bytes`` bytes (rounded up)."""
    return (size_bytes + PAGE_SIZE - 1) >> PAGE_SHIFT
