"""Operations and objects of the command language that no recording has: truncation, held pages.

A recorded program took a page and let it go within one operation, and never cut a file. A program
for the model alone may do both, so that pins can stand in the way of what comes after them:

    {"name": "truncate", "object": NAME, "pages": N}      cut the object to its first N pages
    {"name": "hold", "map": LABEL, "page": N, "write": BOOL, "pin": BOOL}
                                                          take one page and keep it
    {"name": "release"}                                   let go of the page held longest

``pin`` takes it by FOLL_PIN (rule G5). A held page outlives its process. Also the model's own are
the header's ``anon_pages`` (how many anonymous pages the machine has, to make memory run out) and
a device's ``nopfn`` (its handler is the ->nopfn of the first eras, rules I15 to I20).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from xipfs.memory.frames import PG_ANON
from xipfs.mm.oracle.bench import Bench, Process, errno_name
from xipfs.mm.remote import take_page

Json = dict[str, Any]


def op_truncate(bench: Bench, _process: Process, op: Json) -> Json:
    """ftruncate(2), downwards (rules K15, K16)."""
    error = bench.object(op["object"]).truncate(op["pages"])
    return {"result": errno_name(error) if error else "ok"}


def op_hold(bench: Bench, process: Process, op: Json) -> Json:
    """get_user_pages or pin_user_pages of one page, which stays held."""
    address, pin = process.mapping(op["map"]).at(op["page"]), op["pin"]
    done, held = take_page(process.mm, address, write=op["write"], force=False, fast=pin, pin=pin)
    if done < 0:
        return {"result": errno_name(done)}
    (pfn,) = held
    bench.holding.append((process.mm, pfn, pin))
    anon = bench.machine.memory.flags[pfn] & PG_ANON
    return {"result": "page", "page": "anon" if anon else "file", "frame": bench.page_name(pfn)}


def op_release(bench: Bench, _process: Process, _op: Json) -> Json:
    """Let go of what the first ``hold`` took; EAGAIN if nothing is held."""
    if not bench.holding:
        return {"result": "EAGAIN"}
    bench.release_held()
    return {"result": "ok"}


BEYOND: Final[dict[str, Callable[[Bench, Process, Json], Json]]] = {
    "truncate": op_truncate,
    "hold": op_hold,
    "release": op_release,
}
