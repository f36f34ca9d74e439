"""What a metadata operation writes depends neither on the image's size nor on the directory's."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest
from media import new_medium, open_medium

ROOT = 1
REG = stat.S_IFREG | 0o644
#: Lines flushed by an operation that finds room in its leaf: the journal's and those at home.
MOST_LINES = 32


def lines_of_operations(blocks: int, names: int) -> dict[str, int]:
    """Return the lines that each operation flushes, in a directory of so many names."""
    medium = new_medium(blocks)
    fs = open_medium(medium)
    directory = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    for number in range(names):
        fs.mknod(directory, b"n%06d" % number, REG, 0, 0, 0)
    file = fs.mknod(directory, b"file", REG, 0, 0, 0).ino
    operations: dict[str, Callable[[], object]] = {
        "create": lambda: fs.mknod(directory, b"new", REG, 0, 0, 0),
        "chmod": lambda: fs.setattr(file, mode=0o600),
        "link": lambda: fs.link(file, directory, b"link"),
        "rename": lambda: fs.rename(directory, b"new", directory, b"newer"),
        "unlink": lambda: fs.unlink(directory, b"link"),
        "truncate": lambda: fs.setattr(file, size_bytes=1 << 40),
    }
    lines = {}
    for what, operation in operations.items():
        before = medium.flushed_lines
        operation()
        lines[what] = medium.flushed_lines - before
    fs.close()
    return lines


def test_lines_do_not_depend_on_the_images_size() -> None:
    assert lines_of_operations(400, 5) == lines_of_operations(20_000, 5)


@pytest.mark.parametrize("names", [5, 100, 3000])
def test_lines_are_bounded_in_a_directory_of_any_size(names: int) -> None:
    lines = lines_of_operations(4000, names)
    print(names, lines)
    assert max(lines.values()) <= MOST_LINES, lines
