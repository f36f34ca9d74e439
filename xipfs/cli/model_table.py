"""``xipfs model table``: the seed's three arguments for VM_MIXEDMAP, computed again."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from xipfs.errors import UsageError
from xipfs.mm.arguments import MappingRow, gup_costs, gup_mix, mappings, memmap
from xipfs.mm.rules import Rules
from xipfs.units import PAGE_SIZE, format_size, parse_size


def configure_table(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("table", choices=("memmap", "mappings", "gup"), help="which argument")
    parser.add_argument("--json", action="store_true", help="the rows as one JSON object")
    parser.add_argument(
        "--image-size", default="1G", metavar="SIZE", help="memmap: size of the image (1G)"
    )
    parser.add_argument(
        "--guests", default="1,10,64,65,74,100,128,129", metavar="G,...", help="memmap: how many"
    )
    parser.add_argument("--rules", default="6.1", metavar="NAME", help="mappings, gup: rule set")
    parser.add_argument("--pages", default="1,8,64,512", metavar="N,...", help="gup: pages a call")
    parser.add_argument("--threads", default="1,2,8", metavar="T,...", help="gup: threads")
    parser.add_argument("--seed", type=int, default=1, help="gup: where the XIP pages lie (1)")


def run_table(args: argparse.Namespace) -> int:
    """Print one table."""
    tables = {"memmap": _memmap, "mappings": _mappings, "gup": _gup}[args.table](args)
    if args.json:
        answer = {
            title: [dataclasses.asdict(row) for row in rows] for title, rows in tables.items()
        }
        print(json.dumps({"table": args.table, **answer}, indent=2))
        return 0
    if args.table == "mappings":
        _print_mappings(tables)
        return 0
    console = Console(width=79, highlight=False)
    for title, rows in tables.items():
        print(title)
        console.print(_as_table(rows))
    if args.table == "memmap":
        print("The claim, made for 100 guests: their struct pages outweigh the image.")
        print("It holds for struct pages of 56 and 64 bytes, and not for 32 (32-bit machines).")
    return 0


def _numbers(name: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--{name} {text}", expected="whole numbers above 0, as in 1,8,64")
    return [int(word) for word in words]


def _memmap(args: argparse.Namespace) -> dict[str, Sequence[Any]]:
    size = parse_size(args.image_size)
    if size < PAGE_SIZE:
        raise UsageError(f"--image-size {args.image_size}", expected="a page of 4096 bytes or more")
    rows = memmap(size, _numbers("guests", args.guests))
    return {f"struct pages of a {format_size(size)} image": rows}


def _mappings(args: argparse.Namespace) -> dict[str, Sequence[Any]]:
    return {f"what mappings hold, count and copy, rules {args.rules}": mappings(
        Rules.parse(args.rules)
    )}  # fmt: skip


def _gup(args: argparse.Namespace) -> dict[str, Sequence[Any]]:
    rules = Rules.parse(args.rules)
    pages = _numbers("pages", args.pages)
    costs = gup_costs(pages, _numbers("threads", args.threads))
    mix = [row for n in pages if n <= 512 for row in gup_mix(
        rules, (0, 1, 5, 10, 25, 50, 100), n, 500, args.seed
    )]  # fmt: skip
    return {
        "locks and atomics of one call a thread, pages mapped": costs,
        f"calls that leave the lockless path, rules {args.rules}, seed {args.seed}": mix,
    }


def _print_mappings(tables: dict[str, Sequence[MappingRow]]) -> None:
    """Print the rows with each BUG_ON as a footnote: the conditions are wider than the table."""
    bugs: dict[str, int] = {}
    for title, rows in tables.items():
        print(title)
        heading = ("mapping", "inserted by", "struct page", "result", "ref map rss", "write")
        print("{:19} {:16} {:11} {:8} {:>11}  {}".format(*heading))
        for row in rows:
            result = row.result
            if result.startswith("BUG_ON"):
                result = f"BUG [{bugs.setdefault(result, len(bugs) + 1)}]"
            counts = (row.refcount_change, row.mapcount_change, row.rss_change)
            counted = " ".join(f"{_cell(count):>3}" for count in counts)
            has_page = "yes" if row.page == "struct page" else "no"
            print(
                f"{row.mapping:19} {row.insert:16} {has_page:11} {result:8} {counted:>11}"
                f"  {row.write}"
            )
    for condition, number in bugs.items():
        print(f"[{number}] {condition}")


def _as_table(rows: Sequence[Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for field in dataclasses.fields(rows[0]):
        numeric = all(not isinstance(getattr(row, field.name), str) for row in rows)
        table.add_column(
            field.name.replace("_", " "), justify="right" if numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in dataclasses.astuple(row)))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
