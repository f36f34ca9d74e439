"""``xipfs replay TRACE``: a recording run again, under another policy, RAM or medium."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xipfs.cli.client import Json
from xipfs.cli.policy import policy_of
from xipfs.cli.progress import progress_bar
from xipfs.cli.stat import most_lines
from xipfs.errors import UsageError
from xipfs.memory.profiles import load_profile
from xipfs.replay.choice import DELAY_NS, Choice
from xipfs.replay.outcome import outcome, replay_file
from xipfs.units import PAGE_SIZE, format_ns, format_size, parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a file of `xipfs record`")
    parser.add_argument(
        "--policy", metavar="NAME|FILE.py[,KEY=VALUE...]", help="default: the recorded one"
    )
    parser.add_argument(
        "--ram", metavar="SIZE", help="in whole pages, rounded down (default: the recorded mount's)"
    )
    parser.add_argument("--medium", metavar="NAME|FILE:TABLE", help="estimate costs on this medium")
    parser.add_argument(
        "--delay-us",
        type=int,
        default=DELAY_NS // 1000,
        metavar="US",
        help="from a plan to its moves, if not as recorded (default %(default)s)",
    )
    parser.add_argument(
        "--hottest", type=int, metavar="N", help="also list the N pages that faulted most"
    )
    parser.add_argument(
        "--moved", type=int, metavar="N", help="also list the N pages that moved most"
    )
    parser.add_argument("--moves", action="store_true", help="with --json: list every move")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Replay; exits 1 if moves differ that must be the recorded ones, or the policy failed."""
    if args.delay_us < 0:
        raise UsageError(f"--delay-us {args.delay_us}", expected="0 or more")
    if args.moves and not args.json:
        raise UsageError("--moves without --json", expected="both")
    for option, count in (("--hottest", args.hottest), ("--moved", args.moved)):
        if count is not None and count < 1:
            raise UsageError(f"{option} {count}", expected="1 or more")
    policy, values = policy_of(args.policy) if args.policy else (None, {})
    choice = Choice(
        policy=policy,
        values=values,
        ram_bytes=ram_of(args.ram),
        profile=None if args.medium is None else load_profile(args.medium),
        delay_ns=args.delay_us * 1000,
    )
    with progress_bar("replaying") as progress:
        replay = replay_file(args.trace, choice, progress)
    answer = outcome(replay)
    if args.hottest is not None:
        answer["hottest"] = replay.heat.hottest(args.hottest)
    if args.moved is not None:
        answer["moved"] = replay.history.pages.most_moved(args.moved)
    if args.moves:
        answer["moves"] = [{"ino": ino, "page": at, "to": to} for ino, at, to in replay.moves]
    print(json.dumps(answer, indent=2) if args.json else as_text(answer))
    differs = answer["replay"]["exact"] and answer["replay"]["moves_differ"] > 0
    return int(differs or bool(answer["migration"]["failure"]))


def ram_of(text: str | None) -> int | None:
    """Return a size in whole pages, in bytes."""
    if text is None:
        return None
    size = parse_size(text)
    if not PAGE_SIZE <= size <= 1 << 40:
        raise UsageError(f"--ram {text}", expected=f"{PAGE_SIZE} bytes to 1T")
    return size // PAGE_SIZE * PAGE_SIZE


def as_text(answer: Json) -> str:
    """Return the figures for people, under 80 columns."""
    replay, recorded, told = answer["replay"], answer["recorded"], answer["migration"]
    ram = answer["memory"]["ram_bytes"]
    before = format_size(recorded["ram_bytes"])
    lines = [
        f"replayed under {named(told['policy'], told['parameters'])}, RAM {format_size(ram)}",
        f"recorded under {named(recorded['policy'], recorded['parameters'])}, RAM {before}",
    ]
    if told["failure"]:
        lines.append(f"  a policy failed, and was off from then on: {told['failure']}")
    if replay["exact"]:
        same = "the recorded moves" if not replay["moves_differ"] else "moves that DIFFER"
        lines.append(f"as recorded: {same}")
    if replay["policy_files_changed"]:
        lines.append("  the policy's files are not what they were when it was recorded")
    lines += [f"  not in the trace: {name} {n}" for name, n in recorded["lost"].items() if n]
    lines += ["", *(f"{name:22}{value:14}" for name, value in answer["vmstat"].items())]
    lines += ["", f"{'touches':22}{replay['touches']:14}"]
    lines.append(f"{'  in RAM':22}{replay['touches_in_ram']:14}")
    for name in ("refaults", "pingpong"):
        lines.append(f"{name:22}{told[name]:14}")
    for cause in told["by_cause"]:
        count = cause["promoted"] + cause["demoted"]
        lines.append(f"{'moved':22}{count:14}  to {cause['to']}: {cause['reason']}")
    for reason, count in told["fail_reasons"].items():
        lines.append(f"{'refused':22}{count:14}  {reason} ({told['fail_errno'][reason]})")
    if not replay["as_recorded"]:
        lines += ["", "against the recording"]
        for name in ("faults_left_out", "faults_made", "ptes_taken"):
            lines.append(f"{name:22}{replay[name]:14}")
    lines += ["", *_cost_lines(answer["cost"])]
    lines += most_lines(answer)
    return "\n".join(lines)


def named(policy: str, values: Json) -> str:
    """Return a policy with its parameters as one writes them."""
    return ",".join([policy, *(f"{key}={value}" for key, value in values.items() if value)])


def _cost_lines(cost: Json) -> list[str]:
    names = ("nvram_read_bytes", "nvram_written_bytes", "nvram_fences", "ram_frame_seconds")
    medium = "" if cost["medium"] is None else f" on {cost['medium']}"
    lines = [f"modelled cost{medium}", *(f"{name:22}{cost[name]:14}" for name in names)]
    for name in ("read_ns_estimated", "write_ns_estimated"):
        if name in cost:
            lines.append(f"{name:22}{cost[name]:14}  ({format_ns(cost[name])})")
    return lines
