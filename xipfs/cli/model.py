"""``xipfs model``: the mm model by command files, against recordings, and as tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xipfs.cli.model_table import configure_table, run_table
from xipfs.errors import EXIT_FAILURE, UsageError
from xipfs.mm.audit import check as audit
from xipfs.mm.oracle.command_file import CommandFile, read_command_file
from xipfs.mm.oracle.picture import describe_step, draw
from xipfs.mm.oracle.replay import (
    Difference,
    FileResult,
    Replay,
    StepState,
    check_file,
    diff_rules,
)
from xipfs.mm.rules import Rules, rule_set_names

Json = dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="check|run|diff|table")
    check = verbs.add_parser("check", help="compare the model with recordings of real kernels")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE", help="or a directory of them")
    check.add_argument("--json", action="store_true", help="one JSON object, in one line")
    run_ = verbs.add_parser("run", help="run a command file and print the state after each step")
    run_.add_argument("file", type=Path, metavar="FILE")
    run_.add_argument("--picture", action="store_true", help="draw pages instead of JSON lines")
    run_.add_argument("--rules", metavar="NAME", help="rule set (default: what the file says)")
    diff = verbs.add_parser("diff", help="run a command file under two rule sets")
    names = ", ".join(rule_set_names())
    diff.add_argument("left", metavar="ERA_A", help=names)
    diff.add_argument("right", metavar="ERA_B", help="as ERA_A")
    diff.add_argument("file", type=Path, metavar="FILE")
    diff.add_argument(
        "--json", action="store_true", help="one JSON object for each step, in a line"
    )
    configure_table(verbs.add_parser("table", help="the arguments for VM_MIXEDMAP as tables"))


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    if args.action == "check":
        return check(args.files, as_json=args.json)
    if args.action == "run":
        return run_file(args.file, picture=args.picture, rules=args.rules)
    if args.action == "table":
        return run_table(args)
    return diff(args.left, args.right, args.file, as_json=args.json)


def recordings(paths: list[Path]) -> Iterator[Path]:
    """Yield the files named, and those of directories named, in order of name."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(path.glob("*.jsonl"))
        if not found:
            raise UsageError(f"no command file in {path}", expected="files named *.jsonl")
        yield from found


def check(paths: list[Path], *, as_json: bool) -> int:
    """Replay recordings; the last line is the total. Returns 1 if anything differs."""
    commands = [read_command_file(path) for path in recordings(paths)]
    results = []
    for file in commands:
        result = check_file(file)
        results.append(result)
        if not as_json:
            for difference in result.differences:
                print(difference_line(file, difference))
    steps = sum(result.steps for result in results)
    differ = sum(result.differing_steps for result in results)
    if as_json:
        total = {"steps": steps, "agree": steps - differ, "differ": differ}
        print(json.dumps({"schema": 1, **total, "files": [file_json(r) for r in results]}))
    else:
        print(f"{steps} steps, {steps - differ} agree, {differ} differ")
    return EXIT_FAILURE if differ else 0


def difference_line(file: CommandFile, difference: Difference) -> str:
    """Return one difference as a line that an editor can jump by."""
    step = file.steps[difference.step]
    note = f" ({step.note})" if step.note else ""
    rules = f"; rules {difference.rules}" if difference.rules else ""
    return (
        f"{file.path}:{step.line}: step {difference.step} {step.op['name']}{note}:"
        f" {difference.field}: recorded {difference.recorded!r}, model {difference.model!r}{rules}"
    )


def difference_json(difference: Difference) -> Json:
    """Return one difference for machines; values that are no JSON become text."""
    return {
        "step": difference.step,
        "field": difference.field,
        "recorded": difference.recorded,
        "model": difference.model,
        "rules": difference.rules,
    }


def file_json(result: FileResult) -> Json:
    """Return one file's result for machines."""
    return {
        "file": str(result.commands.path),
        "steps": result.steps,
        "agree": result.agreeing_steps,
        "differ": result.differing_steps,
        "differences": [difference_json(difference) for difference in result.differences],
    }


def rules_for(file: CommandFile, name: str) -> Rules:
    """Return the rule set ``name``, without the special bit where the file's machine has none."""
    rules = Rules.parse(name)
    special = bool(rules.pte_special) and bool(file.header["pte_special"])
    return Rules(rules.era, pte_special=special, debug_vm=file.header["debug_vm"])


def step_json(replay: Replay, done: StepState) -> Json:
    """Return a step and the state after it for machines."""
    line: Json = {"step": done.step.number, "who": done.step.who, "op": done.step.op}
    if done.stopped:
        line["stopped"] = done.stopped
    else:
        line["state"] = replay.state(done, replay.label_of(done.step))
    return line


def run_file(path: Path, *, picture: bool, rules: str | None) -> int:
    """Run one file; returns 1 if a step could not be run.

    The machine is recounted after each step, up to a BUG_ON, after which nothing has a meaning.
    """
    file = read_command_file(path)
    replay = Replay(file, None if rules is None else rules_for(file, rules))
    failed = crashed = False
    for done in replay.steps():
        failed = failed or bool(done.stopped)
        crashed = crashed or done.outcome.get("result") == "BUG"
        if picture:
            print("\n".join(draw(replay.bench, done)))
        else:
            print(json.dumps(step_json(replay, done)))
        if not crashed:
            audit(replay.bench.machine, holders=replay.bench.holders())
    return EXIT_FAILURE if failed else 0


def diff(left: str, right: str, path: Path, *, as_json: bool) -> int:
    """Run one file under two rule sets and show where they part; 1 if they do."""
    file = read_command_file(path)
    one, other = rules_for(file, left), rules_for(file, right)
    parted = 0
    for done, differences in diff_rules(file, one, other):
        parted += bool(differences)
        if as_json:
            shown = [
                {"field": d.field, one.name: d.recorded, other.name: d.model, "rules": d.rules}
                for d in differences
            ]
            print(json.dumps({"step": done.step.number, "differences": shown}))
            continue
        if differences:
            print(describe_step(done))
        for d in differences:
            values = f"{one.name} {d.recorded!r}, {other.name} {d.model!r}"
            print(f"      {d.field}: {values}; rules {d.rules}")
    if not as_json:
        print(f"{len(file.steps)} steps, {one.name} and {other.name} part in {parted}")
    return EXIT_FAILURE if parted else 0
