"""What leaves this part: the mount's faults and the life of the mappings they fall into.

Named tuples, since a busy mount makes a hundred thousand a second. Addresses are bytes and
multiples of the page size except a Fault's; ``end`` is the first byte after;
``first``/``last``/``index`` count pages within the file, ``last`` included. ``time_ns`` is
CLOCK_MONOTONIC.

``mm`` names one address space for its whole life: threads (CLONE_VM) share it, fork and exec make a
new one, and no number is used again, so a recycled pid cannot be taken for the process before it.

A list of events is in the order in which they took effect. A fault takes effect when its last
record was written, not when the trap came, so its ``time_ns`` can lie before that of the event it
follows. A mapping is told (``Map``) right before the first fault that falls into it: until then it
holds no PTE and nothing can be said about it; one that is never touched is never told.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# How the kernel ended a fault.
MAJOR: Final = "major"
MINOR: Final = "minor"
SIGBUS: Final = "sigbus"
SIGSEGV: Final = "sigsegv"

# Where a fault came from.
TRAP: Final = "trap"
"""A page-fault exception, in user mode or in the kernel for a program's address."""
POPULATE: Final = "populate"
"""Taken by the kernel inside mmap(MAP_POPULATE), mlock or MADV_POPULATE: no exception."""
GUP: Final = "gup"
"""Taken by the kernel elsewhere, on a range we do not see (O_DIRECT, vmsplice): no exception."""
UNTRACED: Final = "untraced"
"""Of a process not traced yet, seen through its page-cache events only: access unknown."""

# Why an address space is in doubt.
COPIED: Final = "copied"
FOREIGN: Final = "foreign"
AMBIGUOUS: Final = "ambiguous"
CROSSED: Final = "crossed"


class Map(NamedTuple):
    """``[start, end)`` of ``mm`` maps file ``ino`` from page ``pgoff`` on."""

    time_ns: int
    mm: int
    pid: int
    start: int
    end: int
    ino: int
    pgoff: int
    prot: int
    """PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4."""
    shared: bool
    prot_known: bool
    """False for a mapping made by exec: ``prot`` is then what its faults have needed so far."""
    fresh: bool = True
    """False for one read from /proc: it may hold PTEs from before it was told."""


class Unmap(NamedTuple):
    """Nothing of ``[start, end)`` is mapped any more; the range covers mappings told before."""

    time_ns: int
    mm: int
    start: int
    end: int


class Protect(NamedTuple):
    """``[start, end)``, part of one mapping, has new protection bits."""

    time_ns: int
    mm: int
    start: int
    end: int
    prot: int


class Move(NamedTuple):
    """mremap: the mapping's part ``[start, end)`` is now ``[new_start, new_end)``, with its PTEs.

    The new range may be longer (its rest holds no PTE) and may start where the old one does. With
    ``keep_old`` (MREMAP_DONTUNMAP) the old range stays mapped, without PTEs.
    """

    time_ns: int
    mm: int
    start: int
    end: int
    new_start: int
    new_end: int
    keep_old: bool


class Zap(NamedTuple):
    """madvise dropped the PTEs of ``[start, end)``; the mapping stays."""

    time_ns: int
    mm: int
    start: int
    end: int


class Doubt(NamedTuple):
    """A call may have changed PTEs of ``[start, end)`` without telling which."""

    time_ns: int
    mm: int
    start: int
    end: int
    calls_unseen: bool = False
    """The process makes system calls that are not seen, now and later (it is a 32-bit program)."""


class Cloud(NamedTuple):
    """What was believed of ``mm`` is not sure any more; no event tells of which page."""

    time_ns: int
    mm: int
    why: str
    """COPIED: private mappings may have copies where file pages were. FOREIGN: another process
    faulted pages in or copied them. AMBIGUOUS: a page was faulted in without an exception that
    would tell which of the mappings of its file it is in. CROSSED: one was taken away that a fault
    had mapped before, or mapped after."""


class Reclaim(NamedTuple):
    """The kernel reclaimed memory: any file page may have been unmapped, of any address space."""

    time_ns: int


class Extent(NamedTuple):
    """``[start, end)`` is one VMA of the kernel's, as merged or split as it may be.

    Told of mappings that were told: with them, and whenever it changes.
    """

    time_ns: int
    mm: int
    start: int
    end: int


class Split(NamedTuple):
    """A call that sets a flag of mappings (madvise, mlock) cut them at ``start`` and ``end``."""

    time_ns: int
    mm: int
    start: int
    end: int


class Registered(NamedTuple):
    """A program's preloaded library has registered its mappings: no fault-around from here on."""

    time_ns: int
    mm: int
    pid: int


class CowBroken(NamedTuple):
    """A call has faulted all of ``[start, end)`` in for writing, mapped or not: all are copies.

    Of pages that were mapped for reading nothing else tells (populate_vma_page_range, 6.18).
    """

    time_ns: int
    mm: int
    pid: int
    tid: int
    start: int
    end: int


class Fork(NamedTuple):
    """``child_mm`` is a copy of ``mm``: the mappings told so far, less the ones in ``dontfork``."""

    time_ns: int
    mm: int
    child_mm: int
    pid: int
    child_pid: int
    dontfork: tuple[tuple[int, int], ...]
    """Ranges (start, end) marked MADV_DONTFORK: the child has no such mappings."""


class ThreadExit(NamedTuple):
    """Thread ``tid`` left ``mm``, where others go on."""

    time_ns: int
    mm: int
    tid: int


class Exit(NamedTuple):
    """The last user of ``mm`` left it, by exit or exec: all its mappings are gone."""

    time_ns: int
    mm: int


class Fault(NamedTuple):
    """One page fault on a page of the mount, counted once however often the kernel retried it."""

    time_ns: int
    mm: int
    pid: int
    tid: int
    address: int
    """The faulting address in bytes; where ``origin`` is not TRAP, the page's."""
    ino: int
    index: int  # type: ignore[assignment]  # the kernel's name for it; hides tuple.index
    write: bool
    execute: bool
    user: bool
    """False: the kernel faulted on the program's behalf. UNTRACED: taken for the program's own."""
    protection: bool
    """The page was mapped, but not for this access (COW or first write to a shared page)."""
    verdict: str
    """MAJOR, MINOR, SIGBUS or SIGSEGV."""
    origin: str
    """TRAP, POPULATE, GUP or UNTRACED."""


class Around(NamedTuple):
    """The kernel tried to map cached pages ``first..last`` of ``ino``, for the fault told before.

    It maps those that are cached, uptodate, unlocked and not yet mapped; page ``first`` would lie
    at ``address``.
    """

    time_ns: int
    mm: int
    pid: int
    address: int
    ino: int
    first: int
    last: int


class CacheAdd(NamedTuple):
    """The kernel's page cache took in ``pages`` pages of ``ino`` from ``first`` on."""

    time_ns: int
    ino: int
    first: int
    pages: int


class CacheDelete(NamedTuple):
    """The kernel's page cache dropped ``pages`` pages of ``ino`` from ``first`` on."""

    time_ns: int
    ino: int
    first: int
    pages: int


class Lost(NamedTuple):
    """``records`` records were overwritten before they were read: what follows may lack faults."""

    time_ns: int
    records: int


class Unplaced(NamedTuple):
    """An access ended in SIGBUS, past the end of a file that nothing names any more.

    Its process was gone before its maps were read. ``first`` is the page of that file.
    """

    time_ns: int
    mm: int
    pid: int
    tid: int
    address: int
    first: int
    access: str
    """read, write or exec"""
    mode: str
    """user or kernel"""


class Incomplete(NamedTuple):
    """Records were lost while ``mm`` lived: faults of it, or what they came to, may be missing."""

    time_ns: int
    mm: int
    pid: int


Event = (
    Map
    | Unmap
    | Protect
    | Move
    | Zap
    | Doubt
    | Registered
    | CowBroken
    | Split
    | Extent
    | Cloud
    | Reclaim
    | Fork
    | Exit
    | ThreadExit
    | Fault
    | Around
    | CacheAdd
    | CacheDelete
    | Lost
    | Unplaced
    | Incomplete
)
