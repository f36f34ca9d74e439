"""What the kernel can have at a page, as far as events tell: the values of ``kernel_ptes``."""

from __future__ import annotations

from typing import Final

NONE: Final = 0
FILE: Final = 1
ANON: Final = 2
#: From here on unknown; the state less this is the reason's place in ``REASONS``.
UNKNOWN: Final = 3

REASONS: Final = (
    "mapped before its process was followed",
    "cached a moment before fault-around: its READ may have been under way",
    "written in part before it was read, so cached but perhaps not up to date",
    "may have carried the read-ahead mark",
    "get_user_pages, for reading or for writing",
    "fault of a process not followed yet",
    "madvise or mlock, which tell no page",
    "of a 32-bit program, whose system calls have no events",
    "zapped while other threads ran",
    "forked while other threads ran",
    "forked from a mapping that may or may not have had copies",
    "records were lost",
    "private copies made by get_user_pages (O_DIRECT), of which no record tells",
    "its memory was read, written or advised (ptrace, process_vm_readv, process_madvise)",
    "memory was reclaimed",
    "get_user_pages of a page that is mapped more than once",
    "taken away beside a fault that was, or was not, over",
)
(
    BEFORE,
    IN_FLIGHT,
    IN_PART,
    READAHEAD,
    GUP,
    UNTRACED,
    SILENT_CALL,
    CALLS_UNSEEN,
    THREADS_ZAP,
    THREADS_FORK,
    COPIES_UNKNOWN,
    LOST,
    COPIED,
    FOREIGN,
    RECLAIMED,
    AMBIGUOUS,
    CROSSED,
) = range(UNKNOWN, UNKNOWN + len(REASONS))

#: After this time a page that was added to the page cache is not waiting for its READ any more.
SETTLED_NS: Final = 1_000_000_000
