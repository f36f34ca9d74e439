"""A comparison as a table for people, under 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

WIDTH = 79
_NAME = 24


def as_table(comparison: Mapping[str, Any]) -> str:
    """Return one comparison: a row a candidate, then the figures told beside it."""
    unit = str(comparison["metric"]).replace("_", " ")
    against = f"x {comparison['baseline']}"
    lines = [
        *textwrap.wrap(str(comparison["title"]), WIDTH),
        f"{unit:{_NAME}}{'median':>10}{'low':>10}{'high':>10}  {against[:23]:>23}",
    ]
    for name, row in comparison["candidates"].items():
        figures = "".join(f"{_number(row[key]):>10}" for key in ("median", "low", "high"))
        lines.append(f"{name[:_NAME]:{_NAME}}{figures}  {_ratio(row['ratio']):>23}")
    for name, row in comparison["candidates"].items():
        if row["also"]:
            told = ", ".join(
                f"{figure.replace('_', ' ')} {_number(values['median'])}"
                for figure, values in row["also"].items()
            )
            lines += textwrap.wrap(
                f"{name}: {told}", WIDTH, initial_indent="  ", subsequent_indent="    "
            )
    lines += textwrap.wrap(f"$ {comparison['command']}", WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Return ``value`` with as many digits as a noisy machine justifies."""
    if value == int(value) and abs(value) < 10**9:
        return str(int(value))
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _ratio(ratio: Mapping[str, float]) -> str:
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
