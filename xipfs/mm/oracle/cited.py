"""Which rules a field of an observation, or an operation, rests on: where to look first."""

from __future__ import annotations

import re
from typing import Final

_OF_FIELD: Final = {
    "minflt": "F1, F11, F22",
    "majflt": "F4",
    "rss_file_pages": "F3, T3",
    "rss_anon_pages": "F3, F15, T3",
    "locked_pages": "K18 to K20",
    "refcount": "P7, T1",
    "refcount_held": "G5, T1",
    "mapcount": "P7, T2",
    "device_pages": "P7, T1, T2",
    "pte": "N9, I6, I10",
    "devmap": "H8",
    "page": "N2 to N12",
    "frame": "F5, F6, F15",
    "write": "F5, F9, F17, K3, K9",
    "dirty": "F12, F13, F17",
    "young": "K3, K6",
    "pfn_valid": "P1, P2",
    "anon_exclusive": "F20, K4",
    "pgoff": "I2, I3, N8",
    "flags": "I1, I9, K18, K21",
    "vm_ops_calls": "F9, F12, F13",
    "rss": "F3",
    "anon": "F3",
    "swap": "K22",
    "pss_kb": "F3, P7",
}
_OF_OPERATION: Final = {
    "mmap": "N1, I1 to I12, A8",
    "munmap": "K6",
    "read": "F5, F6, F22, I15, I22",
    "write": "F10 to F20",
    "fork": "K1 to K5",
    "exit": "K6, T9",
    "madvise": "K12, K21",
    "mprotect": "K9, K10",
    "mremap": "K11",
    "mlock": "K18 to K20",
    "munlock": "K18 to K20",
    "mlockall": "K18 to K20",
    "munlockall": "K18 to K20",
    "msync": "K13, K14",
    "get_user_pages": "G1 to G5",
    "get_user_pages_fast": "G8 to G10",
    "pin_user_pages_fast": "G5, G8 to G10",
    "process_vm_readv": "G1, G2, G6",
    "process_vm_writev": "G1, G2, G6",
    "proc_mem_read": "G2, G6",
    "proc_mem_write": "F14, F17, G2",
    "ptrace_peek": "G6",
    "vmsplice": "G5, G6",
    "direct_write": "G6",
    "migrate": "R1, K7",
    "clear_refs": "K6",
}


def rules_of(path: str, operation: str) -> str:
    """Return the rules that a difference at ``path`` of a step of ``operation`` points to.

    >>> rules_of("pages[3].refcount", "fork")
    'P7, T1; K1 to K5'
    """
    name = re.sub(r"\[\d+\]", "", path).rpartition(".")[2]
    if path.startswith("vm_ops_calls"):
        name = "vm_ops_calls"
    return "; ".join(filter(None, (_OF_FIELD.get(name, ""), _OF_OPERATION.get(operation, ""))))
