"""The trace file: a recorded stream in Parquet, described by the file itself.

The file's own metadata (keys ``xipfs.*``, JSON) tells schema version, the meaning of each item,
host, mount and losses. Parquet's footer is written last: a file without it is no recording, and is
refused. What a recording has until then is a file of its own beside it (partial_trace.py), which
can be read as well, if it is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from xipfs.stats.partial_trace import STREAM_MAGIC, PartialTrace, is_written, partial_of
from xipfs.stats.trace_columns import GROUP_ROWS, TraceError, arrow, checked, unpacked

_MAGIC: Final = b"PAR1"


class TraceReader:
    """An open trace file: ``metadata``, ``rows`` (their number) and ``batches``.

    ``metadata`` has ``unfinished``, and why, if it is not a whole recording.
    """

    def __init__(self, path: Path) -> None:
        self._source = PartialTrace(path) if is_partial(path) else _WholeTrace(path)
        self.metadata = self._source.metadata
        self.rows = self._source.rows

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._source.close()

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        """Yield the rows in order, as lists by column; a batch is at most ``GROUP_ROWS`` long."""
        return self._source.batches()


class _WholeTrace:
    def __init__(self, path: Path) -> None:
        pa = arrow()
        self._path = path
        try:
            self._file = pa.parquet.ParquetFile(path, page_checksum_verification=True)
            told = unpacked(self._file.metadata.metadata)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TraceError(f"{path} is damaged: {error}") from None
        self.metadata = checked(path, told, self._file.schema_arrow)
        if not isinstance(told.get("rows"), int):
            raise TraceError(f"{path} is damaged: it does not tell its number of rows")
        self.rows: int = told["rows"]

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        rows = 0
        try:
            for batch in self._file.iter_batches(GROUP_ROWS):
                rows += batch.num_rows
                yield batch.to_pydict()
            # Of all of Parquet, its own directory at the end alone has no check.
            if rows != self.rows:
                raise OSError(f"{rows} of {self.rows} rows are there")
        except (arrow().ArrowException, OSError) as error:
            raise TraceError(f"{self._path} is damaged: {error}") from None

    def close(self) -> None:
        self._file.close()


def is_partial(path: Path) -> bool:
    """Look at both ends of the file; refuse what is neither a whole trace nor a part of one."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(size_bytes - 4, 0))
            end = file.read(4)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    if start == STREAM_MAGIC:
        return True
    if start != _MAGIC[: len(start)]:
        raise TraceError(f"{path} is not a trace file", expected="a file of `xipfs record`")
    if end != _MAGIC or size_bytes < 2 * len(_MAGIC):
        raise _without_end(path, "no end" if size_bytes else "nothing in it")
    return False


def _without_end(path: Path, lacks: str) -> TraceError:
    partial = partial_of(path)
    if not partial.exists():
        return TraceError(
            f"{path} has {lacks}: its recording was cut off, or the file was truncated",
            remedy="record again, and end it with Ctrl-C or SIGTERM",
        )
    if is_written(partial):
        remedy = f"{partial} has what there is so far (xipfs faults, with --follow too, reads it)"
        return TraceError(f"{path} has {lacks} yet: it is being recorded", remedy=remedy)
    return TraceError(
        f"{path} has {lacks}: its recording was cut off",
        remedy=f"{partial} has what was recorded until then, and is read like a trace",
    )
