"""What is known of one address space and of one thread; ``processes`` makes and ends them."""

from __future__ import annotations

from xipfs.trace import events
from xipfs.trace.extents import Extents
from xipfs.trace.fault_batch import ERROR_PROTECTION
from xipfs.trace.vmas import Vma, VmaMap
from xipfs.units import PAGE_SHIFT


class Space:
    """One address space: its number, the process it shows as, its mappings, its live threads.

    ``told``: the consumer has heard of it, and is told of its end. ``extents`` are the kernel's own
    VMAs, of all memory. ``compat``: a 32-bit program, whose system calls have no events.
    ``incomplete``: records were lost while it lived.
    """

    __slots__ = ("compat", "extents", "id", "incomplete", "pid", "tids", "told", "vmas")

    def __init__(self, number: int, pid: int) -> None:
        self.id = number
        self.pid = pid
        self.tids: set[int] = set()
        self.told = False
        self.compat = self.incomplete = False
        self.vmas = VmaMap()
        self.extents = Extents()


class Thread:
    """One thread and the fault or system call it is in; ``grammar`` owns the fields ``pf_*``."""

    __slots__ = (
        "awaits_exit",
        "buffered",
        "call",
        "call_args",
        "dead_ns",
        "exec_window",
        "pf_added",
        "pf_address",
        "pf_ambiguous",
        "pf_arounds",
        "pf_copied",
        "pf_crossed_ns",
        "pf_error",
        "pf_faults",
        "pf_index",
        "pf_ino",
        "pf_kernel",
        "pf_last_ns",
        "pf_mapped_last",
        "pf_open",
        "pf_origin",
        "pf_over",
        "pf_ran",
        "pf_reported",
        "pf_retries",
        "pf_signal",
        "pf_time_ns",
        "pf_vma",
        "pid",
        "populate_next",
        "space",
        "stores",
        "tid",
        "traced",
    )

    def __init__(self, tid: int, pid: int, space: Space) -> None:
        self.tid = tid
        self.pid = pid
        self.space = space
        self.traced = True
        self.dead_ns = 0
        self.exec_window = self.awaits_exit = False
        self.call = -1
        self.call_args: tuple[int, ...] = ()
        self.populate_next = 0
        #: Stores into the maple tree whose time or owner only a later record tells.
        self.stores: list[tuple[int, int, bool]] = []
        self.buffered: list[tuple[int, int, int, int, int]] = []
        self.pf_open = False
        self.pf_time_ns = self.pf_last_ns = 0
        self.pf_address = self.pf_error = 0
        self.pf_kernel = False
        self.pf_origin = events.TRAP
        self.pf_vma: Vma | None = None
        self.pf_ino = -1
        self.pf_index = 0
        self.pf_faults = self.pf_retries = self.pf_signal = 0
        self.pf_added = self.pf_mapped_last = self.pf_reported = self.pf_copied = False
        self.pf_ambiguous = False
        self.pf_arounds: list[tuple[int, int]] = []
        #: The last record of a fault whose page was taken away after it, perhaps when it was over.
        self.pf_crossed_ns = 0
        #: The last record of the fault that was looked at, and when it was found over.
        self.pf_over = (0, 0)
        #: The last record of a fault that may be over, and how long the thread had run by then.
        self.pf_ran = (0, 0)


def did_nothing(thread: Thread, address: int, error: int) -> bool:
    """Tell whether the open fault mapped nothing, now that its page faults once more.

    That is a copy to or from user memory with page faults disabled: it fails, and is done again
    after faulting in (iomap_write_iter, generic_perform_write, 6.18). The kernel counts one fault.
    """
    return not (
        thread.pf_origin != events.TRAP
        or thread.pf_reported
        or thread.pf_faults
        or thread.pf_mapped_last
        or thread.pf_signal
        or (error | thread.pf_error) & ERROR_PROTECTION
        or (address ^ thread.pf_address) >> PAGE_SHIFT
    )
