"""Reading command files: one JSON object a line, the first of them the header.

What is malformed (no JSON, a missing or mistyped argument) is an error that names file, line and
field. What is well-formed but unknown here (an operation, a kind of object, an observed field) is
let through: the replay counts such a step as differing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from xipfs.errors import UsageError
from xipfs.units import PAGE_SIZE

FORMAT_VERSION: Final = 1

Json = dict[str, Any]

_Kind = tuple[str, tuple[type, ...]]
#: What an argument may be: how it is called in messages, and the types that pass.
_INT: Final[_Kind] = ("an integer of at least 0", (int,))
_STR: Final[_Kind] = ("a text", (str,))
_BOOL: Final[_Kind] = ("true or false", (bool,))
_LIST: Final[_Kind] = ("a list of texts", (list,))
_NAME: Final[_Kind] = ("a text or null", (str, type(None)))

_RANGE: Final[dict[str, _Kind]] = {"map": _STR, "page": _INT, "pages": _INT}
_BYTES: Final[dict[str, _Kind]] = {"map": _STR, "page": _INT, "offset": _INT, "bytes": _INT}
_STORE: Final[dict[str, _Kind]] = {"map": _STR, "page": _INT, "offset": _INT, "data": _STR}
_GUP: Final[dict[str, _Kind]] = {"map": _STR, "page": _INT, "write": _BOOL, "force": _BOOL}

#: Operation to its arguments; ``OPTIONAL`` ones may be missing.
ARGUMENTS: Final[dict[str, dict[str, _Kind]]] = {
    "mmap": {
        "map": _STR,
        "object": _NAME,
        "object_page": _INT,
        "pages": _INT,
        "prot": _STR,
        "flags": _LIST,
        "open": _STR,
    },
    "munmap": _RANGE,
    "read": _BYTES,
    "write": {"map": _STR, "page": _INT, "offset": _INT, "byte": _STR},
    "fork": {"child": _STR},
    "exit": {},
    "observe": {},
    "madvise": {**_RANGE, "advice": _STR},
    "mprotect": {**_RANGE, "prot": _STR},
    "mremap": {
        "map": _STR,
        "page": _INT,
        "old_pages": _INT,
        "new_pages": _INT,
        "flags": _LIST,
        "to": _STR,
        "moved": _BOOL,
    },
    "mlock": _RANGE,
    "munlock": _RANGE,
    "mlockall": {"flags": _LIST},
    "munlockall": {"flags": _LIST},
    "msync": {**_RANGE, "flags": _LIST},
    "get_user_pages": _GUP,
    "get_user_pages_fast": _GUP,
    "pin_user_pages_fast": _GUP,
    "process_vm_readv": _BYTES,
    "process_vm_writev": _STORE,
    "proc_mem_read": _BYTES,
    "proc_mem_write": _STORE,
    "ptrace_peek": {"target": _STR, "map": _STR, "page": _INT, "offset": _INT},
    "pipe_write": _BYTES,
    "vmsplice": _BYTES,
    "pipe_read": {"bytes": _INT},
    "direct_write": _BYTES,
    "read_into": _BYTES,
    "file_read": {"object": _STR, "page": _INT, "bytes": _INT},
    "migrate": {"object": _STR, "page": _INT, "to": _STR, "even_cows": _BOOL},
    "clear_refs": {"value": _INT},
    "truncate": {"object": _STR, "pages": _INT},
    "hold": {"map": _STR, "page": _INT, "write": _BOOL, "pin": _BOOL},
    "release": {},
}
OPTIONAL: Final = frozenset(
    {("mremap", "moved"), ("munlockall", "flags"), ("mmap", "open"), ("mmap", "object_page")}
)


class FormatError(UsageError):
    """A command file is malformed: which file, line and field, and what was expected."""

    def __init__(self, path: Path, line: int, field_: str, what: str, expected: str) -> None:
        super().__init__(f"{path}:{line}: field {field_}: {what}", expected=expected)


@dataclass(frozen=True)
class Step:
    """One operation and what was observed after it (empty: nothing was)."""

    number: int
    who: str
    op: Json
    observed: Json
    note: str
    quirk: str
    line: int


@dataclass(frozen=True)
class CommandFile:
    """A parsed file: its header, as read, and its steps in order."""

    path: Path
    header: Json
    steps: list[Step] = field(repr=False)

    @property
    def processes(self) -> list[str]:
        """Names of the processes; the first exists from the start."""
        names: list[str] = self.header["processes"]
        return names


class _Line:
    """One line's object, and the place to complain about."""

    def __init__(self, path: Path, line: int, value: Json) -> None:
        self.path = path
        self.line = line
        self.value = value

    def fail(self, name: str, what: str, expected: str) -> FormatError:
        return FormatError(self.path, self.line, name, what, expected)

    def get(self, name: str, kind: _Kind, where: Json | None = None, prefix: str = "") -> Any:
        """Return a required field, of the right type."""
        values = self.value if where is None else where
        if name not in values:
            raise self.fail(prefix + name, "missing", kind[0])
        value = values[name]
        if not _passes(value, kind):
            raise self.fail(prefix + name, repr(value), kind[0])
        return value

    def default(self, name: str, kind: _Kind, value: object) -> None:
        """Check an optional field, or give it its default."""
        if name in self.value:
            self.get(name, kind)
        else:
            self.value[name] = value


def _passes(value: Any, kind: _Kind) -> bool:
    if isinstance(value, bool) and bool not in kind[1]:
        return False
    if kind is _INT:
        return isinstance(value, int) and value >= 0
    if kind is _LIST:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind[1])


def read_command_file(path: Path) -> CommandFile:
    """Read and check ``path``; FormatError if it is malformed, UsageError if unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    lines = list(_json_lines(path, text))
    if not lines:
        raise FormatError(path, 1, "oracle", "the file is empty", "a header line")
    header = _header(lines[0])
    names = header["processes"]
    steps = [_step(line, number, names) for number, line in enumerate(lines[1:])]
    return CommandFile(path, header, steps)


def _json_lines(path: Path, text: str) -> Iterator[_Line]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise FormatError(
                path, number, "(line)", f"not JSON: {error}", "a JSON object"
            ) from error
        if not isinstance(value, dict):
            raise FormatError(path, number, "(line)", "not an object", "a JSON object")
        yield _Line(path, number, value)


def _header(line: _Line) -> Json:
    if line.get("oracle", _INT) != FORMAT_VERSION:
        raise line.fail("oracle", str(line.value["oracle"]), f"{FORMAT_VERSION}")
    line.default("experiment", _STR, line.path.stem)
    line.default("arch", _STR, "x86-64")
    line.default("pte_special", _BOOL, True)
    line.default("debug_vm", _BOOL, False)
    line.default("thp", _BOOL, True)
    line.default("ksm", _BOOL, True)
    line.default("swap", _BOOL, False)
    line.default("page_size_bytes", _INT, PAGE_SIZE)
    line.default("quirks", _LIST, [])
    line.default("frames", ("an object", (dict,)), {})
    if "anon_pages" in line.value:
        line.get("anon_pages", _INT)
    if line.value["page_size_bytes"] != PAGE_SIZE:
        raise line.fail("page_size_bytes", str(line.value["page_size_bytes"]), f"{PAGE_SIZE}")
    if not line.get("processes", _LIST):
        raise line.fail("processes", "[]", "at least one name")
    for name, frame in line.value["frames"].items():
        _frame(line, name, frame)
    for name, value in line.get("objects", ("an object", (dict,))).items():
        _object(line, name, value)
    return line.value


def _frame(line: _Line, name: str, frame: object) -> None:
    prefix = f"frames.{name}."
    if not isinstance(frame, dict):
        raise line.fail(f"frames.{name}", f"{frame!r}", "an object")
    region, colon, number = name.partition(":")
    if not frame.get("zero_page") and (not region or not colon or not number.isdigit()):
        raise line.fail(f"frames.{name}", "name", "region:number")
    line.get("struct_page", _BOOL, frame, prefix)
    for key in ("refcount", "mapcount"):
        if key in frame:
            line.get(key, _INT, frame, prefix)
    if "data" in frame:
        line.get("data", _STR, frame, prefix)


def _object(line: _Line, name: str, value: object) -> None:
    prefix = f"objects.{name}."
    if not isinstance(value, dict):
        raise line.fail(f"objects.{name}", f"{value!r}", "an object")
    line.get("kind", _STR, value, prefix)
    pages = line.get("pages", _INT, value, prefix)
    for key in ("backing", "frame", "data", "cached"):
        per_page = value.get(key)
        if per_page is None:
            continue
        if not isinstance(per_page, list) or len(per_page) != pages:
            raise line.fail(prefix + key, "wrong length or type", f"a list of {pages}")
    for key in ("vma_flags", "device_pages"):
        if key in value:
            line.get(key, _LIST, value, prefix)
    calls = value.get("at_mmap", [])
    if calls == "cramfs":
        return
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise line.fail(prefix + "at_mmap", f"{calls!r}", 'a list of calls, or "cramfs"')
    for number, call in enumerate(calls):
        at = f"{prefix}at_mmap[{number}]."
        kind = line.get("call", _STR, call, at)
        wanted = {"errno": _STR} if kind == "fail" else {"page": _INT, "frame": _STR}
        for key, type_ in wanted.items():
            line.get(key, type_, call, at)


def _step(line: _Line, number: int, processes: list[str]) -> Step:
    line.default("step", _INT, number)
    if line.value["step"] != number:
        raise line.fail("step", str(line.value["step"]), f"{number}")
    line.default("who", _STR, processes[0])
    line.default("observed", ("an object", (dict,)), {})
    line.default("note", _NAME, "")
    line.default("quirk", _NAME, "")
    op = line.get("op", ("an object", (dict,)))
    name = line.get("name", _STR, op, "op.")
    if line.value["who"] not in processes:
        raise line.fail("who", repr(line.value["who"]), "one of the header's processes")
    for argument, kind in ARGUMENTS.get(name, {}).items():
        if argument in op or (name, argument) not in OPTIONAL:
            line.get(argument, kind, op, "op.")
    _check_values(line, name, op)
    value = line.value
    note, quirk = value["note"] or "", value["quirk"] or ""
    return Step(number, value["who"], op, value["observed"], note, quirk, line.line)


def _check_values(line: _Line, name: str, op: Json) -> None:
    """Arguments whose type is right but whose value no call could mean."""
    if name in ("mmap", "mprotect") and op["prot"] != "none" and not set(op["prot"]) <= set("rwx"):
        raise line.fail("op.prot", repr(op["prot"]), '"none" or letters of "rwx"')
    if name == "mmap" and ("private" in op["flags"]) == ("shared" in op["flags"]):
        raise line.fail("op.flags", repr(op["flags"]), '"private" or "shared"')
    if name == "write" and len(op["byte"]) != 1:
        raise line.fail("op.byte", repr(op["byte"]), "one character")
    if name == "migrate" and op["to"] not in ("xip", "page"):
        raise line.fail("op.to", repr(op["to"]), '"xip" or "page"')
    if "offset" in op and op.get("map") is not None and op["offset"] >= PAGE_SIZE:
        raise line.fail("op.offset", str(op["offset"]), f"less than {PAGE_SIZE}")
