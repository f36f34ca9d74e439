"""The tracepoints that are read, and the row of eight integers that each record becomes.

A row is ``[time_ns, kind | tid << 32, arg0 .. arg5]``, all unsigned 64-bit: one shape for every
event, so that decoding is one loop, rows of several rings sort by their first column, and a batch
is one array. ``TABLE`` is the only place that says which field of which tracepoint is which
argument.

Two instances are used. *G* sees every process: what the page cache and the fault handlers do with
files of the mount's device, and the few things that anybody may do to another's page tables. *P*
sees the traced processes only: their page faults and the life of their address spaces.
A thread's records of both are ordered by the clock, since each is stamped as it fires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ARGS: Final = 6
COLUMNS: Final = 2 + ARGS

# Kinds. The first four are the hot ones; the numbers are free to change.
PF_USER: Final = 1
PF_KERNEL: Final = 2
FAULT: Final = 3
MAP_PAGES: Final = 4
CACHE_ADD: Final = 5
CACHE_DELETE: Final = 6
MA_WRITE: Final = 7
NEWTASK: Final = 8
PREPARE_EXEC: Final = 9
EXEC: Final = 10
EXIT: Final = 11
RENAME: Final = 12
SIGNAL: Final = 13
SYS_ENTER: Final = 14
SYS_EXIT: Final = 15
RSS_ANON: Final = 18
RECLAIM: Final = 19
FOREIGN_ENTER: Final = 20
FOREIGN_EXIT: Final = 21
#: Not tracepoints. Records were overwritten before they were read; arg0 is how many, at least.
LOST: Final = 16
#: Processes that the pid filter took in; arg0 is the number of the adoption.
ADOPT: Final = 17

#: The system calls that change a mapping or fault pages in; argument 0 of their rows.
SYSTEM_CALLS: Final = (
    "mmap",
    "munmap",
    "mremap",
    "mprotect",
    "pkey_mprotect",
    "madvise",
    "remap_file_pages",
    "mlock",
    "mlock2",
    "mlockall",
    "munlock",
    "munlockall",
)


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """One event to enable: its row's kind and arguments, and where and how it is enabled.

    ``fields`` fill the arguments in order; a field of 16 bytes (a comm) takes two. ``constant`` is
    put before them (the system call's place in ``SYSTEM_CALLS``). Without a ``required`` event
    faults cannot be accounted at all; without another one, something is lost, named in ``serves``.
    ``by_device`` events are taken of every process, for the mount's files; ``by_anybody``, as they
    come; the others, of the followed threads.
    """

    name: str
    kind: int
    fields: tuple[str, ...]
    by_device: bool = False
    by_anybody: bool = False
    required: bool = False
    filter: str = ""
    constant: int | None = None
    serves: str = ""


_CALL_FIELDS: Final = {
    "mmap": ("addr", "len", "flags", "off", "prot"),
    "munmap": ("addr", "len"),
    "mremap": ("addr", "old_len", "new_len", "flags"),
    "mprotect": ("start", "len", "prot"),
    "pkey_mprotect": ("start", "len", "prot"),
    "madvise": ("start", "len_in", "behavior"),
    "remap_file_pages": ("start", "size"),
    "mlock": ("start", "len"),
    "mlock2": ("start", "len"),
    "mlockall": (),
    "munlock": ("start", "len"),
    "munlockall": (),
}


def _system_calls() -> tuple[Tracepoint, ...]:
    points = []
    for number, call in enumerate(SYSTEM_CALLS):
        serves = f"what {call} does to mappings"
        needed = call in ("mmap", "munmap")
        points.append(
            Tracepoint(
                f"syscalls/sys_enter_{call}",
                SYS_ENTER,
                _CALL_FIELDS[call],
                constant=number,
                required=needed,
                serves=serves,
            )
        )
        points.append(
            Tracepoint(
                f"syscalls/sys_exit_{call}",
                SYS_EXIT,
                ("ret",),
                constant=number,
                required=needed,
                serves=serves,
            )
        )
    return tuple(points)


def _foreign_access() -> tuple[Tracepoint, ...]:
    """Return the calls that change page tables of another process, or fault pages in for it.

    Their argument is that process, or 0: whose a pidfd is no record tells.
    """
    # COLD and WILLNEED change no PTE.
    serves = "what process_madvise does to mappings"
    points = [
        Tracepoint(
            "syscalls/sys_enter_process_madvise",
            FOREIGN_ENTER,
            (),
            by_anybody=True,
            filter="behavior!=20&&behavior!=3",
            serves=serves,
        ),
        Tracepoint(
            "syscalls/sys_exit_process_madvise",
            FOREIGN_EXIT,
            ("ret",),
            by_anybody=True,
            serves=serves,
        ),
    ]
    serves = "pages that debuggers map or copy in other processes"
    # PEEKTEXT, PEEKDATA, POKETEXT, POKEDATA.
    requests = "request==1||request==2||request==4||request==5"
    for call in ("ptrace", "process_vm_readv", "process_vm_writev"):
        condition = requests if call == "ptrace" else ""
        enter = f"syscalls/sys_enter_{call}"
        points += [
            Tracepoint(
                enter, FOREIGN_ENTER, ("pid",), by_anybody=True, filter=condition, serves=serves
            ),
            Tracepoint(
                f"syscalls/sys_exit_{call}", FOREIGN_EXIT, ("ret",), by_anybody=True, serves=serves
            ),
        ]
    return tuple(points)


TABLE: Final = (
    Tracepoint("exceptions/page_fault_user", PF_USER, ("address", "error_code"), required=True),
    Tracepoint(
        "exceptions/page_fault_kernel",
        PF_KERNEL,
        ("address", "error_code"),
        serves="the addresses of faults that the kernel takes for a program",
    ),
    Tracepoint(
        "filemap/mm_filemap_fault",
        FAULT,
        ("s_dev", "i_ino", "index"),
        by_device=True,
        required=True,
    ),
    Tracepoint(
        "filemap/mm_filemap_map_pages",
        MAP_PAGES,
        ("s_dev", "i_ino", "index", "last_index"),
        by_device=True,
        required=True,
    ),
    Tracepoint(
        "filemap/mm_filemap_add_to_page_cache",
        CACHE_ADD,
        ("s_dev", "i_ino", "index", "order"),
        by_device=True,
        required=True,
    ),
    Tracepoint(
        "filemap/mm_filemap_delete_from_page_cache",
        CACHE_DELETE,
        ("s_dev", "i_ino", "index", "order"),
        by_device=True,
        required=True,
    ),
    Tracepoint(
        "maple_tree/ma_write",
        MA_WRITE,
        ("index", "last", "val"),
        # Trees kept aside during a store are indexed by small numbers, not by addresses.
        filter="last>=65536",
        serves="the mappings that exec makes, for processes gone before /proc is read",
    ),
    Tracepoint("task/task_newtask", NEWTASK, ("pid", "clone_flags", "comm"), required=True),
    Tracepoint(
        "sched/sched_prepare_exec",
        PREPARE_EXEC,
        ("pid",),
        serves="the mappings that exec makes, for processes gone before /proc is read",
    ),
    Tracepoint("sched/sched_process_exec", EXEC, ("pid", "old_pid"), required=True),
    Tracepoint("sched/sched_process_exit", EXIT, ("pid",), required=True),
    Tracepoint("task/task_rename", RENAME, ("pid", "newcomm"), serves="names of programs"),
    Tracepoint(
        "signal/signal_generate",
        SIGNAL,
        ("sig", "pid"),
        # A positive code: the kernel's own doing, not kill(2) or raise(3).
        filter="code>0&&(sig==7||sig==11)",
        serves="telling a fault that ended in SIGBUS or SIGSEGV",
    ),
    Tracepoint(
        "kmem/rss_stat",
        RSS_ANON,
        ("size",),
        # MM_ANONPAGES of the thread's own address space: read faults of files make none.
        filter="member==1&&curr==1",
        serves="private copies that get_user_pages makes (O_DIRECT)",
    ),
    *(
        Tracepoint(
            f"vmscan/{name}",
            RECLAIM,
            ("nr_scanned",),
            by_anybody=True,
            serves="pages that reclaim unmapped and kept",
        )
        for name in ("mm_vmscan_lru_shrink_inactive", "mm_vmscan_reclaim_pages")
    ),
    *_system_calls(),
    *_foreign_access(),
)
