"""``xipfs migrate PATH... --to KIND``: move pages on a live mount between the two kinds."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xipfs.cli.client import Json, request
from xipfs.cli.pages import file_of_mount
from xipfs.cli.progress import progress_bar
from xipfs.errors import EXIT_FAILURE, MountError, UsageError
from xipfs.fuse.mounts import Mount
from xipfs.migrate.refusals import PASSES_MAX, errnos_of
from xipfs.units import format_ns, parse_page_ranges

#: Files of one request to the daemon: it answers with progress over all of them.
BATCH_FILES: Final = 1000


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
    if args.dry_run:
        return _dry_run(args)
    if one:
        outcome: Json = {"file": str(args.paths[0]), "to": args.to, **_one(args)}
    else:
        outcome = {"to": args.to, **_many(args)}
    if args.json:
        print(json.dumps(outcome, indent=2))
    else:
        what = outcome["file"] if "file" in outcome else f"{len(outcome['files'])} files"
        print(
            f"{what}: {outcome['moved']} pages moved to {args.to}, "
            f"{outcome['already']} already there, {sum(outcome['failed'].values())} refused"
        )
        for reason, count in outcome["failed"].items():
            print(f"  refused: {count} {reason} ({refusal(outcome['failed_errno'][reason])})")
    return EXIT_FAILURE if outcome["failed"] else 0


def refusal(name: str) -> str:
    """Return what a refused page's errno, given by its name, means to who asked for the move."""
    text = f"{name}: {os.strerror(getattr(errno, name))}"
    return f"{text}; tried {PASSES_MAX} times" if name == "EAGAIN" else text


def _one(args: argparse.Namespace) -> Json:
    mount, ino = file_of_mount(args.paths[0])
    return _answer(mount, {"to": args.to, **_wanted(args, ino)})


def _wanted(args: argparse.Namespace, ino: int) -> Json:
    if args.pages is None:
        return {"ino": ino}
    ranges = parse_page_ranges(args.pages)
    return {"ino": ino, "ranges": [[pages.start, len(pages)] for pages in ranges]}


def _dry_run(args: argparse.Namespace) -> int:
    """Print what would move on each mount; exit code 1 if any page would be refused now."""
    refused = False
    for mount, files in _by_mount(args):
        names = {ino: str(path) for ino, path in files}
        wanted = [_wanted(args, ino) for ino in names]
        outcome = _answer(mount, {"to": args.to, "dry_run": True, "files": wanted})
        for move in outcome["moves"]:
            move["file"] = names[move["ino"]]
        outcome = {"dry_run": True, "mount": str(mount.mountpoint), "to": args.to, **outcome}
        refused |= bool(outcome["failed"])
        print(json.dumps(outcome, indent=2) if args.json else _dry_text(outcome))
    return EXIT_FAILURE if refused else 0


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


def _many(args: argparse.Namespace) -> Json:
    """Move all files, mount by mount; a file reached by two names or paths moves once."""
    files: list[Json] = []
    for mount, of_mount in _by_mount(args):
        for start in range(0, len(of_mount), BATCH_FILES):
            batch = of_mount[start : start + BATCH_FILES]
            answer = _answer(mount, {"to": args.to, "files": [{"ino": ino} for ino, _ in batch]})
            for (_, path), tally in zip(batch, answer["files"], strict=True):
                files.append({"file": str(path)} | {k: v for k, v in tally.items() if k != "ino"})
    failed: Counter[str] = Counter()
    for tally in files:
        failed.update(tally["failed"])
    sums = {name: sum(tally[name] for tally in files) for name in ("moved", "already")}
    return {**sums, "failed": dict(failed), "failed_errno": errnos_of(failed), "files": files}


def _by_mount(args: argparse.Namespace) -> list[tuple[Mount, list[tuple[int, Path]]]]:
    """Return the mounts that the paths lie on, each with its files: inode and one path."""
    found: dict[tuple[Path, int], tuple[Mount, Path]] = {}
    for path in args.paths:
        for file in _files_below(path) if args.recursive else [path]:
            mount, ino = file_of_mount(file)
            found.setdefault((mount.mountpoint, ino), (mount, file))
    mounts = {mount.mountpoint: mount for mount, _ in found.values()}
    return [
        (mount, [(ino, path) for (where, ino), (_, path) in found.items() if where == mountpoint])
        for mountpoint, mount in mounts.items()
    ]


def _files_below(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for directory, subdirectories, names in os.walk(path):
        subdirectories.sort()
        for name in sorted(names):
            file = Path(directory, name)
            if file.is_file() and not file.is_symlink():
                yield file


def _answer(mount: Mount, arguments: Json) -> Json:
    """Run one request with a progress bar and return its result."""
    outcome: Json | None = None
    with progress_bar("migrating") as progress:
        for answer in request(mount, "migrate", **arguments):
            if "result" in answer:
                outcome = answer["result"]
            else:
                done = answer["progress"]
                progress(done["pages_done"], done["pages_total"])
    if outcome is None:
        raise MountError("the daemon gave no answer to 'migrate'", remedy="see the daemon's log")
    return outcome
