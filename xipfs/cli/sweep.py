"""``xipfs sweep TRACE``: one trace under many policies and sizes of RAM, in one table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xipfs import __version__
from xipfs.cli.client import Json
from xipfs.cli.policy import policy_of
from xipfs.cli.replay import ram_of
from xipfs.errors import UsageError
from xipfs.memory.profiles import load_profile
from xipfs.migrate.registry import make_policy
from xipfs.replay.cells import BOUND, Cell, Key, code_digest, digest_of
from xipfs.replay.choice import DELAY_NS
from xipfs.replay.sweep import Results, Told, locally, on_dask
from xipfs.replay.trace import recorded
from xipfs.stats.trace_file import TraceReader
from xipfs.units import PAGE_SHIFT, format_ns, format_size

#: Column heading, figure; the share of touches in RAM and of the bound come before them.
COLUMNS = (
    ("fault", "pgfault"),
    ("major", "pgmajfault"),
    ("promote", "pgpromote_success"),
    ("demote", "pgdemote_success"),
    ("evict", "pgevict"),
    ("pingpong", "pingpong"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file of `xipfs record`")
    parser.add_argument(
        "--policies", required=True, metavar="NAME[,KEY=VALUE...],NAME...", help="what to compare"
    )
    parser.add_argument(
        "--ram",
        required=True,
        metavar="SIZE,SIZE...",
        help="sizes of RAM, rounded down to whole pages",
    )
    parser.add_argument("--medium", metavar="NAME|FILE:TABLE", help="estimate costs on this medium")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RESULTS",
        help="results file; one that is there is gone on with",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes (default %(default)s)",
    )  # fmt: skip
    where.add_argument(
        "--dask", metavar="ADDRESS", help="run on this Dask cluster: tcp://HOST:PORT"
    )
    parser.add_argument("--json", action="store_true", help="the table as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what is missing of the grid and print the table; exits 1 if a cell failed."""
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}", expected="1 or more")
    cells = _cells(args)
    about = {
        "xipfs": __version__,
        "code_sha256": code_digest(),
        "trace_sha256": cells[0].digest,
        "medium": None if args.medium is None else asdict(load_profile(args.medium)),
        "delay_ns": DELAY_NS,
    }
    results = Results(args.output, about)
    errors: dict[Key, str] = {}
    try:
        missing = [cell for cell in cells if cell.key not in results.done]
        told = on_dask(missing, args.dask) if args.dask else locally(missing, args.jobs)
        for cell, figures, error in _shown(told if missing else iter(()), len(missing)):
            results.add(cell, figures, error)
            if figures is None:
                errors[cell.key] = error
    finally:
        results.close()
    rows = _rows(cells, results, errors)
    print(json.dumps(rows, indent=2) if args.json else as_text(args.trace, args.medium, rows))
    for (policy, _, ram_bytes), error in errors.items():
        print(f"{policy}, RAM {format_size(ram_bytes)}: {error}", file=sys.stderr)
    return int(bool(errors))


def _cells(args: argparse.Namespace) -> list[Cell]:
    """Return the grid, RAM by RAM, each with the bound first; all of it is checked now."""
    with TraceReader(args.trace) as trace:
        recorded(trace, args.trace)
    if args.medium is not None:
        load_profile(args.medium)
    path, digest = args.trace.absolute(), digest_of(args.trace)
    chosen = [(BOUND, {}), *policies_of(args.policies)]
    cells = []
    for word in args.ram.split(","):
        ram_bytes = ram_of(word)
        assert ram_bytes is not None, word
        for policy, values in chosen:
            files = ""
            if policy != BOUND:
                files = make_policy(policy, values.items(), ram_bytes >> PAGE_SHIFT).digest
            cells.append(
                Cell(
                    str(path), digest, policy, tuple(values.items()), files, ram_bytes,
                    None if policy == BOUND else args.medium, DELAY_NS, code_digest(),
                )
            )  # fmt: skip
    return list(dict.fromkeys(cells))


def policies_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names with parameters; a word with = belongs to the policy before it.

    >>> policies_of("tpp,window_ms=5,fifo")
    [('tpp', {'window_ms': 5}), ('fifo', {})]
    """
    groups: list[list[str]] = []
    for word in text.split(","):
        if "=" in word and groups:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [policy_of(",".join(group)) for group in groups]


def _shown(told: Iterator[Told], count: int) -> Iterator[Told]:
    """Pass the outcomes on, with a bar of how many cells are done on a terminal."""
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("cells", total=count)
        for each in told:
            yield each
            bar.advance(task)


def _rows(cells: list[Cell], results: Results, errors: dict[Key, str]) -> list[Json]:
    rows = []
    for cell in cells:
        row: Json = {"policy": cell.name, "ram_bytes": cell.ram_bytes}
        figures = results.done.get(cell.key)
        if figures is None:
            rows.append(row | {"error": errors[cell.key]})
            continue
        bound = results.done.get((BOUND, "", cell.ram_bytes))
        best = bound["touches_in_ram"] if bound else 0
        share = figures["touches_in_ram"] / best if best else None
        rows.append(row | figures | {"share_of_bound": share})
    return rows


def as_text(trace: Path, medium: str | None, rows: list[Json]) -> str:
    """Return the table, under 100 columns; with a medium's time under 110."""
    touches = next((row["touches"] for row in rows if "touches" in row), 0)
    about = "" if medium is None else f"; est. time: modelled on {medium}"
    lines = [f"{trace}: {touches} touches{about}"]
    heads = [f"{'RAM':>9} {'policy':20}{'in RAM':>8}{'%bound':>7}"]
    heads += [f"{head:>9}" for head, _ in COLUMNS]
    lines.append("".join(heads) + (f"{'est. time':>11}" if medium else ""))
    for row in rows:
        name, *values = row["policy"].split(",")
        shown = ",".join([Path(name).name, *values])
        start = f"{format_size(row['ram_bytes']):>9} {shown[:20]:20}"
        if "error" in row:
            lines.append(f"{start}{'failed':>8}")
            continue
        share = "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.1%}"[:-1]
        cells = "".join(f"{row.get(name, ''):>9}" for _, name in COLUMNS)
        spent = ""
        if "read_ns_estimated" in row:
            spent = f"{format_ns(row['read_ns_estimated'] + row['write_ns_estimated']):>11}"
        lines.append(f"{start}{row['touches_in_ram']:>8}{share:>7}{cells}{spent}".rstrip())
    return "\n".join(lines)
