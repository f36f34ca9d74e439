"""The items of a trace that are no faults: what else changed the modelled machine, in order.

A recording is one stream. Its rows stand in the order in which they took effect in the daemon, so
whoever applies them one after the other to the same model has, at each fault, the machine that the
daemon had. Most items are the observer's events (``trace/events.py``); the others are requests and
changes that the filesystem served, and what policies decided.

A row's fields are columns where the trace has such a column, and members of the JSON object in
``detail`` where it has not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from xipfs.trace import events as ev

#: Columns of a row that is no fault, in this order.
ITEM_COLUMNS: Final = (
    "item",
    "time_ns",
    "mm",
    "pid",
    "tid",
    "comm",
    "address",
    "ino",
    "path",
    "page",
    "pages",
    "cause",
    "detail",
)
_OWN_COLUMNS: Final = frozenset(ITEM_COLUMNS) - {"item", "detail"}

_EVENTS: Final[dict[str, type[Any]]] = {
    "map": ev.Map,
    "unmap": ev.Unmap,
    "protect": ev.Protect,
    "mremap": ev.Move,
    "zap": ev.Zap,
    "doubt": ev.Doubt,
    "extent": ev.Extent,
    "split": ev.Split,
    "registered": ev.Registered,
    "fork": ev.Fork,
    "exit": ev.Exit,
    "around": ev.Around,
    "cache_add": ev.CacheAdd,
    "cache_delete": ev.CacheDelete,
    "lost": ev.Lost,
    "incomplete": ev.Incomplete,
    "unplaced": ev.Unplaced,
}
_NAMES: Final = {kind: name for name, kind in _EVENTS.items()}
#: Fields of events that stand in a column of another name.
_COLUMN_OF: Final = {"first": "page"}
_FIELD_OF: Final = {column: field for field, column in _COLUMN_OF.items()}

#: item: what it says, with the unit of each member of its detail. Written into every trace.
MEANINGS: Final[dict[str, str]] = {
    "fault": "one real fault; the only item with a charge",
    "map": "mm maps file ino; start, end (byte), pgoff (page), prot (PROT_ bits), shared, "
    "prot_known, fresh (true or false)",
    "unmap": "start, end (byte) of mm are mapped no more",
    "protect": "start, end (byte) have protection prot (PROT_ bits)",
    "mremap": "start, end (byte) became new_start, new_end (byte); keep_old (true or false)",
    "zap": "madvise dropped the PTEs of start, end (byte)",
    "doubt": "a call may have changed PTEs of start, end (byte); calls_unseen (true or false)",
    "extent": "start, end (byte) is one VMA of the kernel's",
    "split": "a call cut the mappings at start and end (byte)",
    "registered": "a preloaded library registered pid's mappings: no fault-around from here on",
    "fork": "child_mm (number) of child_pid is a copy of mm, without dontfork (byte ranges)",
    "exit": "mm is gone",
    "around": "fault-around tried the cached pages page..last of ino; page would lie at address; "
    "it mapped pages of them: mapped [[first, pages]], and unsure [[first, pages]] if at all",
    "cache_add": "the kernel's page cache took in pages from page on",
    "cache_delete": "the kernel's page cache dropped pages from page on",
    "lost": "records (number) were overwritten unread: what follows may lack items",
    "unplaced": "an access to page of a file that ended in SIGBUS, and whose pid was gone before "
    "the file, of this mount or not, was known; access (read, write or exec), mode (user or "
    "kernel)",
    "incomplete": "records were lost while mm of pid lived: faults of it may be missing",
    "start": "the recording begins; resident: [ino, page, dirty 0 or 1] of RAM, coldest first; "
    "faults, ptes (number) from before, which the trace does not hold; signals (number) that the "
    "policy had heard, and moves planned (number) that were not carried out; heard_ns (ns), the "
    "time of the latest signal",
    "mapped": "what of the last map the kernel had mapped when the recording began, by whichever "
    "faults: pages in all, mapped [[first, pages]], and unsure [[first, pages]] if at all",
    "file": "state of file ino before anything else of it: size_bytes, pagecache (kind of new "
    "pages, true or false), runs: [first page, pages, kind]",
    "read": "READ request of file ino: offset, size (byte)",
    "write": "WRITE request: offset, size (byte); cause: the kernel's write-back that xipfs "
    "caused by invalidating",
    "size": "file ino was cut or extended to size_bytes",
    "gone": "file ino was freed",
    "kind": "new pages of file ino take this kind: pagecache (true or false)",
    "sync": "dirty pages of file ino (none: of all files) were written home",
    "write_back": "up to pages were written home, those dirty for older_ns (ns) or longer",
    "move": "pages from page on were to become to (kind): moved [[first, pages]], refused "
    "{reason: [[first, pages]]}, by (policy or manual), reason",
    "give_up": "pages given [[first, pages]] that by (policy or manual) wanted to become to (kind) "
    "will not be tried again, for reason",
    "decide": "a decision point: the policy hears of the requests and faults since the last one, "
    "in the order of their times",
    "hint": "xipfs is about to take marked pages [ino, page] away for hint faults",
    "turn": "the moves planned since the last turn are carried out from here on, of two for one "
    "page the later; what is planned from here on waits for the next turn",
    "refused": "nothing will come of planned moves: [ino, page, kind]",
    "policy": "from here on policy decides, with parameters; dry (true or false): nothing moves; "
    "files_sha256 of what is not xipfs's own of it",
}

Row = dict[str, Any]
"""An item's values by column; a column without value is absent."""


def event_row(event: ev.Event) -> Row | None:
    """Return the event as a row; None for those whose faults say the same.

    >>> event_row(ev.CacheAdd(5, 3, 7, 2))
    {'item': 'cache_add', 'time_ns': 5, 'ino': 3, 'page': 7, 'pages': 2}
    """
    name = _NAMES.get(type(event))
    if name is None:
        return None
    fields = zip(event._fields, event, strict=True)
    return row(name, {_COLUMN_OF.get(field, field): value for field, value in fields})


def row(item: str, values: Mapping[str, Any]) -> Row:
    """Return an item's row: what has a column there, the rest as JSON in ``detail``."""
    made: Row = {"item": item}
    detail = {}
    for name, value in values.items():
        if name in _OWN_COLUMNS:
            made[name] = value
        else:
            detail[name] = value
    if detail:
        made["detail"] = json.dumps(detail, separators=(",", ":"))
    return made


def values_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's values by name, those of ``detail`` too: the inverse of ``row``."""
    values = {name: made[name] for name in _OWN_COLUMNS if made.get(name) is not None}
    detail = made.get("detail")
    return values | json.loads(detail) if detail else values


def event_of(made: Mapping[str, Any]) -> ev.Event | None:
    """Return the event that a row stands for, None if it stands for none.

    >>> event_of({"item": "cache_add", "time_ns": 5, "ino": 3, "page": 7, "pages": 2})
    CacheAdd(time_ns=5, ino=3, first=7, pages=2)
    """
    if made["item"] == "fault":
        return _fault_of(made)
    kind = _EVENTS.get(made["item"])
    if kind is None:
        return None
    values = {_FIELD_OF.get(name, name): value for name, value in values_of(made).items()}
    if kind is ev.Fork:
        values["dontfork"] = tuple((start, end) for start, end in values["dontfork"])
    event: ev.Event = kind(**{field: values[field] for field in kind._fields})
    return event


def _fault_of(made: Mapping[str, Any]) -> ev.Fault:
    return ev.Fault(
        made["time_ns"],
        made["mm"],
        made["pid"],
        made["tid"],
        made["address"],
        made["ino"],
        made["page"],
        write=made["access"] == "write",
        execute=made["access"] == "exec",
        user=made["mode"] == "user",
        protection=bool(made["protection"]),
        verdict=made["verdict"],
        origin=made["origin"],
    )
