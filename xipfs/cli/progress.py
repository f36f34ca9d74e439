"""How far it is, while pages move, rows are replayed or an image is checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import Progress

_LINE_PERCENT: Final = 10


@contextmanager
def progress_bar(what: str, *, lines: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show ``what``, and how much of it is done: the function given is told (done, in all).

    A bar if standard error is a terminal; else nothing, or with ``lines`` a line for every 10 %.
    """
    if lines and not sys.stderr.isatty():
        yield _lines(what)
        return
    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str) -> Callable[[int, int], None]:
    told = -_LINE_PERCENT

    def progress(done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // max(total, 1)
        if percent >= told + _LINE_PERCENT:
            told = percent - percent % _LINE_PERCENT
            print(f"{what}: {percent} %", file=sys.stderr, flush=True)

    return progress
