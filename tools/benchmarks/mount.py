"""Mounting: does its time, or the daemon's memory, grow with the image or with its files?

One image of 64 GiB (sparse) holds a million files, the other is small and empty. Each is mounted
with default options; the time is from starting the command until a file (the empty image's: the
root) has been looked up. The daemon's memory is read right then, split as /proc/PID/status has it:
*anon* is the daemon's own, *file* are pages of the image (and of libraries) that it has touched
and the host can take back at any time.

The million files are made through the image's own parts, 1,000 a transaction: the same bytes as
one mknod each, in a third of the time. How long that took is told beside the settings.
"""

from __future__ import annotations

import functools
import re
import stat
import time
from pathlib import Path
from typing import Any

from benchmarks.support import mounts
from benchmarks.support.context import Context
from benchmarks.support.measure import Sample, compare
from xipfs.clock import SystemClock
from xipfs.fs.build import make_empty
from xipfs.image.layout import ROOT_INO
from xipfs.image.volume import Volume
from xipfs.memory.region import Region

NAME = "mount"
HELP = "a mount of 64 GiB with a million files beside one of a small, empty image"

BASELINE = "64 MiB, empty"
_MIB = 1 << 20
_FILES_PER_DIRECTORY = 1000
#: A file of the large image takes its inode's 128 bytes and its share of a leaf.
_BYTES_PER_FILE = 256


def run(context: Context) -> dict[str, Any]:
    """Measure both."""
    size_bytes, directories = (1 << 30, 10) if context.quick else (64 << 30, 1000)
    files = directories * _FILES_PER_DIRECTORY
    context.require_space(files * _BYTES_PER_FILE + 64 * _MIB)
    small, large = context.work / "small.img", context.work / "large.img"
    _make(small, 64 * _MIB)
    start_s = time.monotonic()
    _make(large, size_bytes)
    _fill(context, large, directories)
    context.settings |= {
        "image_bytes": size_bytes,
        "files": files,
        "image_made_in_s": round(time.monotonic() - start_s, 1),
    }
    many = f"{size_bytes >> 30} GiB, {files} files"
    last = f"{_directory_name(directories - 1)}/{_file_name(_FILES_PER_DIRECTORY - 1)}"
    candidates = {
        BASELINE: functools.partial(_mount, context, small, "."),
        many: functools.partial(_mount, context, large, last),
    }
    samples = context.alternate("mounting", candidates)
    context.comparisons.append(
        compare(
            "from the command to the first file looked up",
            samples,
            metric="mount_s",
            baseline=BASELINE,
            command="xipfs mount IMAGE DIR -o readahead=0",
        )
    )
    context.comparisons.append(
        compare(
            "the daemon's memory then",
            samples,
            metric="rss_mib",
            baseline=BASELINE,
            command="cat /proc/PID/status",
            also=("anon_mib", "file_mib"),
        )
    )
    return context.results()


def _make(path: Path, size_bytes: int) -> None:
    make_empty(path, size_bytes=size_bytes, label="", pagecache=False, clock=SystemClock())


def _fill(context: Context, image: Path, directories: int) -> None:
    """Make ``directories`` directories of empty files in an image that holds nothing yet."""
    region = Region(image, writable=True)
    task = context.progress.add_task("making files", total=directories)
    try:
        volume = Volume(region, str(image))
        now_ns = SystemClock().realtime_ns()
        for number in range(directories):
            with volume.transaction():
                _make_directory(volume, _directory_name(number), now_ns)
            context.progress.advance(task)
    finally:
        context.progress.remove_task(task)
        region.close()


def _make_directory(volume: Volume, name: str, now_ns: int) -> None:
    """Make a directory in the root and all of its files, in the open transaction."""
    root = volume.inodes.get(ROOT_INO)
    directory = volume.inodes.create()
    directory.mode, directory.nlink, directory.parent = stat.S_IFDIR | 0o755, 2, root.ino
    volume.directories.insert(root, name.encode(), directory.ino, stat.S_IFDIR >> 12)
    root.nlink += 1
    for number in range(_FILES_PER_DIRECTORY):
        file = volume.inodes.create()
        file.mode, file.nlink = stat.S_IFREG | 0o644, 1
        file.atime_ns = file.mtime_ns = file.ctime_ns = now_ns
        entry = _file_name(number).encode()
        volume.directories.insert(directory, entry, file.ino, stat.S_IFREG >> 12)
        volume.inodes.put(file)
    for inode in (root, directory):
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = now_ns
        volume.inodes.put(inode)


def _directory_name(number: int) -> str:
    return f"directory{number:04}"


def _file_name(number: int) -> str:
    return f"file{number:04}"


def _mount(context: Context, image: Path, name: str, _seed: int) -> Sample:
    start_s = time.perf_counter()
    with mounts.xipfs(context, image, 0, []) as mounted:
        (mounted.directory / name).stat()
        took_s = time.perf_counter() - start_s
        memory = _memory_mib(mounted.pid)
    return {"mount_s": took_s, **memory}


def _memory_mib(pid: int) -> Sample:
    """Return the resident memory of a process in MiB: its own, of files (tmpfs too), and both."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = {name: int(value) for name, value in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
    anon_mib = kib["RssAnon"] / 1024
    file_mib = (kib["RssFile"] + kib["RssShmem"]) / 1024
    return {"anon_mib": anon_mib, "file_mib": file_mib, "rss_mib": anon_mib + file_mib}
