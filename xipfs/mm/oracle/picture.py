"""A step's state for people: the pages of each mapping as letters.

    X raw (no counted page)   P counted page of the file   A private copy or other anonymous page
    Z zero page   s swapped out   . nothing mapped   (blank) no mapping here

Under a mapping's letters stand ``w`` where the PTE is writable, ``d`` where it is dirty too.
"""

from __future__ import annotations

from typing import Any, Final

from xipfs.memory.frames import PG_ANON
from xipfs.mm.oracle.bench import Bench, Mapping, Process
from xipfs.mm.oracle.observe import vmas
from xipfs.mm.oracle.replay import StepState
from xipfs.mm.pte import PTE_DIRTY, PTE_PRESENT, PTE_SWAP, PTE_WRITE, pte_pfn

#: Pages drawn in one line.
WIDTH: Final = 64


def page_letters(bench: Bench, process: Process, mapping: Mapping) -> tuple[str, str]:
    """Return the letters of a mapping's pages, and the marks that stand under them."""
    kinds, marks = "", ""
    for index in range(mapping.pages):
        address = mapping.at(index)
        vma = process.mm.find_vma(address)
        pte = process.mm.tables.get(address)
        mark = " "
        if vma is None:
            kind = " "
        elif pte & PTE_SWAP:
            kind = "s"
        elif not pte & PTE_PRESENT:
            kind = "."
        else:
            page = bench.machine.vm_normal_page(vma, address, pte)
            if pte_pfn(pte) == bench.machine.zero_pfn:
                kind = "Z"
            elif page < 0:
                kind = "X"
            else:
                kind = "A" if bench.machine.memory.flags[page] & PG_ANON else "P"
            if pte & PTE_WRITE:
                mark = "d" if pte & PTE_DIRTY else "w"
        kinds += kind
        marks += mark
    return kinds, marks


def describe_step(done: StepState) -> str:
    """Return one line: who did what, with which result and how many faults."""
    op: dict[str, Any] = dict(done.step.op)
    name = op.pop("name")
    words = []
    for key, value in op.items():
        text = ",".join(value) if isinstance(value, list) else str(value)
        words.append(f"{key}={text}")
    outcome = done.stopped or str(done.outcome.get("result", ""))
    faults = ""
    if done.outcome.get("minflt") or done.outcome.get("majflt"):
        faults = f", {done.outcome['minflt']} minor"
        if done.outcome["majflt"]:
            faults += f", {done.outcome['majflt']} major"
    arrow = f" -> {outcome}" if outcome else ""
    return f"{done.step.number:3} {done.step.who}: {name} {' '.join(words)}{arrow}{faults}"


def draw(bench: Bench, done: StepState) -> list[str]:
    """Return the lines that show every mapping of every process after a step."""
    lines = [describe_step(done)]
    for who, process in bench.processes.items():
        mm = process.mm
        lines.append(
            f"    {who}: rss file {mm.file_rss}, anon {mm.anon_rss}; raw ptes {mm.raw_ptes};"
            f" locked {mm.locked_vm}"
        )
        for label, mapping in process.labels.items():
            kinds, marks = page_letters(bench, process, mapping)
            for vma in vmas(bench, process, mapping):
                first, end = vma["page"], vma["page"] + vma["pages"]
                shared = "s" if vma["shared"] else "p"
                flags = [flag for flag in vma["flags"] if flag in ("pf", "mm", "lo", "dc")]
                head = f"{label}[{first}-{end - 1}] {vma['prot']}{shared} {' '.join(flags)}"
                for at in range(first, end, WIDTH):
                    stop = min(at + WIDTH, end)
                    lines.append(f"      {head:24} {kinds[at:stop]}".rstrip())
                    lines.append(f"      {'':24} {marks[at:stop]}".rstrip())
                    head = ""
    return [line for line in lines if line]
