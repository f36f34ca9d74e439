"""``xipfs policy list | test NAME|FILE``: the policies there are, and what one is worth."""

from __future__ import annotations

import argparse
import json
from typing import Any

from xipfs.errors import UsageError
from xipfs.migrate.registry import find_policy, make_policy, parameters, policies
from xipfs.replay.simulate import TRACES, optimum, replay, seeded_trace


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("action", choices=("list", "test"))
    parser.add_argument("policy", nargs="?", metavar="NAME|FILE", help="the policy to test")
    parser.add_argument("values", nargs="*", metavar="KEY=N", help="its parameters")
    parser.add_argument("--frames", type=int, default=200, help="RAM in pages (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the traces (default 1)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """List, or replay the seeded traces."""
    if args.action == "list":
        rows = [_row(name, source) for name, source in sorted(policies().items())]
        lines = [f"{row['name']:10} {row['about']}" for row in rows]
    elif args.policy is None:
        raise UsageError("policy test without a policy", expected="NAME or FILE.py")
    elif args.frames < 1:
        raise UsageError(f"--frames {args.frames}", expected="1 or more")
    else:
        values = [_value(word) for word in args.values]
        rows = [_compare(args, values, trace) for trace in TRACES]
        lines = ["hits in RAM   policy     fifo  optimum  (writes to the region: policy, fifo)"]
        lines += [
            f"{row['trace']:10} {row['hits']:9} {row['fifo_hits']:8} {row['optimum_hits']:8}"
            f"  ({row['writes_to_region']}, {row['fifo_writes_to_region']})"
            for row in rows
        ]
    print(json.dumps(rows, indent=2) if args.json else "\n".join(lines))
    return 0


def _row(name: str, source: str) -> dict[str, Any]:
    policy = find_policy(name)
    module = __import__(policy.__module__, fromlist=["__doc__"])
    about = (module.__doc__ or "").strip().partition("\n")[0]
    return {"name": name, "source": source, "parameters": parameters(policy), "about": about}


def _value(word: str) -> tuple[str, int]:
    key, _, value = word.partition("=")
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UsageError(f"parameter {word!r}", expected="KEY=N, N a whole number of 1 or more")
    return key, int(value)


def _compare(args: argparse.Namespace, values: list[tuple[str, int]], name: str) -> dict[str, Any]:
    trace = seeded_trace(name, args.seed)
    outcome = replay(trace, make_policy(args.policy, values), args.frames)
    fifo = replay(trace, make_policy("fifo", []), args.frames)
    return {
        "trace": name,
        **vars(outcome),
        "fifo_hits": fifo.hits,
        "fifo_writes_to_region": fifo.writes_to_region,
        "optimum_hits": optimum(trace, args.frames),
    }
