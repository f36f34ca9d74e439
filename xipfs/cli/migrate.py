"""``xipfs migrate PATH... --to KIND``: move pages on a live mount between the two kinds."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xipfs.cli.client import Json, RequestError, request
from xipfs.cli.named_files import Named, named_files
from xipfs.cli.progress import progress_bar
from xipfs.errors import EXIT_FAILURE, MountError, UsageError, XipfsError
from xipfs.fuse.mounts import Mount
from xipfs.migrate.refusals import PASSES_MAX, errnos_of
from xipfs.units import format_ns, parse_page_ranges

#: Files, or page ranges, of one request to the daemon, which takes less than 128 KiB; it answers
#: with progress over all of them.
BATCH_FILES: Final = 1000
BATCH_RANGES: Final = 2000


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="regular files on the mount"
    )
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="take directories with all files below"
    )
    parser.add_argument("--to", choices=("pagecache", "xip"), required=True, help="the new kind")
    parser.add_argument(
        "--pages", metavar="A-B,...", help="only these pages, as in 0-15,20 (one file; default all)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="move nothing; say what would move, and its cost"
    )
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Move the pages; exit code 1 if any was refused."""
    one = len(args.paths) == 1 and not args.recursive
    if args.pages is not None and not one:
        raise UsageError("--pages with more than one file", expected="one FILE without -r")
    ranges = None if args.pages is None else parse_page_ranges(args.pages)
    named = named_files(args.paths, recursive=args.recursive)
    _refuse_read_only(named, dry=args.dry_run)
    if args.dry_run:
        return _dry_run(args, named, ranges)
    outcome = Outcome(args.to, args.paths[0] if one else None)
    try:
        _move(outcome, named, ranges)
    except (XipfsError, KeyboardInterrupt) as error:
        # Who asked must hear of what was moved all the same.
        if outcome.begun or isinstance(error, KeyboardInterrupt):
            outcome.stopped = str(error) or "interrupted"
            outcome.print(as_json=args.json)
        raise
    outcome.print(as_json=args.json)
    return EXIT_FAILURE if outcome.failed() else 0


def _refuse_read_only(named: Named, *, dry: bool) -> None:
    """Refuse all before anything is moved, if a mount cannot take the request."""
    for mountpoint, mount in named.mounts.items():
        if "ro" in mount.options:
            why = "it takes no request, nor a dry run" if dry else "no page can change its kind"
            raise MountError(
                f"{mountpoint} is mounted read-only: {why}", remedy="mount it read-write"
            )


@dataclass
class Outcome:
    """What became of the files so far; ``file`` where only one was asked for."""

    to: str
    file: Path | None
    tallies: dict[Path, Json] = field(default_factory=dict)
    under_way: int = 0
    """Pages that have moved by a request whose answer has not come."""
    begun: bool = False
    stopped: str = ""

    def add(self, path: Path, tally: Json) -> None:
        """Add what became of pages of ``path``."""
        known = self.tallies.setdefault(path, {"moved": 0, "already": 0, "failed": {}})
        for name in ("moved", "already"):
            known[name] += tally[name]
        known["failed"] = dict(Counter(known["failed"]) + Counter(tally["failed"]))

    def failed(self) -> dict[str, int]:
        """Return how many pages were refused, by reason."""
        failed: Counter[str] = Counter()
        for tally in self.tallies.values():
            failed.update(tally["failed"])
        return dict(failed)

    def _describe(self) -> Json:
        failed = self.failed()
        sums = {
            name: sum(tally[name] for tally in self.tallies.values())
            for name in ("moved", "already")
        }
        sums["moved"] += self.under_way
        answer: Json = {} if self.file is None else {"file": str(self.file)}
        answer |= {"to": self.to, **sums, "failed": failed, "failed_errno": errnos_of(failed)}
        if self.file is None:
            answer["files"] = [
                {"file": str(path), **tally, "failed_errno": errnos_of(tally["failed"])}
                for path, tally in self.tallies.items()
            ]
        return answer | ({"stopped": self.stopped} if self.stopped else {})

    def print(self, *, as_json: bool) -> None:
        """Print the outcome, or what there is of it if it was stopped."""
        answer = self._describe()
        if as_json:
            print(json.dumps(answer, indent=2))
            return
        what = f"{len(self.tallies)} files" if self.file is None else f"{self.file}"
        least = "stopped; at least " if self.stopped else ""
        print(
            f"{what}: {least}{answer['moved']} pages moved to {self.to}, "
            f"{answer['already']} already there, {sum(answer['failed'].values())} refused"
        )
        for reason, count in answer["failed"].items():
            print(f"  refused: {count} {reason} ({refusal(answer['failed_errno'][reason])})")


def refusal(name: str) -> str:
    """Return what a refused page's errno, given by its name, means to who asked for the move."""
    text = f"{name}: {os.strerror(getattr(errno, name))}"
    return f"{text}; tried {PASSES_MAX} times" if name == "EAGAIN" else text


def _dry_run(args: argparse.Namespace, named: Named, ranges: list[range] | None) -> int:
    """Print what would move, mount by mount; exit code 1 if any page would be refused now."""
    failed = Counter({"gone": len(named.gone)} if named.gone else {})
    mounts: list[Json] = []
    for mountpoint, names in named.files.items():
        path = next(iter(names.values())) if len(names) == 1 else None
        wanted = [_wanted(ino, ranges) for ino in names]
        arguments = {"to": args.to, "dry_run": True, "files": wanted}
        outcome = _answer(named.mounts[mountpoint], arguments, path)
        for move in outcome["moves"]:
            move["file"] = str(names[move["ino"]])
        failed.update(outcome["failed"])
        mounts.append({"mount": str(mountpoint), **outcome})
    if args.json:
        sums = {name: sum(each[name] for each in mounts) for name in ("would_move", "already")}
        refused = {"failed": dict(failed), "failed_errno": errnos_of(failed)}
        answer = {"dry_run": True, "to": args.to, **sums, **refused, "mounts": mounts}
        print(json.dumps(answer, indent=2))
    else:
        for each in mounts:
            print(_dry_text({"to": args.to, **each}))
        if not mounts:
            print("no file is there, nothing was moved")
        if named.gone:
            print(f"would be refused now: {len(named.gone)} gone ({errnos_of(['gone'])['gone']})")
    return EXIT_FAILURE if failed else 0


def _dry_text(outcome: Json) -> str:
    """Return a dry run for people."""
    failed = outcome["failed"].items()
    first = (
        f"{outcome['mount']}: {outcome['would_move']} pages would move to {outcome['to']}, "
        f"{outcome['already']} already there, nothing was moved"
    )
    lines = [
        first,
        *(
            f"  would be refused now: {count} {reason} ({outcome['failed_errno'][reason]})"
            for reason, count in failed
        ),
        *(
            f"  {move['file']} pages {move['first']}-{move['first'] + move['count'] - 1}"
            f" ({move['reason']})"
            for move in outcome["moves"]
        ),
    ]
    cost, saved = outcome["cost"], outcome["saved"]
    lines.append(
        f"modelled: {cost['nvram_read_bytes']} bytes read from NVRAM, "
        f"{cost['nvram_written_bytes']} written, {cost['nvram_fences']} fences"
    )
    lines.append(
        f"modelled: RAM {outcome['ram_bytes_more']:+d} bytes, struct pages "
        f"{outcome['struct_page_bytes_more']:+d} bytes, {outcome['would_evict']} pages evicted"
    )
    if outcome["medium"] is not None:
        load_ns, store_ns = saved["load_ns_estimated"], saved["store_ns_estimated"]
        lines.append(
            f"modelled on {outcome['medium']}: {format_ns(cost['ns_estimated'])}; from RAM a "
            f"later load is {format_ns(load_ns)} faster, a store {format_ns(store_ns)}"
        )
    return "\n".join(lines)


def _wanted(ino: int, ranges: list[range] | None) -> Json:
    if ranges is None:
        return {"ino": ino}
    return {"ino": ino, "ranges": [[pages.start, len(pages)] for pages in ranges]}


def _move(outcome: Outcome, named: Named, ranges: list[range] | None) -> None:
    """Move all files, mount by mount."""
    for path in named.gone:
        outcome.add(path, {"moved": 0, "already": 0, "failed": {"gone": 1}})
    for mountpoint, names in named.files.items():
        for batch in _batches(names, ranges):
            only = names[batch[0]["ino"]] if len(batch) == 1 else None
            arguments = {"to": outcome.to, "files": batch}
            answer = _answer(named.mounts[mountpoint], arguments, only, outcome)
            for tally in answer["files"]:
                outcome.add(names[tally["ino"]], tally)


def _batches(names: dict[int, Path], ranges: list[range] | None) -> Iterator[list[Json]]:
    """Return what to ask for, request by request: one must be short."""
    if ranges is None:
        inos = list(names)
        for start in range(0, len(inos), BATCH_FILES):
            yield [_wanted(ino, None) for ino in inos[start : start + BATCH_FILES]]
        return
    (ino,) = names
    # The last first: if the file has no such pages nothing has moved by then.
    for start in reversed(range(0, len(ranges), BATCH_RANGES)):
        yield [_wanted(ino, ranges[start : start + BATCH_RANGES])]


def _answer(
    mount: Mount, arguments: Json, path: Path | None, outcome: Outcome | None = None
) -> Json:
    """Run one request with a progress bar and return its result; ``path`` if it is of one file."""
    result: Json | None = None
    try:
        with progress_bar("migrating") as progress:
            for answer in request(mount, "migrate", **arguments):
                if "result" in answer:
                    result = answer["result"]
                    continue
                done = answer["progress"]
                progress(done["pages_done"], done["pages_total"])
                if outcome is not None:
                    outcome.begun, outcome.under_way = True, done["pages_moved"]
    except RequestError as error:
        if path is not None:
            error.what = f"{path}: {error.what}"
        raise
    if result is None:
        raise MountError("the daemon gave no answer to 'migrate'", remedy="see the daemon's log")
    if outcome is not None:
        outcome.begun, outcome.under_way = True, 0
    return result
