"""What the kernel maps beside a faulting page, as the model has it: cached pages, no fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipfs.accounting.kernel_states import FILE, UNKNOWN
from xipfs.mm.fault import filemap_map_pages
from xipfs.mm.flags import VM_MAYSHARE
from xipfs.mm.vma import Vma
from xipfs.trace import events as ev
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from xipfs.accounting.accountant import Accountant

BLIND_WINDOWS: Final = "fault-around windows over XIP or evicted pages"


def map_around(books: Accountant, event: ev.Around) -> dict[int, int]:
    """Map what the kernel mapped without a fault of its own: cached pages only (rule F22).

    Return those pages of the file with what the kernel has there now (``kernel_states``).

    XIP pages are in no page cache of the modelled kernel, so its fault-around passes them by
    (rule F23); their next touch, which the real kernel lets through, is not seen.
    """
    mm = books.mm(event.mm)
    end = event.address + (event.last - event.first + 1 << PAGE_SHIFT)
    mapped: dict[int, int] = {}
    for vma in mm.overlapping(event.address, end):
        if vma.file is not None and vma.file.name == event.ino:
            mapped |= _around_in(books, vma, event)
    return mapped


def _around_in(books: Accountant, vma: Vma, event: ev.Around) -> dict[int, int]:
    fresh = _fresh_pages(books, event)
    mapped = books.kernel.around(event, vma)
    shared = bool(vma.flags & VM_MAYSHARE)
    unsure = sum(state >= UNKNOWN for state in mapped.values())
    books.runs.around(event.mm, event.pid, len(mapped), shared=shared, unsure=unsure)
    first = max(event.first, vma.pgoff)
    window = range(first, min(event.last + 1, vma.pgoff + vma.pages))
    cached = [page for page in window if books.kernel.is_cached(event.ino, page)]
    frames = [(page, books.fs.resident_pfn(event.ino, page)) for page in cached]
    books.around_pages += filemap_map_pages(
        vma, [(page, pfn) for page, pfn in frames if pfn is not None]
    )
    # Mapped without a fault, so none will answer a hint or a move. Where that is not sure marks
    # stay: of two processes that miss a page one reads it, and the other's fault-around may pass it
    # by. (If it was mapped all the same, its mark goes with the next fault, which finds no PTE.)
    for page in mapped:
        if mapped[page] == FILE and page not in fresh:
            address = vma.address_of(page)
            books.hints.forget(event.mm, [address])
            books.causes.forget(event.mm, address, address + PAGE_SIZE)
    tables = vma.mm.tables
    if any(not tables.get(vma.address_of(page)) for page, pfn in frames if pfn is None):
        books.unfollowed[BLIND_WINDOWS] += 1
    return mapped


def _fresh_pages(books: Accountant, event: ev.Around) -> set[int]:
    """Return the pages tried that may be locked for their READ, if any mark can depend on it."""
    if not books.hints.marked_pages(event.mm) and not books.causes.marked_pages(event.mm):
        return set()
    cached, pages = books.kernel.cached, range(event.first, event.last + 1)
    return {page for page in pages if cached.is_fresh(event.ino, page, event.time_ns)}
