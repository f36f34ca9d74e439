"""The bits of the model: VMA flags, fault flags and results, page flags, get_user_pages flags.

Names are the kernel's; values are ours (a model's PTE or VMA is never handed to a kernel). The two
letters of a VMA flag are those of /proc/PID/smaps ``VmFlags``.
"""

from __future__ import annotations

from typing import Final

VM_READ: Final = 1 << 0
VM_WRITE: Final = 1 << 1
VM_EXEC: Final = 1 << 2
VM_SHARED: Final = 1 << 3
VM_MAYREAD: Final = 1 << 4
VM_MAYWRITE: Final = 1 << 5
VM_MAYEXEC: Final = 1 << 6
VM_MAYSHARE: Final = 1 << 7
VM_PFNMAP: Final = 1 << 8
VM_MIXEDMAP: Final = 1 << 9
#: 2.6.26 to 3.6 only: vm_insert_page() was used in this VMA (rule I9).
VM_INSERTPAGE: Final = 1 << 10
VM_LOCKED: Final = 1 << 11
VM_IO: Final = 1 << 12
VM_DONTEXPAND: Final = 1 << 13
VM_DONTDUMP: Final = 1 << 14
VM_DONTCOPY: Final = 1 << 15
VM_RAND_READ: Final = 1 << 16
VM_SEQ_READ: Final = 1 << 17
VM_HUGEPAGE: Final = 1 << 18
VM_NOHUGEPAGE: Final = 1 << 19
VM_MERGEABLE: Final = 1 << 20
VM_WIPEONFORK: Final = 1 << 21
#: The filesystem maps its medium directly with device page structs (S_DAX on the inode).
VM_DAX: Final = 1 << 22
#: Soft-dirty bits were cleared: first writes are of interest (the kernel's lack of VM_SOFTDIRTY).
VM_SOFTDIRTY_TRACKED: Final = 1 << 23
#: A private mapping that was once writable, so that its pages may all become anonymous memory.
VM_ACCOUNT: Final = 1 << 24

VM_ACCESS_FLAGS: Final = VM_READ | VM_WRITE | VM_EXEC
#: VMAs the kernel neither merges nor locks (6.1 linux/mm.h; MIXEDMAP joined later, rule K20).
VM_SPECIAL: Final = VM_IO | VM_DONTEXPAND | VM_PFNMAP | VM_MIXEDMAP

#: VMA flag to its two letters in smaps; VM_INSERTPAGE and VM_DAX have none, and VM_ACCOUNT's are
#: not shown.
VMFLAG_LETTERS: Final[dict[int, str]] = {
    VM_READ: "rd",
    VM_WRITE: "wr",
    VM_EXEC: "ex",
    VM_SHARED: "sh",
    VM_MAYREAD: "mr",
    VM_MAYWRITE: "mw",
    VM_MAYEXEC: "me",
    VM_MAYSHARE: "ms",
    VM_PFNMAP: "pf",
    VM_MIXEDMAP: "mm",
    VM_LOCKED: "lo",
    VM_IO: "io",
    VM_DONTEXPAND: "de",
    VM_DONTDUMP: "dd",
    VM_DONTCOPY: "dc",
    VM_RAND_READ: "rr",
    VM_SEQ_READ: "sr",
    VM_HUGEPAGE: "hg",
    VM_NOHUGEPAGE: "nh",
    VM_MERGEABLE: "mg",
    VM_WIPEONFORK: "wf",
}

# What a fault handler and handle_mm_fault() return: a set of bits, 0 = done.
VM_FAULT_OOM: Final = 1 << 0
VM_FAULT_SIGBUS: Final = 1 << 1
VM_FAULT_MAJOR: Final = 1 << 2
VM_FAULT_NOPAGE: Final = 1 << 3
VM_FAULT_LOCKED: Final = 1 << 4
VM_FAULT_DONE_COW: Final = 1 << 5
VM_FAULT_SIGSEGV: Final = 1 << 6
VM_FAULT_ERROR: Final = VM_FAULT_OOM | VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV

VM_FAULT_NAMES: Final[dict[int, str]] = {
    VM_FAULT_OOM: "OOM",
    VM_FAULT_SIGBUS: "SIGBUS",
    VM_FAULT_MAJOR: "MAJOR",
    VM_FAULT_NOPAGE: "NOPAGE",
    VM_FAULT_LOCKED: "LOCKED",
    VM_FAULT_DONE_COW: "DONE_COW",
    VM_FAULT_SIGSEGV: "SIGSEGV",
}

FAULT_FLAG_WRITE: Final = 1 << 0
FAULT_FLAG_UNSHARE: Final = 1 << 1
FAULT_FLAG_MKWRITE: Final = 1 << 2
#: The access comes from get_user_pages on behalf of someone else (rule F16a).
FAULT_FLAG_REMOTE: Final = 1 << 3

FOLL_WRITE: Final = 1 << 0
FOLL_FORCE: Final = 1 << 1
FOLL_GET: Final = 1 << 2
FOLL_PIN: Final = 1 << 3
FOLL_TOUCH: Final = 1 << 4
FOLL_DUMP: Final = 1 << 5
FOLL_LONGTERM: Final = 1 << 6


def describe(bits: int, names: dict[int, str]) -> str:
    """Return the names of the set ``bits``, joined with ``|`` ("0" for none).

    >>> describe(VM_FAULT_MAJOR | VM_FAULT_LOCKED, VM_FAULT_NAMES)
    'MAJOR|LOCKED'
    """
    return "|".join(name for bit, name in names.items() if bits & bit) or "0"
