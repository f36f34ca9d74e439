"""The model as a library: it needs neither FUSE nor a compiler, and its examples are true."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest

#: Importing any of these fails; then a process reads and writes an XIP page.
WITHOUT = """
import sys
for name in ("pyfuse3", "trio", "numba", "rich"):
    sys.modules[name] = None

from xipfs.memory.frames import PhysicalMemory
from xipfs.mm import *
machine = Machine(PhysicalMemory(ram_pages=4, nvram_pages=4), Rules("6.1"))
def fault(vmf):
    return vmf_insert_mixed(vmf.vma, vmf.address, machine.memory.nvram_pfn(vmf.pgoff))
mm = MmStruct(machine)
file = MappedFile("file", VmOperations(fault=fault))
here = do_mmap(mm, file, 2, VM_READ | VM_WRITE, extra_flags=VM_MIXEDMAP)
print(access(mm, here, write=False).faults, access(mm, here, write=True).faults)
print(access(mm, here + 4096, write=True).faults, mm.raw_ptes, mm.anon_rss)
child = dup_mmap(mm, "child")
print(check(machine), child.anon_rss)
exit_mmap(child)
exit_mmap(mm)
print(check(machine), machine.nr_anon_pages)
"""


def test_the_model_works_without_fuse_and_without_a_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1 1\n2 0 2\n[] 2\n[] 0\n"


@pytest.mark.parametrize(
    ("name", "least"), [("xipfs.units", 1), ("xipfs.options", 1), ("xipfs.migrate.engine", 2)]
)
def test_examples_in_docstrings(name: str, least: int) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried >= least
