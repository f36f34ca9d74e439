"""``xipfs policy list|show|test|set``: the policies, what one is worth, which one acts."""

from __future__ import annotations

import argparse
import json
import traceback
from pathlib import Path

from xipfs.cli.client import Json, request
from xipfs.errors import UsageError, XipfsError
from xipfs.fuse.mounts import mount_of
from xipfs.fuse.patience import Patience
from xipfs.migrate.registry import (
    about,
    find_policy,
    make_policy,
    parameters,
    policies,
    said_by,
)
from xipfs.options import policy_value
from xipfs.replay.simulate import TRACES, optimum, replay, seeded_trace


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="name each policy")
    show = actions.add_parser("show", help="say what a policy does, by which signals")
    test = actions.add_parser("test", help="replay seeded traces beside FIFO and the optimum")
    test.add_argument("--frames", type=int, default=200, help="RAM in pages (default 200)")
    test.add_argument("--seed", type=int, default=1, help="of the traces (default 1)")
    change = actions.add_parser("set", help="change the policy of a live mount")
    change.add_argument("directory", type=Path, metavar="DIR", help="anything on the mount")
    show.add_argument("policy", metavar="NAME|FILE.py")
    for each in (test, change):
        each.add_argument("policy", metavar="NAME|FILE.py[,KEY=VALUE...]")
    change.add_argument("--dry", action="store_true", help="count moves, make none")
    for each in actions.choices.values():
        each.add_argument("--json", action="store_true", help="the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what is asked."""
    answer, lines = {"list": _list, "show": _show, "test": _test, "set": _set}[args.action](args)
    print(json.dumps(answer, indent=2) if args.json else "\n".join(lines))
    return 0


def _list(_args: argparse.Namespace) -> tuple[list[Json], list[str]]:
    rows = []
    for name, source in policies().items():
        try:
            row = _row(name, source)
        except UsageError as error:
            # Somebody else's package; the other policies are there all the same.
            row = {"name": name, "source": source, "about": str(error)}
        row["about"] = row["about"].partition("\n")[0].removeprefix(f"policy={name}: ")
        rows.append(row)
    return rows, [f"{row['name']:10} {row['about']}" for row in rows]


def _show(args: argparse.Namespace) -> tuple[Json, list[str]]:
    row = _row(args.policy, policies().get(args.policy, args.policy))
    lines = [row["about"], ""]
    lines.append("signals     " + (", ".join(row["signals"]) or "none"))
    lines.append(f"source      {row['source']}")
    for name, default in row["parameters"].items():
        lines.append(f"{name:12}" + ("must be given" if default is None else f"default {default}"))
    return row, lines


def _row(name: str, source: str) -> Json:
    with Patience():
        policy = find_policy(name)
    return {
        "name": name,
        "source": source,
        "signals": sorted(policy.SIGNALS),
        "parameters": parameters(policy),
        "about": about(policy),
    }


def policy_of(text: str) -> tuple[str, dict[str, int | str]]:
    """Return name and parameters of ``NAME,KEY=VALUE``."""
    name, *words = text.split(",")
    return str(Path(name).absolute()) if name.endswith(".py") else name, _values(words)


def _values(words: list[str]) -> dict[str, int | str]:
    pairs = [word.partition("=") for word in words]
    for key, equals, value in pairs:
        if not equals:
            raise UsageError(f"parameter {key}{value!r}", expected="KEY=VALUE")
    return {key: policy_value(key, value) for key, _, value in pairs}


def _test(args: argparse.Namespace) -> tuple[list[Json], list[str]]:
    if args.frames < 1:
        raise UsageError(f"--frames {args.frames}", expected="1 or more")
    name, values = policy_of(args.policy)
    rows = [_compare(name, values, trace, args) for trace in TRACES]
    lines = [
        "        hits in RAM               writes to region  its moves",
        "trace   policy    fifo  optimum   policy    fifo    promote   demote pingpong",
    ]
    lines += [
        f"{row['trace']:7} {row['hits']:6} {row['fifo_hits']:7} {row['optimum_hits']:8}"
        f" {row['writes_to_region']:8} {row['fifo_writes_to_region']:7}"
        f" {row['promotions']:10} {row['demotions']:8} {row['pingpong']:8}"
        for row in rows
    ]
    return rows, lines


def _compare(
    policy: str, values: dict[str, int | str], name: str, args: argparse.Namespace
) -> Json:
    trace = seeded_trace(name, args.seed)
    patience = Patience()
    try:
        with patience:
            tested = make_policy(policy, values.items(), args.frames)
        outcome = replay(trace, tested, args.frames, patience)
    except (KeyboardInterrupt, UsageError):
        raise  # Ctrl-C, or said already
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise XipfsError(
            f"policy {policy} failed: {said_by(error)} in {where.filename}, line {where.lineno}"
        ) from None
    fifo = replay(trace, make_policy("fifo", [], args.frames), args.frames)
    return {
        "trace": name,
        **vars(outcome),
        "fifo_hits": fifo.hits,
        "fifo_writes_to_region": fifo.writes_to_region,
        "optimum_hits": optimum(trace, args.frames),
    }


def _set(args: argparse.Namespace) -> tuple[Json, list[str]]:
    name, values = policy_of(args.policy)
    mount = mount_of(args.directory)
    for path in map(Path, (name, *map(str, values.values()))):
        if path.is_absolute() and path.exists() and path.stat().st_dev == mount.st_dev:
            raise UsageError(
                f"{path} is on the mount itself, which waits for its policy",
                expected="a file on another filesystem",
            )
    (answer,) = request(mount, "policy", policy=name, values=values, dry=args.dry)
    now: Json = answer["result"]
    shown = "".join(f", {key}={value}" for key, value in now["parameters"].items())
    return now, [f"{args.directory}: policy {now['policy']}{shown}" + (", dry" * now["dry"])]
