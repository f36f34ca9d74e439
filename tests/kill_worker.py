"""What runs on a mount whose daemon is killed: programs that say what they do, and what is done.

It imports nothing of xipfs and no test: hundreds are started, and each should start at once.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
from pathlib import Path
from typing import Any

PAGE = 4096
MAX_FILE_BYTES = 40 * PAGE

Operation = list[Any]


def choose(rng: random.Random, files: dict[str, int]) -> Operation:
    """Return a random operation on a worker's files, given as name: size."""
    name = rng.choice(sorted(files)) if files and rng.random() < 0.8 else f"f{rng.randrange(12)}"
    offset = rng.randrange(MAX_FILE_BYTES - 3 * PAGE)
    kinds = ["write", "write", "write", "append"]
    if name in files:
        kinds += ["store", "truncate", "migrate", "migrate", "rename", "unlink"]
    kind = rng.choice(kinds)
    if kind == "append" or (kind == "store" and files[name] < 2 * PAGE):
        kind, offset = "write", min(files.get(name, 0), MAX_FILE_BYTES - 3 * PAGE)
    seed, size = rng.randrange(1 << 30), rng.choice([5, 700, PAGE, 2 * PAGE + 9])
    if kind == "store":
        pages = files[name] // PAGE
        return ["write", name, rng.randrange(pages) * PAGE, 512, seed, "store"]
    if kind == "write":
        return ["write", name, offset, size, seed, "fsync"]
    if kind == "truncate":
        return ["truncate", name, rng.randrange(MAX_FILE_BYTES)]
    if kind == "migrate":
        return ["migrate", name, rng.choice(["xip", "pagecache"])]
    if kind == "rename":
        return ["rename", name, f"f{rng.randrange(12)}"]
    return ["unlink", name]


def bytes_of(seed: int, size: int) -> bytes:
    """Return what a write with this seed writes."""
    return random.Random(seed).randbytes(size)


def perform(operation: Operation, control: Path) -> None:
    """Carry one operation out in the working directory; when it returns, it is promised."""
    kind, name, *rest = operation
    if kind == "write":
        offset, size, seed, how = rest
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT)
        try:
            if how == "store":
                with mmap.mmap(descriptor, 0) as mapped:
                    mapped[offset : offset + size] = bytes_of(seed, size)
                    mapped.flush()
            else:
                os.pwrite(descriptor, bytes_of(seed, size), offset)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    elif kind == "truncate":
        os.truncate(name, rest[0])
    elif kind == "rename":
        os.rename(name, rest[0])
    elif kind == "unlink":
        os.unlink(name)
    else:
        request = {"op": "migrate", "ino": os.stat(name).st_ino, "to": rest[0]}
        descriptor = os.open(control, os.O_RDWR)
        try:
            os.write(descriptor, json.dumps(request).encode())
            while os.read(descriptor, 1 << 16):
                pass
        finally:
            os.close(descriptor)


def work(directory: Path, control: Path, seed: int) -> None:
    """Work until the mount dies, telling each operation before and after, as lines of JSON."""
    os.chdir(directory)
    rng = random.Random(seed)
    files = {entry.name: entry.stat().st_size for entry in os.scandir(".")}
    while True:
        operation = choose(rng, files)
        print(json.dumps(["begin", *operation]), flush=True)
        perform(operation, control)
        print(json.dumps(["done"]), flush=True)
        files = {entry.name: entry.stat().st_size for entry in os.scandir(".")}


# The program whose pages are migrated

NAME = "file"
PAGES = 8
HOLE = 5
#: Pages that it changes before; only the third is brought to fsync.
WRITTEN, STORED, SYNCED = 1, 2, 3
OLD, NEW = b"old word", b"new word"


def page_of(word: bytes) -> bytes:
    """Return a page full of ``word``."""
    return word * (PAGE // len(word))


def use_and_migrate(directory: Path, to: str) -> None:
    """Change pages as said above, then migrate all of the file; prints when that is done."""
    descriptor = os.open(directory / NAME, os.O_RDWR)
    mapped = mmap.mmap(descriptor, 0)
    control = os.open(directory / ".xipfs" / "control", os.O_RDWR)
    os.pwrite(descriptor, page_of(NEW), SYNCED * PAGE)
    os.fsync(descriptor)
    os.pwrite(descriptor, page_of(NEW), WRITTEN * PAGE)
    # A stat after the store would have the kernel send it home: the writes moved the mtime.
    request = {"op": "migrate", "ino": os.fstat(descriptor).st_ino, "to": to}
    mapped[STORED * PAGE : (STORED + 1) * PAGE] = page_of(NEW)
    os.write(control, json.dumps(request).encode())
    while os.read(control, 1 << 16):
        pass
    print("migrated", flush=True)


if __name__ == "__main__":
    try:
        if len(sys.argv) == 4:
            work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
        else:
            use_and_migrate(Path(sys.argv[1]), sys.argv[2])
    except OSError as error:
        # The mount is dead; an msync then ends in EIO.
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            raise
