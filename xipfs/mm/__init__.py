"""VM_MIXEDMAP as a library: the kernel's rules as functions over a modelled machine.

A ``Machine`` is one kernel: physical memory, a rule set (``Rules``), counters. An ``MmStruct`` is
an address space on it, holding VMAs and page tables. Nothing here needs FUSE, root or Linux.

>>> from xipfs.memory.frames import PhysicalMemory
>>> from xipfs.mm import VM_READ, VM_WRITE, Machine, MmStruct, Rules, access, do_mmap
>>> machine = Machine(PhysicalMemory(ram_pages=16, nvram_pages=16), Rules("6.1"))
>>> xip, mm = machine.memory.nvram_pfn(3), MmStruct(machine, "A")

A file of one XIP page: its fault handler inserts the pfn itself (rule F6).

>>> def fault(vmf):
...     return vmf_insert_mixed(vmf.vma, vmf.address, xip)
>>> file = MappedFile("bin", VmOperations(fault=fault))
>>> here = do_mmap(mm, file, 1, VM_READ | VM_WRITE, extra_flags=VM_MIXEDMAP)
>>> access(mm, here, write=False).faults, mm.raw_ptes, mm.file_rss
(1, 1, 0)

A private write copies it; a first write to an untouched XIP page would take two faults (F11).

>>> access(mm, here, write=True).faults, mm.raw_ptes, mm.anon_rss
(1, 0, 1)
>>> check(machine)
[]

What there is, by module:

    machine, mm_struct, vma, pte   Machine, MmStruct, Vma, MappedFile, VmOperations, Vmf, PTEs
    rules                          Rules, ERAS, Kernel: which kernel, rule by rule
    access, fault, wp              access: a load or store; handle_mm_fault: one fault
    insert                         vm_insert_page, vm_insert_pfn, vm_insert_mixed, vmf_...,
                                   remap_pfn_range, do_no_pfn: for handlers and ->mmap
    mmap, mremap, fork, zap        do_mmap, do_munmap, mprotect, mremap, dup_mmap, exit_mmap,
                                   unmap_mapping_range, truncate_pagecache
    madvise, mlock                 madvise, msync, mlock, munlock, mlockall, munlockall
    gup, remote                    get_user_pages and those who call it for another process
    audit                          check: recount everything (T1 to T9)
    oracle                         recordings of real kernels, replayed and compared

Addresses are bytes, page aligned where pages are meant; a pfn and a file page are numbers of
4096-byte pages. System calls return 0 (or what they return) or a negative errno.
"""

from xipfs.mm.access import Access, access, maps_what
from xipfs.mm.audit import check
from xipfs.mm.bug import InvariantError, KernelBug
from xipfs.mm.fault import filemap_map_pages, handle_mm_fault
from xipfs.mm.flags import (
    VM_EXEC,
    VM_FAULT_MAJOR,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
)
from xipfs.mm.fork import copy_page_range, dup_mmap
from xipfs.mm.gup import get_user_pages, get_user_pages_fast, put_user_pages
from xipfs.mm.insert import (
    remap_pfn_range,
    vm_insert_mixed,
    vm_insert_page,
    vm_insert_pfn,
    vmf_insert_mixed,
    vmf_insert_pfn,
)
from xipfs.mm.machine import Machine
from xipfs.mm.madvise import madvise, msync
from xipfs.mm.mlock import mlock, mlockall, munlock, munlockall
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import do_mmap, do_munmap, mprotect
from xipfs.mm.mremap import move_mapping, mremap
from xipfs.mm.rules import ERAS, Kernel, Rules
from xipfs.mm.vma import MappedFile, Vma, Vmf, VmOperations
from xipfs.mm.zap import exit_mmap, truncate_pagecache, unmap_mapping_range, zap_page_range

__all__ = [
    "ERAS",
    "VM_EXEC",
    "VM_FAULT_MAJOR",
    "VM_FAULT_NOPAGE",
    "VM_FAULT_OOM",
    "VM_FAULT_SIGBUS",
    "VM_MIXEDMAP",
    "VM_PFNMAP",
    "VM_READ",
    "VM_SHARED",
    "VM_WRITE",
    "Access",
    "InvariantError",
    "Kernel",
    "KernelBug",
    "Machine",
    "MappedFile",
    "MmStruct",
    "Rules",
    "VmOperations",
    "Vma",
    "Vmf",
    "access",
    "check",
    "copy_page_range",
    "do_mmap",
    "do_munmap",
    "dup_mmap",
    "exit_mmap",
    "filemap_map_pages",
    "get_user_pages",
    "get_user_pages_fast",
    "handle_mm_fault",
    "madvise",
    "maps_what",
    "mlock",
    "mlockall",
    "move_mapping",
    "mprotect",
    "mremap",
    "msync",
    "munlock",
    "munlockall",
    "put_user_pages",
    "remap_pfn_range",
    "truncate_pagecache",
    "unmap_mapping_range",
    "vm_insert_mixed",
    "vm_insert_page",
    "vm_insert_pfn",
    "vmf_insert_mixed",
    "vmf_insert_pfn",
    "zap_page_range",
]
