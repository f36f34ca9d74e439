"""Verification on a live mount: look at /proc and at the events until both are of one moment.

A look is good if no event of that address space lies between the drain before it and the drain
after it, and no thread is inside a fault, or a call that changes mappings, at the second: the
kernel is at work on its page tables, and what it did is known when it returns. (What ended in
between has made an event, what began later has changed nothing that was read.) A program that never
stands still for a look is told as unknown, not guessed. So is one whose file is just being
invalidated, by us or by a thread that acts on an answer of ours (see ``replies``). Looks wait for
mmap locks: they are taken in a worker thread (see ``trace.pagemap``).

In the background, address spaces in which pages became unknown are looked at in the order in which
they did, ten a second: the repair queue. And one a second is compared whole, in turn. What that
finds wrong was wrong silently; it is counted, put right, and shown as ``observer.audit``.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from xipfs.accounting import verify
from xipfs.accounting.verify import Comparison, Look
from xipfs.fuse.observing import TracefsObserver
from xipfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from xipfs.fuse.live import Live

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 5
#: Until the next attempt when one was in vain: a fault or a call was under way, or pages came and
#: went. Twice as long each time.
_PAUSE_S: Final = 0.01
_REPAIR_INTERVAL_S: Final = 0.1
_AUDIT_INTERVAL_S: Final = 1.0
#: A larger address space is left to ``xipfs verify``: 32 MiB of pagemap a second are enough.
_AUDIT_PAGES_MAX: Final = 4 << 20
RESTLESS: Final = "its process never stood still"
BUSY: Final = "its process was inside a fault or a call that changes mappings at each look"
INVALIDATED: Final = "pages of its files were being invalidated or cut off at each look"
UNTOLD: Final = "in a mapping that made no fault since it was found"


@dataclass
class AuditFigures:
    """What was done in the background so far, in pages; ``pages_differed`` is expected to stay 0.

    ``pages_repaired``: unknown ones, read by the repair queue; ``pages_learned``, by the audit.
    ``restless``: looks in vain, since the process did not stand still.
    """

    address_spaces: int = 0
    pages_compared: int = 0
    pages_differed: int = 0
    pages_learned: int = 0
    pages_repaired: int = 0
    restless: int = 0
    too_large: int = 0


class Verifier:
    """Compares the columns of one mount; used from the trio thread."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._books = live.accountant
        self._last_audited = 0
        self.audited = AuditFigures()

    # One look

    async def _look(
        self, numbers: list[int], *, unknown_only: bool = False
    ) -> tuple[dict[int, Look], dict[int, str], bool]:
        """Return good looks, why there is none of the others that live, and whether none moved."""
        books, replies = self._books, self._live.replies
        replies.forget_unmapped()
        serials, askers = Counter(replies.serials), replies.askers()
        # What was being dropped until now is dropped before the look, or may be at any time.
        over = await trio.to_thread.run_sync(replies.over, askers)
        dropped = replies.unfinished(askers, over)
        await self._live.drain_settled()
        before = Counter(books.kernel.changes)
        wanted = {}
        for number in numbers:
            if number in books.kernel.pids and number in books.mms:
                ranges = verify.mappings(books.mms[number])
                if unknown_only:
                    ranges = verify.unknown_ranges(books, number)
                wanted[number] = (books.kernel.pids[number], ranges)
        dev = None if unknown_only else self._live.mount.dev

        def read() -> dict[int, Look | None]:
            return {n: verify.look_at(pid, dev, ranges) for n, (pid, ranges) in wanted.items()}

        looks = await trio.to_thread.run_sync(read)
        # What has ended by now has made its records, and the drain reads them.
        dropped |= self._live.notifier.in_flight()
        await self._live.drain_settled()
        dropped |= {ino for ino, serial in replies.serials.items() if serial != serials[ino]}
        still = before == books.kernel.changes
        alive = {number for number in wanted if number in books.kernel.pids}
        changing = self._changing()
        good: dict[int, Look] = {}
        moved: dict[int, str] = {}
        for number in alive:
            look = looks[number]
            if number in changing:
                moved[number] = BUSY
            elif books.maps_any(number, dropped):
                moved[number] = INVALIDATED
            elif look is None or books.kernel.changes[number] != before[number]:
                moved[number] = RESTLESS
            else:
                good[number] = look
        return good, moved, still and not changing

    def _changing(self) -> frozenset[int]:
        observer = self._live.observer
        return observer.changing() if isinstance(observer, TracefsObserver) else frozenset()

    # On request

    async def verify(self, pid: int | None) -> dict[str, Any]:
        """Compare every living address space, or that of ``pid``; return the JSON of the verb."""
        books = self._books
        results: dict[int, Comparison] = {}
        rss: dict[int, int] = {}
        counts: tuple[int, int] | None = None
        copies, broken = (0, 0), ""
        await self._live.drain_settled()
        for number in list(books.kernel.clouds):
            # The repair queue may be long; what it has whole address spaces in comes first here.
            if pid is None or books.kernel.pids.get(number) == pid:
                await self._repair(number)
        for attempt in range(_ATTEMPTS):
            numbers = [n for n, own in books.kernel.pids.items() if pid is None or own == pid]
            looks, restless, still = await self._look(numbers)
            # With no await until the end of the round: all of it is of one moment.
            fresh = {number: verify.compare(books, number, look) for number, look in looks.items()}
            for number, result in fresh.items():
                # Each round learns: what it found would be gone if the next one were told instead.
                earlier = results.get(number)
                if earlier is None or not (earlier.pages_differ or earlier.pages_unknown):
                    results[number] = result
                    rss[number] = looks[number].rss_pages
            unknown = any(
                result.pages_unknown or looks[number].rss_pages != result.resident_pages
                for number, result in fresh.items()
            )
            whole = pid is None and still and len(fresh) == len(books.kernel.pids)
            if whole and not unknown:
                counts = verify.compare_mapcounts(list(fresh.values()), list(looks.values()))
            if not copies[1]:
                copies = verify.recount(books, [n for n in results if n in books.mms])
            broken = broken or books.check()
            for number, result in fresh.items():
                verify.learn(books, number, result)
            if whole or (pid is not None and not restless):
                break
            if restless:
                await trio.sleep(_PAUSE_S * 2**attempt)
        return self._answer(results, rss, restless, counts, copies, broken)

    def _answer(
        self,
        results: dict[int, Comparison],
        rss: dict[int, int],
        restless: dict[int, str],
        counts: tuple[int, int] | None,
        copies: tuple[int, int],
        broken: str,
    ) -> dict[str, Any]:
        books = self._books
        unknown: Counter[str] = Counter()
        for number in restless.keys() & books.mms.keys() - results.keys():
            mapped = verify.mappings(books.mms[number])
            unknown[restless[number]] += sum(end - start >> PAGE_SHIFT for start, end in mapped)
        processes = []
        for number, result in results.items():
            if rss[number] > result.resident_pages:
                result.pages_unknown[UNTOLD] += rss[number] - result.resident_pages
            unknown += result.pages_unknown
            processes.append(
                {
                    "pid": result.pid,
                    "comm": self._live.observer.comm(result.pid),
                    "pages_compared": result.pages_compared,
                    "pages_differ": result.pages_differ,
                    "pages_unknown": dict(result.pages_unknown),
                    "pages_resident": result.resident_pages,
                    "rss_pages_smaps": rss[number],
                    "differences": result.differences,
                    "incomplete": number in books.ledger.incomplete,
                }
            )
        return {
            "pages_compared": sum(result.pages_compared for result in results.values()),
            "pages_differ": sum(result.pages_differ for result in results.values()),
            "pages_unknown": dict(unknown),
            "mapcounts_compared": None if counts is None else counts[0],
            "mapcounts_differ": None if counts is None else counts[1],
            "copies_compared": copies[0],
            "copies_differ": copies[1],
            "invariants_broken": broken,
            "audit": asdict(self.audited),
            "processes": processes,
        }

    # In the background

    async def watch_forever(self) -> None:
        """Repair what became unknown, and compare one address space a second, in turn."""
        audit_at = trio.current_time() + _AUDIT_INTERVAL_S
        while isinstance(self._live.observer, TracefsObserver):
            await trio.sleep(_REPAIR_INTERVAL_S)
            number = next(iter(self._books.kernel.doubtful), None)
            if number is not None:
                await self._repair(number)
            if trio.current_time() >= audit_at:
                audit_at = trio.current_time() + _AUDIT_INTERVAL_S
                await self._audit_next()

    async def _repair(self, number: int) -> None:
        """Read the pages of one address space of which nothing is known."""
        books = self._books
        books.kernel.doubtful.pop(number, None)
        try:
            looks, moved, _ = await self._look([number], unknown_only=True)
        except Exception:
            books.kernel.doubtful[number] = None  # behind the others
            raise
        if number in moved:
            books.kernel.doubtful[number] = None
            self.audited.restless += 1
        for look in looks.values():
            result = verify.compare(books, number, look)
            self.audited.pages_repaired += sum(result.pages_unknown.values())
            self.audited.pages_differed += result.pages_differ
            verify.learn(books, number, result)

    async def _audit_next(self) -> None:
        numbers = sorted(self._books.kernel.pids)
        later = [number for number in numbers if number > self._last_audited]
        if numbers:
            self._last_audited = (later or numbers)[0]
            await self._audit(self._last_audited)

    async def _audit(self, number: int) -> None:
        figures, books = self.audited, self._books
        if number not in books.mms:
            return
        mapped = verify.mappings(books.mms[number])
        if sum(end - start for start, end in mapped) >> PAGE_SHIFT > _AUDIT_PAGES_MAX:
            figures.too_large += 1
            return
        looks, moved, _ = await self._look([number])
        figures.restless += len(moved)
        for look in looks.values():
            result = verify.compare(books, number, look)
            figures.address_spaces += 1
            figures.pages_compared += result.pages_compared
            figures.pages_differed += result.pages_differ
            figures.pages_learned += sum(result.pages_unknown.values())
            verify.learn(books, number, result)
            if result.pages_differ:
                log.info("audit: %s", result.differences)
