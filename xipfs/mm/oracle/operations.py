"""The operations of the command language, one function each.

A function changes the bench and returns what a caller would have seen: ``result`` and, where the
call has them, ``data``, ``bytes``, ``si_code``, ``page``, ``frame``, ``refcount_held``. Faults and
state are not its business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from xipfs.memory.frames import PG_ANON
from xipfs.mm.access import access
from xipfs.mm.flags import VM_EXEC, VM_READ, VM_WRITE
from xipfs.mm.fork import dup_mmap
from xipfs.mm.gup import LIVELOCK, put_user_pages
from xipfs.mm.madvise import madvise, msync
from xipfs.mm.mlock import mlock, mlockall, munlock, munlockall
from xipfs.mm.mmap import do_mmap, do_munmap, mprotect
from xipfs.mm.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, mremap
from xipfs.mm.oracle.bench import Bench, Mapping, Process, errno_name
from xipfs.mm.oracle.beyond import BEYOND
from xipfs.mm.pte import pte_pfn
from xipfs.mm.remote import access_remote_vm, clear_refs, direct_io, process_vm_rw, take_page
from xipfs.mm.zap import exit_mmap
from xipfs.units import PAGE_MASK, PAGE_SIZE

Json = dict[str, Any]
#: ``read`` and ``file_read`` show at most this many bytes.
TEXT_BYTES: Final = 14

_PROT: Final = {"r": VM_READ, "w": VM_WRITE, "x": VM_EXEC}
_MREMAP: Final = {
    "maymove": MREMAP_MAYMOVE,
    "fixed": MREMAP_FIXED,
    "dontunmap": MREMAP_DONTUNMAP,
}


def _result(number: int) -> Json:
    return {"result": "ok" if number >= 0 else errno_name(number)}


def _counted(number: int) -> Json:
    return {"result": "ok", "bytes": number} if number >= 0 else _result(number)


def _prot(text: str) -> int:
    return 0 if text == "none" else sum(_PROT[letter] for letter in set(text))


def _range(process: Process, op: Json) -> tuple[int, int]:
    mapping = process.mapping(op["map"])
    return mapping.at(op["page"]), mapping.at(op["page"] + op["pages"])


def _address(process: Process, op: Json) -> int:
    return process.mapping(op["map"]).at(op["page"], op.get("offset", 0))


def op_mmap(bench: Bench, process: Process, op: Json) -> Json:
    """mmap(2); ``object`` null is anonymous memory."""
    shared = "shared" in op["flags"]
    file = bench.object(op["object"]) if op["object"] is not None else None
    if file is None and shared:
        file = bench.anonymous_file(op["pages"])
    address = do_mmap(
        process.mm,
        file,
        op["pages"],
        _prot(op["prot"]),
        pgoff=op.get("object_page", 0),
        shared=shared,
        file_writable=op["object"] is None or "w" in op.get("open", "rw"),
        populate="populate" in op["flags"],
        locked="locked" in op["flags"],
    )
    if address >= 0:
        process.labels[op["map"]] = Mapping(address, op["pages"])
    return _result(address)


def op_munmap(_bench: Bench, process: Process, op: Json) -> Json:
    """munmap(2)."""
    return _result(do_munmap(process.mm, *_range(process, op)))


def _touch(process: Process, address: int, count: int, *, write: bool) -> Json:
    """Access every page of a range in order; stop at the first signal."""
    for at in range(address & PAGE_MASK, address + max(count, 1), PAGE_SIZE):
        taken = access(process.mm, max(at, address), write=write)
        if taken.signal:
            return {"result": taken.signal, "si_code": taken.si_code}
    return {"result": "ok"}


def op_read(bench: Bench, process: Process, op: Json) -> Json:
    """Load bytes from user space."""
    address = _address(process, op)
    if process.mm.find_vma(address) is None and address & PAGE_MASK in process.stale:
        pfn = process.stale[address & PAGE_MASK]
    else:
        seen = _touch(process, address, op["bytes"], write=False)
        if seen["result"] != "ok":
            return seen
        pfn = pte_pfn(process.mm.tables.get(address & PAGE_MASK))
    count = min(op["bytes"], TEXT_BYTES)
    return {"result": "ok", "data": bench.text(pfn, op["offset"], count)}


def op_write(bench: Bench, process: Process, op: Json) -> Json:
    """Store one byte from user space."""
    address = _address(process, op)
    seen = _touch(process, address, 1, write=True)
    if seen["result"] == "ok":
        pfn = pte_pfn(process.mm.tables.get(address & PAGE_MASK))
        bench.data.of(pfn)[op["offset"]] = ord(op["byte"]) & 0xFF
    return seen


def op_fork(bench: Bench, process: Process, op: Json) -> Json:
    """fork(2)."""
    child = dup_mmap(process.mm, op["child"])
    if isinstance(child, int):
        return _result(child)
    bench.fork(process, op["child"], child)
    return {"result": "ok"}


def op_exit(bench: Bench, process: Process, _op: Json) -> Json:
    """End without unmapping anything."""
    exit_mmap(process.mm)
    for name in [name for name, other in bench.processes.items() if other is process]:
        del bench.processes[name]
    return {"result": "ok"}


def op_observe(_bench: Bench, _process: Process, _op: Json) -> Json:
    """Only look."""
    return {}


def op_madvise(_bench: Bench, process: Process, op: Json) -> Json:
    """madvise(2)."""
    return _result(madvise(process.mm, *_range(process, op), op["advice"]))


def op_mprotect(_bench: Bench, process: Process, op: Json) -> Json:
    """mprotect(2)."""
    return _result(mprotect(process.mm, *_range(process, op), _prot(op["prot"])))


def op_mremap(_bench: Bench, process: Process, op: Json) -> Json:
    """mremap(2): the result is labelled ``to``; what did not move stays under ``map``."""
    old = process.mapping(op["map"])
    address = old.at(op["page"])
    flags = sum(_MREMAP[flag] for flag in op["flags"])
    moved = op.get("moved")
    new_address = process.mm.unused_area(op["new_pages"]) if "fixed" in op["flags"] else None
    result = mremap(
        process.mm,
        address,
        op["old_pages"],
        op["new_pages"],
        flags,
        new_address=new_address,
        in_place=None if moved is None else not moved,
    )
    if result >= 0:
        if result == address and op["to"] == op["map"]:
            old.pages = max(old.pages, op["page"] + op["new_pages"])
        else:
            process.labels[op["to"]] = Mapping(result, op["new_pages"])
    return _result(result)


def op_mlock(_bench: Bench, process: Process, op: Json) -> Json:
    """mlock(2)."""
    return _result(mlock(process.mm, *_range(process, op)))


def op_munlock(_bench: Bench, process: Process, op: Json) -> Json:
    """munlock(2)."""
    return _result(munlock(process.mm, *_range(process, op)))


def op_mlockall(_bench: Bench, process: Process, op: Json) -> Json:
    """mlockall(2)."""
    flags = op["flags"]
    return _result(mlockall(process.mm, current="current" in flags, future="future" in flags))


def op_munlockall(_bench: Bench, process: Process, _op: Json) -> Json:
    """munlockall(2)."""
    return _result(munlockall(process.mm))


def op_msync(_bench: Bench, process: Process, op: Json) -> Json:
    """msync(2)."""
    flags = op["flags"]
    return _result(
        msync(
            process.mm,
            *_range(process, op),
            sync="sync" in flags,
            asynchronous="async" in flags,
            invalidate="invalidate" in flags,
        )
    )


def _gup(*, fast: bool, pin: bool) -> Callable[[Bench, Process, Json], Json]:
    def take(bench: Bench, process: Process, op: Json) -> Json:
        """Take one page, look at it while it is held, and let it go."""
        done, held = take_page(
            process.mm,
            _address(process, op),
            write=op["write"],
            force=op["force"],
            fast=fast,
            pin=pin,
        )
        if done < 0:
            return _result(done)
        (pfn,) = held
        memory = bench.machine.memory
        seen = {
            "result": "page",
            "page": "anon" if memory.flags[pfn] & PG_ANON else "file",
            "frame": bench.page_name(pfn),
            "refcount_held": memory.ref[pfn],
        }
        put_user_pages(process.mm, held, pin=pin)
        return seen

    return take


def op_process_vm_readv(_bench: Bench, process: Process, op: Json) -> Json:
    """process_vm_readv(2) on itself."""
    return _counted(process_vm_rw(process.mm, _address(process, op), op["bytes"]).result)


def op_process_vm_writev(_bench: Bench, process: Process, op: Json) -> Json:
    """process_vm_writev(2) on itself."""
    data = op["data"].encode("latin-1")
    return _counted(process_vm_rw(process.mm, _address(process, op), len(data), data=data).result)


def op_proc_mem_read(_bench: Bench, process: Process, op: Json) -> Json:
    """pread(2) of /proc/self/mem."""
    return _counted(access_remote_vm(process.mm, _address(process, op), op["bytes"]).result)


def op_proc_mem_write(_bench: Bench, process: Process, op: Json) -> Json:
    """pwrite(2) of /proc/self/mem."""
    data = op["data"].encode("latin-1")
    address = _address(process, op)
    return _counted(access_remote_vm(process.mm, address, len(data), data=data).result)


def op_ptrace_peek(bench: Bench, _process: Process, op: Json) -> Json:
    """PTRACE_PEEKDATA: one word of a stopped child; anything short of a word is EIO."""
    target = bench.processes.get(op["target"])
    if target is None:
        return {"result": "ESRCH"}
    word = 8
    moved = access_remote_vm(target.mm, _address(target, op), word)
    if moved.result == LIVELOCK:
        return _result(LIVELOCK)
    return {"result": "ok" if moved.result == word else "EIO"}


def _user_buffer(process: Process, op: Json, *, write: bool) -> Json | None:
    """copy_from_user / copy_to_user: faults like an access, and a signal is EFAULT."""
    seen = _touch(process, _address(process, op), op["bytes"], write=write)
    return {"result": "EFAULT"} if seen["result"] != "ok" else None


def op_pipe_write(bench: Bench, process: Process, op: Json) -> Json:
    """write(2) into the pipe: the bytes are copied, no page is taken."""
    failed = _user_buffer(process, op, write=False)
    return failed or _counted(bench.pipe.write(op["bytes"]))


def op_vmsplice(bench: Bench, process: Process, op: Json) -> Json:
    """vmsplice(2): the page itself."""
    return _counted(bench.pipe.vmsplice(process.mm, _address(process, op), op["bytes"]))


def op_pipe_read(bench: Bench, _process: Process, op: Json) -> Json:
    """read(2) from the pipe, non-blocking."""
    return _counted(bench.pipe.read(op["bytes"]))


def op_direct_write(_bench: Bench, process: Process, op: Json) -> Json:
    """O_DIRECT write from the page."""
    return _counted(direct_io(process.mm, _address(process, op), op["bytes"], write=False))


def op_read_into(_bench: Bench, process: Process, op: Json) -> Json:
    """read(2) of another file into the page. What the file holds is not recorded."""
    failed = _user_buffer(process, op, write=True)
    return failed or {"result": "ok", "bytes": op["bytes"]}


def op_file_read(bench: Bench, _process: Process, op: Json) -> Json:
    """read(2) of a page of the mapped file into another buffer."""
    thing = bench.object(op["object"])
    pfn = thing.read_page(op["page"])
    if pfn < 0:
        return _result(pfn)
    return {"result": "ok", "data": bench.text(pfn, 0, min(op["bytes"], TEXT_BYTES))}


def op_migrate(bench: Bench, _process: Process, op: Json) -> Json:
    """The driver changes what backs a file page."""
    thing = bench.object(op["object"])
    return _result(thing.migrate(op["page"], op["to"], even_cows=op["even_cows"]))


def op_clear_refs(_bench: Bench, process: Process, op: Json) -> Json:
    """Write to /proc/self/clear_refs."""
    return _result(clear_refs(process.mm, op["value"]))


OPERATIONS: Final[dict[str, Callable[[Bench, Process, Json], Json]]] = {
    "get_user_pages": _gup(fast=False, pin=False),
    "get_user_pages_fast": _gup(fast=True, pin=False),
    "pin_user_pages_fast": _gup(fast=True, pin=True),
    **BEYOND,
    **{
        name.removeprefix("op_"): function
        for name, function in list(globals().items())
        if name.startswith("op_")
    },
}
