"""Whether a fault is over though its thread has made no record since, as /proc says.

No time decides that: on a busy machine a thread may stand still between any two records of a fault.
What proves that a fault is over:

- a signal that the kernel sent for it;
- its thread inside a system call, or gone, unless the call itself took the fault;
- its page being mapped as the fault leaves it: the fault has nothing left to do that makes records.

Its page may be gone again, though, when somebody looks, and the thread may run on without a record
for as long as it likes. Then its own time on a processor is taken for proof: between two records of
a fault that does not sleep lie microseconds of it.
"""

from __future__ import annotations

from typing import Final

from xipfs.trace import events, pagemap, proc
from xipfs.trace.fault_batch import ERROR_WRITE
from xipfs.trace.threads import Thread
from xipfs.units import PAGE_MASK, PAGE_SIZE

#: A thread's time is counted by the tick, 1 to 10 ms: that much of it may be of before.
RAN_NS: Final = 25_000_000


def is_over(thread: Thread) -> bool | None:
    """Tell whether the fault that ``thread`` has open was over before this call returned.

    None: it may be; False: it waits for something. May block, for the process's mmap lock.
    """
    if thread.pf_signal:
        return True
    waits = thread.pf_added and not thread.pf_retries
    in_call = proc.in_system_call(thread.tid)
    # In either of these cases the call may be where the fault is taken.
    in_a_call = thread.pf_kernel or (waits and thread.pf_origin == events.UNTRACED)
    if (in_call and not in_a_call) or _is_mapped(thread):
        return True
    if in_call is False:
        return False
    if in_call:
        # Asleep, in the fault or after it: only a page that is being read is waited for lightly.
        return not waits and proc.sleeps_lightly(thread.tid)
    return None if waits else _has_run_on(thread)


def _is_mapped(thread: Thread) -> bool:
    """Tell whether the page is mapped as the fault leaves it, or the process gone."""
    vma, start = thread.pf_vma, thread.pf_address & PAGE_MASK
    assert vma is not None
    words = pagemap.read_pagemap(thread.tid, start, start + PAGE_SIZE)
    if words is None:
        return True
    copied = bool(pagemap.is_private(words)[0])
    if thread.pf_error & ERROR_WRITE and not vma.shared:
        return copied
    return copied or bool(pagemap.is_file(words)[0])


def _has_run_on(thread: Thread) -> bool | None:
    """Tell whether a running thread has left its fault by the time it ran since its last record."""
    ran_ns = proc.run_ns(thread.tid)
    if thread.pf_ran[0] != thread.pf_last_ns:
        thread.pf_ran = (thread.pf_last_ns, ran_ns)
    return True if ran_ns - thread.pf_ran[1] >= RAN_NS else None
