"""Which files of which mounts the command line names: by paths, or by trees with all below."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from xipfs.cli.pages import file_of_mount
from xipfs.fuse.mounts import Mount, mount_on


@dataclass
class Named:
    """The files, each once: by mount (a mount point), by inode, a path of it."""

    files: dict[Path, dict[int, Path]] = field(default_factory=dict)
    mounts: dict[Path, Mount] = field(default_factory=dict)
    gone: list[Path] = field(default_factory=list)
    """Names that were in a directory when it was listed, and then not any more."""

    def add(self, mount: Mount, ino: int, path: Path) -> None:
        """Add a file, unless it is there by another name or path."""
        self.mounts[mount.mountpoint] = mount
        self.files.setdefault(mount.mountpoint, {}).setdefault(ino, path)


def named_files(paths: list[Path], *, recursive: bool) -> Named:
    """Return the files of ``paths``; what was named and is not there is an error."""
    named = Named()
    for path in paths:
        if recursive and path.is_dir():
            _add_tree(named, path)
        else:
            named.add(*file_of_mount(path), path)
    return named


def _add_tree(named: Named, tree: Path) -> None:
    # Of a directory's files nearly all are on one mount: /proc/self/mountinfo is read once.
    known: dict[tuple[Path, int], Mount] = {}
    for path in _names_below(tree):
        try:
            status = path.lstat()
        except FileNotFoundError:
            named.gone.append(path)
            continue
        if stat.S_ISREG(status.st_mode):
            at = path.parent, status.st_dev
            if at not in known:
                known[at] = mount_on(status.st_dev, path)
            named.add(known[at], status.st_ino, path)


def _names_below(tree: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(tree):
        subdirectories.sort()
        yield from (Path(directory, name) for name in sorted(names))
