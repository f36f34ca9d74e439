"""A snapshot as OpenMetrics text, for Prometheus and what speaks its language.

The text is a view of ``stats.json`` and ``moved.N.json`` and says nothing that is not there. Names:
``xipfs_`` and the counter's own name; a counter ends in ``_total`` as the format demands. Times
stay whole nanoseconds. What a medium would have taken has ``modelled`` in its name.
Source: the OpenMetrics 1.0 specification; the tests read it with prometheus-client's parser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

Labels = Mapping[str, object]
Json = Mapping[str, Any]

_COUNTS: Final = {
    "promoted": "pages moved from XIP to pagecache",
    "demoted": "pages moved from pagecache to XIP",
    "moved_bytes": "bytes of pages moved",
    "failed": "pages refused for good",
    "refaults": "first faults of pages after a move",
    "pingpong": "pages moved back within the window",
}
#: Those of the counts that ``vmstat`` has no total of.
_TOTALS: Final = ("moved_bytes", "refaults", "pingpong")
_FAULTS: Final = ("pgfault", "pgmajfault", "pgfault_xip", "pgfault_pagecache", "pgfault_cow")
_WRITEBACK: Final = ("background", "expired", "throttled")
_COST: Final = {
    "nvram_read_bytes": "bytes read from NVRAM",
    "nvram_written_bytes": "bytes written to NVRAM",
    "nvram_fences": "fences of NVRAM",
    "read_ns_estimated": "estimated nanoseconds of NVRAM reads",
    "write_ns_estimated": "estimated nanoseconds of NVRAM writes",
    "ram_frame_seconds": "frames in use times seconds",
}


class _Text:
    """Lines of metric families; each family is written in one piece."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def family(self, name: str, kind: str, about: str, samples: Iterable[str]) -> None:
        lines = list(samples)
        if lines:
            self.lines += [f"# TYPE {name} {kind}", f"# HELP {name} {_escaped(about)}", *lines]

    def counter(self, name: str, about: str, values: Iterable[tuple[Labels, float]]) -> None:
        samples = (_sample(f"{name}_total", labels, value) for labels, value in values)
        self.family(name, "counter", about, samples)

    def gauge(self, name: str, about: str, values: Iterable[tuple[Labels, float]]) -> None:
        self.family(name, "gauge", about, (_sample(name, *value) for value in values))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _sample(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escaped(str(word))}"' for key, word in labels.items())
    return f"{name}{{{shown}}} {value}" if shown else f"{name} {value}"


def openmetrics(stats: Json) -> str:
    """Return the text of a snapshot, as in ``stats.json``, and of the pages ``moved`` most."""
    text = _Text()
    mount = stats["mount"]
    info = {name: mount[name] for name in ("image", "label", "mountpoint", "rules")}
    info |= {"observer": stats["observer"]["mode"], "version": stats["version"]}
    text.family("xipfs_mount", "info", "what is mounted", [_sample("xipfs_mount_info", info, 1)])
    for name, value in stats["vmstat"].items():
        about = f"{name} of the modelled machine"
        if name.startswith("nr_"):
            text.gauge(f"xipfs_{name}", about, [({}, value)])
        else:
            text.counter(f"xipfs_{name}", about, [({}, value)])
    text.counter(
        "xipfs_observer_lost", "events that the observer lost", [({}, stats["observer"]["lost"])]
    )
    failures = stats["background"]["failures"].items()
    text.counter(
        "xipfs_background_failures",
        "exceptions in work that no request waits for",
        (({"task": task}, count) for task, count in failures),
    )
    writeback = stats["writeback"]
    text.gauge("xipfs_nr_dirty", "dirty pages", [({}, writeback["nr_dirty"])])
    text.counter(
        "xipfs_writeback",
        "pages written home by cause",
        (({"why": why}, writeback[f"{why}_pages"]) for why in _WRITEBACK),
    )
    for name, value in stats["memory"].items():
        if isinstance(value, int):
            text.gauge(f"xipfs_{name}", f"{name} of the modelled machine", [({}, value)])
    _processes(text, stats["processes"])
    _cost(text, stats["cost"])
    _policy(text, stats["migration"])
    _migration(text, stats["migration"], stats["moved"])
    return "\n".join([*text.lines, "# EOF"]) + "\n"


def _processes(text: _Text, processes: list[Json]) -> None:
    # Several address spaces can have had one pid, one after the other: a sample each would clash.
    sums: dict[tuple[int, str], dict[str, int]] = {}
    for line in processes:
        counts = sums.setdefault((line["pid"], line["comm"]), dict.fromkeys(_FAULTS, 0))
        for name in _FAULTS:
            counts[name] += line[name]
    for name in _FAULTS:
        values = (({"pid": pid, "comm": comm}, n[name]) for (pid, comm), n in sums.items())
        text.counter(f"xipfs_process_{name}", f"{name} by process", values)
    incomplete = {(line["pid"], line["comm"]) for line in processes if line["incomplete"]}
    text.gauge(
        "xipfs_process_incomplete",
        "1: events were lost while the process ran, so its figures may be too low",
        (({"pid": pid, "comm": comm}, int((pid, comm) in incomplete)) for pid, comm in sums),
    )


def _cost(text: _Text, cost: Json) -> None:
    labels = {} if cost["medium"] is None else {"medium": cost["medium"]}
    for name, about in _COST.items():
        if name in cost:
            text.counter(f"xipfs_modelled_{name}", f"{about}, modelled", [(labels, cost[name])])
    wear = cost["wear"]["hottest"]
    most = wear[0]["line_writes"] if wear else 0
    text.gauge(
        "xipfs_modelled_wear_line_writes_max", "line writes of the hottest block", [({}, most)]
    )
    text.gauge(
        "xipfs_modelled_wear_blocks",
        "blocks by how many line writes they had",
        (
            ({"line_writes": reached}, count)
            for reached, count in cost["wear"]["blocks_by_line_writes"].items()
        ),
    )


def _policy(text: _Text, migration: Json) -> None:
    text.family(
        "xipfs_policy",
        "info",
        "the policy that acts",
        [_sample("xipfs_policy_info", {"policy": migration["policy"], "dry": migration["dry"]}, 1)],
    )
    for name, about in (("asked", "asked for by"), ("planned", "let through of")):
        text.counter(f"xipfs_policy_{name}", f"moves {about} the policy", [({}, migration[name])])
    text.gauge(
        "xipfs_policy_moves_under_way",
        "moves let through and not carried out yet",
        [({}, migration["moves_under_way"])],
    )
    text.counter(
        "xipfs_policy_would_move",
        "pages that a dry policy would have moved",
        (
            ({"to": line["to"], "reason": line["reason"]}, line["count"])
            for line in migration["would_move"]
        ),
    )
    held_back = migration["held_back"].items()
    text.counter(
        "xipfs_policy_held_back",
        "moves asked for and not let through",
        (({"why": why}, count) for why, count in held_back),
    )


def _migration(text: _Text, migration: Json, pages: list[Json]) -> None:
    for table, keys, shown in (
        ("by_cause", ("policy", "reason", "to"), migration["by_cause"]),
        ("by_file", ("ino",), migration["by_file"]),
        ("by_process", ("pid",), migration["by_process"]),
        ("by_page", ("ino", "index"), pages),
    ):
        lines = [
            ({key: "" if line[key] is None else line[key] for key in keys}, line)
            for line in shown
            # The sum of the other lines falls when one of them is shown: it is no counter.
            if any(line[key] is not None for key in keys)
        ]
        for name, about in _COUNTS.items():
            text.counter(
                f"xipfs_migration_{table}_{name}",
                f"{about}, {table.replace('_', ' ')}",
                ((labels, line[name]) for labels, line in lines),
            )
    for name in _TOTALS:
        text.counter(f"xipfs_migration_{name}", _COUNTS[name], [({}, migration[name])])
    text.counter(
        "xipfs_migration_pages_forgotten",
        "moved pages whose refaults and ping-pong are not counted any more",
        [({}, migration["pages_forgotten"])],
    )
    reasons = migration["fail_reasons"].items()
    text.counter(
        "xipfs_migration_failed",
        "pages refused for good",
        (({"why": why, "errno": migration["fail_errno"][why]}, count) for why, count in reasons),
    )
    text.family(
        "xipfs_migration_step_ns",
        "histogram",
        "nanoseconds of a chunk in each step of the migration protocol",
        [line for step, each in migration["step_ns"].items() for line in _histogram(step, each)],
    )


def _histogram(step: str, figures: Json) -> Iterable[str]:
    """Yield one histogram's samples: buckets count up, and hold what is not above ``le``."""
    name, labels, count = "xipfs_migration_step_ns", {"step": step}, 0
    for bucket in figures["buckets"]:
        count += bucket["count"]
        le = float(bucket["below_ns"] - 1)
        yield _sample(f"{name}_bucket", labels | {"le": le}, count)
    yield _sample(f"{name}_bucket", labels | {"le": "+Inf"}, figures["count"])
    yield _sample(f"{name}_count", labels, figures["count"])
    yield _sample(f"{name}_sum", labels, figures["sum_ns"])
