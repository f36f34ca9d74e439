"""``xipfs stat DIR [INTERVAL [COUNT]]``: what faults were charged, once or repeatedly."""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
import time
from pathlib import Path
from typing import Final

from xipfs.cli.client import Json, ask, ask_text
from xipfs.cli.fault_table import incomplete_lines
from xipfs.errors import UsageError
from xipfs.fuse.mounts import mount_of
from xipfs.units import format_ns, format_size

#: Column heading, counter of ``vmstat``; under 80 columns together.
COLUMNS: Final = (
    ("pgfault", "pgfault"),
    ("major", "pgmajfault"),
    ("xip", "pgfault_xip"),
    ("pcache", "pgfault_pagecache"),
    ("cow", "pgfault_cow"),
    ("extra", "pgfault_extra"),
    ("promote", "pgpromote_success"),
    ("demote", "pgdemote_success"),
)

HOT_COLUMNS: Final = {
    "pgfault": "pgfault",
    "xip": "pgfault_xip",
    "pcache": "pgfault_pagecache",
    "cow": "pgfault_cow",
}
MOVED_COLUMNS: Final = {
    "promote": "promoted",
    "demote": "demoted",
    "failed": "failed",
    "refault": "refaults",
    "back": "pingpong",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="anything on the mount")
    parser.add_argument(
        "interval", type=float, nargs="?", metavar="INTERVAL", help="repeat every so many seconds"
    )
    parser.add_argument("count", type=int, nargs="?", metavar="COUNT", help="stop after so many")
    parser.add_argument(
        "--hottest", type=int, metavar="N", help="also list the N pages that faulted most"
    )
    parser.add_argument(
        "--moved", type=int, metavar="N", help="also list the N pages that migrated most"
    )
    parser.add_argument(
        "--openmetrics", action="store_true", help="OpenMetrics text, as in .xipfs/metrics"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object (a line each if repeated)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the statistics."""
    for option, count in (("--hottest", args.hottest), ("--moved", args.moved)):
        if count is not None and (count < 1 or args.interval is not None):
            raise UsageError(f"{option} N", expected="N above 0, and no INTERVAL")
    if args.interval is None:
        return _once(args)
    if args.openmetrics:
        raise UsageError("--openmetrics with INTERVAL", expected="one of them")
    if args.interval <= 0 or (args.count is not None and args.count < 1):
        raise UsageError("INTERVAL and COUNT", expected="numbers above 0")
    rounds = itertools.count() if args.count is None else range(args.count)
    mount = mount_of(args.directory)
    before: Json | None = None
    for number in rounds:
        if number:
            time.sleep(args.interval)
        stats = ask(mount, "stats.json")
        if args.json:
            print(json.dumps(stats), flush=True)
        else:
            if number % 20 == 0:
                print(" ".join(f"{heading:>9}" for heading, _ in COLUMNS))
            print(_row(stats["vmstat"], before), flush=True)
            before = stats["vmstat"]
    return 0


def _once(args: argparse.Namespace) -> int:
    mount = mount_of(args.directory)
    if args.openmetrics:
        print(ask_text(mount, "metrics"), end="")
        return 0
    stats = ask(mount, "stats.json" if args.hottest is None else f"hottest.{args.hottest}.json")
    if args.moved is not None:
        stats["moved"] = ask(mount, f"moved.{args.moved}.json")["moved"]
    print(json.dumps(stats, indent=2) if args.json else as_text(stats))
    return 0


def _migration_lines(migration: Json) -> list[str]:
    """Return what moved by cause; nothing if nothing did."""
    rows = migration["by_cause"]
    if not rows:
        return []
    lines = ["", f"{'policy':12} {'to':>9}{'pages':>9}{'failed':>9}{'refault':>9}{'back':>9}  why"]
    for row in rows:
        policy = "-" if row["policy"] is None else Path(row["policy"]).name
        counts = (row["promoted"] + row["demoted"], row["failed"], row["refaults"], row["pingpong"])
        lines.append(
            f"{policy[:12]:12} {row['to'] or '':>9}"
            + "".join(f"{count:9d}" for count in counts)
            + f"  {row['reason']}"
        )
    errnos = migration["fail_errno"]
    lines += [
        f"refused: {count} {reason} ({errnos[reason]})"
        for reason, count in migration["fail_reasons"].items()
    ]
    return lines


def _policy_lines(migration: Json) -> list[str]:
    """Return which policy acts, and what a dry one would have moved, cost and saved."""
    if migration["failure"]:
        told = f"policy failed and is off: {migration['failure']}"
        # A path in it stays whole, however long the line.
        return ["", *textwrap.wrap(told, 79, break_long_words=False, break_on_hyphens=False)]
    if migration["policy"] == "off":
        return []
    held_back = sum(migration["held_back"].values())
    name = Path(migration["policy"]).name + ", dry" * migration["dry"]
    lines = ["", f"policy {name}: {migration['asked']} moves asked for, {held_back} held back"]
    for row in migration["would_move"]:
        lines.append(f"  would move {row['count']} to {row['to']}: {row['reason']}")
    if (dry := migration["dry_run"]) is None:
        return lines
    cost, saved = dry["cost"], dry["saved"]
    lines.append(
        f"  modelled cost: {cost['nvram_read_bytes']} bytes read from NVRAM, "
        f"{cost['nvram_written_bytes']} written"
    )
    lines.append(
        f"  modelled saving: {dry['reads_in_ram']} reads and {dry['writes_in_ram']} writes in RAM, "
        f"{saved['nvram_written_bytes']} bytes"
    )
    if dry["medium"] is not None:
        lines.append(
            f"  modelled on {dry['medium']}: {format_ns(cost['ns_estimated'])} spent, "
            f"{format_ns(saved['ns_estimated'])} saved"
        )
    return lines


def _row(vmstat: Json, before: Json | None) -> str:
    """Return the counters since ``before``; since the mount on the first line, as vmstat(8)."""
    earlier = before or {}
    return " ".join(f"{vmstat[name] - earlier.get(name, 0):9d}" for _, name in COLUMNS)


def _cost_lines(cost: Json) -> list[str]:
    """Return what the region's use would have cost; nothing unless a medium was named."""
    if cost["medium"] is None:
        return []
    lines = ["", f"modelled cost on {cost['medium']}, one access after another"]
    for name in ("nvram_read_bytes", "nvram_written_bytes"):
        lines.append(f"{name:22}{cost[name]:14}  ({format_size(cost[name])})")
    lines.append(f"{'nvram_fences':22}{cost['nvram_fences']:14}")
    for name in ("read_ns_estimated", "write_ns_estimated"):
        lines.append(f"{name:22}{cost[name]:14}  ({format_ns(cost[name])})")
    lines.append(f"{'ram_frame_seconds':22}{cost['ram_frame_seconds']:14}")
    total = cost["struct_page_bytes_total"]
    lines.append(f"{'struct_page_bytes':22}{total:14}  ({format_size(total)})")
    for reached, blocks in cost["wear"]["blocks_by_line_writes"].items():
        lines.append(f"{'wear: blocks':22}{blocks:14}  with {reached} line writes")
    for hot in cost["wear"]["hottest"][:1]:
        mean = hot["cell_writes_block_mean"]
        lines.append(f"{'hottest block':22}{hot['block']:14}  ({hot['line_writes']} line writes)")
        lines.append(f"{'  writes a cell':22}{mean:14.1f}  (mean over the block's 64 lines)")
    return lines


def _page_lines(pages: list[Json], columns: dict[str, str]) -> list[str]:
    """Return a table of pages."""
    lines = ["", f"{'inode':>10} {'page':>10}" + "".join(f"{heading:>9}" for heading in columns)]
    for page in pages:
        counts = "".join(f"{page[name]:9d}" for name in columns.values())
        lines.append(f"{page['ino']:>10} {page['index']:>10}{counts}")
    return lines


def most_lines(stats: Json) -> list[str]:
    """Return the tables of the pages that moved and faulted most, where they were asked for."""
    lines = []
    for table, columns in (("moved", MOVED_COLUMNS), ("hottest", HOT_COLUMNS)):
        if table in stats:
            lines += _page_lines(stats[table], columns)
    return lines


def as_text(stats: Json) -> str:
    """Return one snapshot for people, under 80 columns."""
    observer, memory, kernel = stats["observer"], stats["memory"], stats["kernel"]
    lines = [f"{stats['mount']['mountpoint']}  ({stats['mount']['image']})"]
    if stats["mount"]["damage"]:
        lines += textwrap.wrap(f"damaged, read-only: {stats['mount']['damage']}", 79)
    if failures := stats["background"]["failures"]:
        counts = ", ".join(f"{task} {count} times" for task, count in failures.items())
        told = f"failed in the background (see the log): {counts}; last"
        lines += textwrap.wrap(f"{told} {stats['background']['last_error']}", 79)
    lines.append(
        f"observer {observer['mode']}: {observer['events']} events, {observer['lost']} lost"
    )
    if observer["reason"]:
        lines.append(f"  {observer['reason']}")
    for name, count in observer["unfollowed"].items():
        lines.append(f"  not followed: {name} ({count})")
    if kernel["faults"] is None:
        lines.append("kernel: its own faults are not known")
    else:
        lines.append(
            f"kernel: {kernel['faults']} faults ({kernel['major']} major, "
            f"{kernel['minor']} minor), {kernel['around']} pages by fault-around"
        )
    lines.append("")
    lines += [f"{name:22}{value:14}" for name, value in stats["vmstat"].items()]
    lines.append("")
    for name in ("ram_bytes", "nvram_bytes", "memmap_bytes", "memmap_saved_bytes"):
        lines.append(f"{name:22}{memory[name]:14}  ({format_size(memory[name])})")
    lines += _cost_lines(stats["cost"])
    lines += _policy_lines(stats["migration"])
    lines += _migration_lines(stats["migration"])
    processes = [process for process in stats["processes"] if process["pgfault"]]
    if processes:
        lines += ["", f"{'pid':>8} {'command':16}" + "".join(f"{h:>9}" for h, _ in COLUMNS[:6])]
        for process in processes:
            counts = "".join(f"{process[name]:9d}" for _, name in COLUMNS[:6])
            mark = "*" if process["incomplete"] else " "
            lines.append(f"{process['pid']:>8}{mark}{process['comm'][:16]:16}{counts}")
        lines += incomplete_lines(processes)
    return "\n".join([*lines, *most_lines(stats)])
