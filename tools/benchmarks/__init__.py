"""What ``tools/bench`` can measure: one module a benchmark, found by being here.

A benchmark module has

- ``NAME``: the word on the command line;
- ``HELP``: one line that says what is compared with what;
- ``run(context) -> dict``: do it and return ``context.results()``, or any JSON-ready dict of the
  same shape: ``{"settings": {name: value}, "comparisons": [...]}``, each comparison made by
  ``support.measure.compare``.

``context`` (support.context.Context) says how many rounds, whether to be quick, where to keep
scratch files (a tmpfs directory), compiles C programs from tools/, alternates the candidates and
shows progress. A benchmark leaves nothing behind outside that directory; what it starts or mounts
it ends in a ``with`` block, so an interrupt ends it too.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol, cast

from benchmarks.support.context import Context


class Benchmark(Protocol):
    """What a module of this package has."""

    NAME: str
    HELP: str

    def run(self, context: Context) -> dict[str, Any]:
        """Measure; return settings and comparisons."""
        ...


def available() -> dict[str, Benchmark]:
    """Return every benchmark by its name, in alphabetical order."""
    found = [
        cast(Benchmark, importlib.import_module(f"{__name__}.{module.name}"))
        for module in pkgutil.iter_modules(__path__)
        if not module.ispkg
    ]
    return {benchmark.NAME: benchmark for benchmark in sorted(found, key=lambda each: each.NAME)}
