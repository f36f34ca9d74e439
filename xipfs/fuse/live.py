"""What happens between requests on a live mount: draining, accounting, eviction, migration.

Everything here runs on the trio thread; what may block (draining, the pid filter, invalidation)
runs in worker threads. A drain may wait for an mmap lock, held by a fault that waits for our READ.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from typing import Final

import trio

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.causes import EVICT
from xipfs.accounting.charges import ChargeBatch
from xipfs.errors import FsError
from xipfs.fs.types import Attr
from xipfs.fuse.background import Background
from xipfs.fuse.commands import Commands
from xipfs.fuse.control import Command, Json, Question
from xipfs.fuse.deciding import Deciding
from xipfs.fuse.hints import HintScanner
from xipfs.fuse.migration import Migrator
from xipfs.fuse.mounts import Mount
from xipfs.fuse.notify import Notifier, session_fd
from xipfs.fuse.observing import LiveObserver, NoObserver, TracefsObserver, start_observing
from xipfs.fuse.recording import RecordedFilesystem, Recorder
from xipfs.fuse.replies import Replies
from xipfs.fuse.users import Users
from xipfs.fuse.verifying import Verifier
from xipfs.fuse.views import file_pages, live_snapshot
from xipfs.fuse.worker import Turn, Worker
from xipfs.fuse.writeback import Writeback
from xipfs.memory.profiles import load_profile
from xipfs.migrate.engine import Engine, runs
from xipfs.migrate.history import LINES_SHOWN
from xipfs.mm.rules import Rules
from xipfs.options import MountOptions
from xipfs.stats.fault_log import FaultLog
from xipfs.stats.heat import Heat
from xipfs.stats.series import Series
from xipfs.trace.direct_io import pages_in_flight
from xipfs.trace.events import Event
from xipfs.trace.fault_batch import FaultBatch, steps
from xipfs.units import PAGE_SHIFT, pages_of

log = logging.getLogger(__name__)

#: What a drain costs besides its events is a few hundred microseconds: 2 % of this.
DRAIN_INTERVAL_S: Final = 0.020
IDLE_INTERVAL_S: Final = 0.080
#: Between two questions whether a fault is over, and until it is left to a later drain.
_SETTLE_PAUSE_S: Final = 0.001
_SETTLE_MAX_S: Final = 0.2
#: Events accounted in one piece, some 10 ms of work; between pieces requests are served.
_BATCH_EVENTS: Final = 1000


class Live:
    """One mount's moving parts, joined. ``start`` makes it whole once the mount is there."""

    def __init__(
        self, fs: RecordedFilesystem, options: MountOptions, observer: LiveObserver
    ) -> None:
        self.fs = fs
        self.options = options
        self.observer = observer
        self.accountant = Accountant(
            fs,
            Rules.parse(options.rules),
            # Whatever observer there is then.
            lambda pid: self.observer.comm(pid),
            root_of=lambda pid: self.observer.root_of(pid),
        )
        self.engine = Engine(fs)
        self.heat = Heat()
        self.background = Background(fs)
        self.writeback = Writeback(fs, options, self.background.failed)
        self.fault_log = FaultLog(lambda pid: self.observer.comm(pid), fs.paths.of)
        self.accountant.on_charge = self.fault_log.add
        self.accountant.on_charges = self.fault_log.add_many
        self.recorder = Recorder(fs, self.accountant, self.fault_log)
        self.hinter: HintScanner | None = None
        self.profile = None if options.medium is None else load_profile(options.medium)
        self.ram_series = Series(time.time_ns())
        self.users = Users(self.accountant)
        self.replies = Replies(self.accountant.is_mapped)
        self.deciding = Deciding(fs, options, self.profile)
        self.deciding.note = self.recorder.note
        self.recorder.policy = self.deciding.chosen
        self.recorder.before = self.deciding.before
        # One drain at a time, or batches would be consumed out of order.
        self._draining = Turn()
        self._drainer = Worker("xipfs-drain")
        self._evicted: list[tuple[int, int]] = []
        self._eviction = trio.Event()
        fs.set_hooks(
            on_unmap=self.accountant.unmap_pages,
            on_evict=self._on_evict,
            on_cut=self._on_cut,
            chooser=self.deciding.victims,
        )

    def observe(self, mount: Mount) -> None:
        """Begin to observe the mount, in the best way left where the options let it be chosen."""
        self.observer, readahead_off = start_observing(self.options, self.observer, mount)
        self.accountant.kernel.cached.readahead = not readahead_off
        if isinstance(self.observer, TracefsObserver):
            self.accountant.bulk.start_compiling()

    def start(self, nursery: trio.Nursery, mount: Mount) -> None:
        """Begin the background work."""
        self.mount = mount
        self.notifier = Notifier(
            session_fd(),
            self.accountant.causes,
            self.users.of,
            lambda pids, ino: pages_in_flight(
                pids, mount.dev, ino, heirs=not self.observer.sees_maps
            ),
        )
        self.migrator = Migrator(self.engine, self.notifier, self.drain_for_move)
        self.migrator.history.on_moved = self.deciding.moved
        self.migrator.on_move = self.recorder.moved
        self.migrator.on_give_up = self.recorder.gave_up
        self.migrator.before_move = self.recorder.file
        self.deciding.on_would = lambda moves: self.migrator.history.would(time.time_ns(), moves)
        self.verifier = Verifier(self)
        start = functools.partial(self.background.start, nursery)
        start("observing", self._drain_forever)
        start("audit", self.verifier.watch_forever)
        start("evictions", self._invalidate_evicted)
        if not self.fs.read_only:
            start("write-back", self.writeback.run)
        if self.options.hint_pages_per_s and isinstance(self.observer, TracefsObserver):
            self.hinter = HintScanner(
                self.accountant,
                self.notifier,
                self.drain_settled,
                self.options.hint_pages_per_s,
                self.recorder.note,
            )
            start("hints", self.hinter.run)
        elif self.options.hint_pages_per_s:
            log.info("hint= needs observe=tracefs: no page is taken away")
        start("policy", self.deciding.carry_out, self.migrator.move_all, self.drain_for_move)

    # Hooks of the request handlers

    async def before_open_reply(self, tid: int) -> None:
        """Return once the opener's process is observed."""
        # Our own threads open the mount for syncing only; tid 0 is outside our pid namespace.
        if tid > 0 and not self.observer.follows(tid):
            try:
                await trio.to_thread.run_sync(self.observer.add_pids, (tid,))
            except Exception as error:
                # The opener is not to blame; what it does is not seen.
                self.background.failed("following", error)

    async def before_change(self, ino: int, size_bytes: int | None = None) -> None:
        """Charge what has faulted so far before pages of ``ino`` go away.

        With ``size_bytes``: if that cuts the file; without: if the inode has no name left.
        """
        try:
            attr = self.fs.getattr(ino)
        except FsError:
            return
        cuts = attr.nlink == 0 if size_bytes is None else size_bytes < attr.size_bytes
        if cuts:
            await self.drain()
            if self.accountant.is_mapped(ino):
                # Somebody may be faulting on it right now; what nobody maps needs no waiting.
                await self.drain_settled()

    async def before_name_change(self) -> None:
        """While somebody reads faults: tell those so far by the names that files have now."""
        if self.fault_log.active:
            await self.drain_settled()

    async def before_attributes(self, tid: int, attr: Attr) -> None:
        """Note who will have pages dropped because of this answer."""
        if not isinstance(self.observer, TracefsObserver):
            return
        look = self.replies.to_act_on(tid, attr)
        if look is not None:
            try:
                await trio.to_thread.run_sync(look)
            except Exception as error:
                # The call is not to blame; nothing is claimed of the file from here on.
                self.background.failed("answers", error)

    def emptied(self, ino: int) -> None:
        """Hear of an O_TRUNC."""
        self.replies.emptied(ino)

    def opened(self, ino: int, pid: int) -> None:
        """Hear of a new handle."""
        self.users.opened(ino, pid)

    def closed(self, ino: int, pid: int) -> None:
        """Hear of a handle's end."""
        self.users.closed(ino, pid)

    def page_io(self, pid: int, ino: int, offset: int, size: int, *, write: bool) -> None:
        """Hear of a READ or WRITE."""
        if size <= 0:
            return
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        if isinstance(self.observer, TracefsObserver):
            # The answer leaves in this very step of the request's task: what comes next is later.
            # Without the kernel's events nobody asks for it.
            token = trio.lowlevel.current_trio_token()
            token.run_sync_soon(self._answered, ino, offset, size, write)
        self.migrator.page_io(ino, first, last)
        now_ns = time.monotonic_ns()
        self.deciding.page_io(now_ns, pid, ino, first, last, write=write)
        self.recorder.page_io(now_ns, pid, ino, offset, size, write=write)
        if write:
            self.writeback.after_write()
        else:
            self.observer.read_request(pid, ino, first)

    def _answered(self, ino: int, offset: int, size: int, write: bool) -> None:
        """Note what the kernel has now. What trio's loop calls must raise nothing."""
        try:
            self._note_answer(ino, offset, size, write)
        except Exception as error:
            self.background.failed("answers", error)

    def _note_answer(self, ino: int, offset: int, size: int, write: bool) -> None:
        cached, time_ns = self.accountant.kernel.cached, time.monotonic_ns()
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        if not write:
            cached.answered(ino, range(first, last + 1), time_ns)
            return
        whole = range(pages_of(offset), offset + size >> PAGE_SHIFT)
        cached.answered(ino, whole, time_ns)
        for part in {first, last} - set(whole):
            cached.answered(ino, range(part, part + 1), time_ns, whole=False)

    def write_back_of_ours(self, ino: int, offset: int, size: int) -> bool:
        """Return whether a WRITE there answers our own invalidation."""
        return self.notifier.write_back_of_ours(ino, offset, size)

    # Draining and accounting

    async def drain(self) -> int:
        """Charge the faults that are known to be over; return how many events there were.

        A defect here must not end the mount: it is logged, observing stops, and every snapshot
        says so from then on.
        """
        async with self._draining:
            try:
                observer, until_ns = self.observer, time.monotonic_ns()
                count, whole = 0, False
                while not whole:
                    if isinstance(observer, NoObserver):
                        events, whole = observer.drain(until_ns)
                    else:
                        events, whole = await self._drainer.run(observer.drain, until_ns)
                    count += len(events)
                    for step in steps(events, _BATCH_EVENTS):
                        self._account(step)
                        await trio.lowlevel.checkpoint()
            except Exception as error:
                log.exception("accounting failed; faults are not observed any more")
                failed, self.observer = self.observer, NoObserver(f"stopped by an error: {error!r}")
                await trio.to_thread.run_sync(failed.close)
                return 0
            return count

    async def drain_settled(self) -> int:
        """Charge every fault that was over before this call; return how many events there were.

        One of a thread that runs on is known to be over by the next drain, if its page is mapped.
        If that has gone again (see ``trace.settling``) the thread must have run for a while; one
        that gets no processor is not waited for.
        """
        before_ns, give_up_s = time.monotonic_ns(), trio.current_time() + _SETTLE_MAX_S
        drained, pause_s = await self.drain(), 0.0
        while self.observer.unsettled(before_ns) and trio.current_time() < give_up_s:
            await trio.sleep(pause_s)
            drained, pause_s = drained + await self.drain(), _SETTLE_PAUSE_S
        return drained

    async def drain_for_move(self) -> int:
        """Do as ``drain_settled``; where nothing happened that takes no thread."""
        if not self._draining.taken() and self.observer.quiet():
            return 0
        return await self.drain_settled()

    def _account(self, step: list[Event] | FaultBatch) -> None:
        # A recording holds each fault-around at its place between the faults.
        self.accountant.detailed = self.recorder.active or self.fault_log.active
        charges = self.accountant.charge(step)
        if isinstance(charges, ChargeBatch):
            self.heat.add_many(charges)
        else:
            self.heat.add(charge for charge in charges if not charge.hint)
        self.migrator.history.charged(charges)
        self.deciding.charged(charges)

    async def _drain_forever(self) -> None:
        """Drain often while there is something, seldom while there is not."""
        interval_s = DRAIN_INTERVAL_S
        while True:
            drained = await self.drain()
            self.ram_series.add(time.time_ns(), self.fs.nr_resident_pages)
            self.fault_log.rest(trio.current_time())
            self.recorder.rest(trio.current_time())
            interval_s = DRAIN_INTERVAL_S if drained else min(interval_s * 2, IDLE_INTERVAL_S)
            await trio.sleep(interval_s)

    # Eviction: the model's frame is gone, so the kernel's page must go too, or its next touch
    # would make no fault and the refill could not be charged.

    def _on_cut(self, ino: int, first: int) -> None:
        self.accountant.cut(ino, first)
        self.recorder.file_cut(ino, first)

    def _on_evict(self, ino: int, index: int) -> None:
        self.deciding.evicted(ino, index)
        self._evicted.append((ino, index))
        self._eviction.set()

    async def _invalidate_evicted(self) -> None:
        while True:
            await self._eviction.wait()
            self._eviction = trio.Event()
            pages, self._evicted = sorted(set(self._evicted)), []
            for ino, first, count in runs(pages):
                await trio.lowlevel.checkpoint()
                try:
                    await self.notifier.invalidate_pages(ino, first, count, EVICT)
                except Exception as error:
                    # The kernel keeps the page; its refill will only be charged late.
                    self.background.failed("evictions", error)

    # The control channel

    async def snapshot(self) -> Json:
        """Return the mount's figures, everything before this call included."""
        await self.drain_settled()
        return live_snapshot(self)

    async def metrics(self) -> Json:
        """Return the figures that OpenMetrics has: of single pages those that migrated most."""
        return await self._moved(LINES_SHOWN)

    def questions(self) -> Mapping[str, Question]:
        """Return what ``.xipfs/NAME.NUMBER.json`` answers."""
        return {
            "hottest": self._hottest,
            "moved": self._moved,
            "pages": self._pages,
            "faults": self._faults,
            "items": self._items,
            "verify": self._verify,
            "run": self._run,
        }

    def commands(self) -> Mapping[str, Command]:
        """Return the requests of the control file."""
        return Commands(self).by_name()

    async def _hottest(self, count: int) -> Json:
        stats = await self.snapshot()
        return stats | {"hottest": self.heat.hottest(count)}

    async def _moved(self, count: int) -> Json:
        stats = await self.snapshot()
        return stats | {"moved": self.migrator.history.pages.most_moved(count)}

    async def _faults(self, cursor: int) -> Json:
        await self.drain_settled()
        told = self.fault_log.since(cursor, trio.current_time())
        return told | {"events_lost": self.observer.figures().lost}

    async def _items(self, cursor: int) -> Json:
        return self.recorder.since(cursor, trio.current_time())

    async def _pages(self, ino: int) -> Json:
        await self.drain_settled()
        return file_pages(self.fs, ino)

    async def _verify(self, pid: int) -> Json:
        # Nobody follows init, so its number stands for all.
        if not isinstance(self.observer, TracefsObserver):
            return {"unavailable": f"its observer is {self.observer.figures().mode}"}
        return await self.verifier.verify(None if pid == 1 else pid)

    async def _run(self, root: int) -> Json:
        await self.drain_settled()
        return self.accountant.runs.describe(root) or {"unknown": root}
