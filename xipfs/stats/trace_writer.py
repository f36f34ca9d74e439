"""Writes a trace: rows to FILE.partial as they come, and FILE of them at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from xipfs.errors import UsageError
from xipfs.stats.partial_trace import LOSSES, is_written, partial_of
from xipfs.stats.trace_columns import GROUP_ROWS, TraceWriteError, arrow, arrow_schema, packed


class TraceWriter:
    """Appends rows to a new trace, readable by its owner only.

    ``began`` is the metadata that a reader of the unfinished recording gets. FILE is there from the
    start, empty, so that its name is ours at the end.
    """

    def __init__(
        self, path: Path, began: Mapping[str, Any] | None = None, *, force: bool = False
    ) -> None:
        self._arrow = arrow()
        self._path, self._partial = path, partial_of(path)
        if is_written(self._partial):
            raise UsageError(f"{path} is being recorded already", expected="another name")
        self._file = _new_file(path, force)
        try:
            self._part = _new_file(self._partial, force)
        except BaseException:
            self._file.close()
            path.unlink()
            raise
        fcntl.flock(self._part, fcntl.LOCK_EX)
        self._schema = arrow_schema({"losses": {}, **(began or {})})
        self._rows: list[list[Any]] = []
        self._losses: Mapping[str, Any] = dict((began or {}).get("losses", {}))
        self._failed = False
        with self._writing(self._partial):
            self._stream = self._arrow.ipc.new_stream(self._part, self._schema)
        self._write_batch()  # an empty one: so the file begins to say what it is

    def append(self, rows: list[list[Any]]) -> None:
        """Add rows, each in the order of ``COLUMNS``."""
        self._rows += rows
        if len(self._rows) >= GROUP_ROWS:
            self.flush(self._losses)

    def flush(self, losses: Mapping[str, Any]) -> None:
        """Write what is held, with the losses until now: a killed recorder leaves that."""
        self._losses = losses
        if self._rows:
            self._write_batch()

    def _write_batch(self) -> None:
        values = zip(*self._rows, strict=True) if self._rows else [()] * len(self._schema)
        columns = [
            self._arrow.array(column, type=field.type)
            for column, field in zip(values, self._schema, strict=True)
        ]
        self._rows = []
        told = {LOSSES: json.dumps(self._losses).encode()}
        with self._writing(self._partial):
            batch = self._arrow.record_batch(columns, schema=self._schema)
            self._stream.write_batch(batch, custom_metadata=told)
            self._part.flush()

    def close(self, metadata: Mapping[str, Any]) -> None:
        """Make the trace of all rows, with ``metadata``, and wait for the storage.

        Should that fail, everything recorded stays in FILE.partial.
        """
        try:
            if not self._failed:  # whoever heard of that failure knows where the rest is
                self._finish(metadata)
        finally:
            self.release()

    def _finish(self, metadata: Mapping[str, Any]) -> None:
        self._losses = metadata.get("losses", self._losses)
        self._write_batch()
        with self._writing(self._partial):
            self._stream.close()
            self._part.flush()
        with self._writing(self._path):
            self._make_parquet(metadata)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.unlink()

    def release(self) -> None:
        """Let go of the files as they are, as the end of the process does."""
        for file in (self._file, self._part):
            with contextlib.suppress(OSError):
                file.close()

    def _make_parquet(self, metadata: Mapping[str, Any]) -> None:
        parquet = self._arrow.parquet.ParquetWriter(
            self._file, self._schema.remove_metadata(), write_page_checksum=True
        )
        try:
            with (
                self._arrow.memory_map(str(self._partial)) as source,
                self._arrow.ipc.open_stream(source) as stream,
            ):
                rows = 0
                for group in _groups(stream):
                    table = self._arrow.Table.from_batches(group, schema=stream.schema)
                    parquet.write_table(table)
                    rows += table.num_rows
            parquet.add_key_value_metadata(packed({**metadata, "rows": rows}))
            parquet.close()
        finally:
            # Or what is half done would be given an end, which is what says that a file is whole.
            parquet.is_open = False

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (self._arrow.ArrowException, OSError) as error:
            self._failed = True
            reason = getattr(error, "strerror", None) or error
            raise TraceWriteError(
                f"{path} cannot be written: {reason}",
                remedy=f"{self._partial} has what was recorded until then",
            ) from None


def _groups(batches: Iterator[Any]) -> Iterator[list[Any]]:
    """Yield batches in lists of about ``GROUP_ROWS`` rows together."""
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if sum(each.num_rows for each in group) >= GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _new_file(path: Path, force: bool) -> BinaryIO:
    # Always a new file: one that is there may be another user's, or lead elsewhere.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL
    try:
        if force:
            _remove(path)
        file = open(os.open(path, flags, 0o600), "wb")  # noqa: SIM115
    except FileExistsError:
        raise UsageError(f"{path} exists", remedy="--force overwrites it") from None
    except OSError as error:
        raise TraceWriteError(f"{path} cannot be written: {error.strerror}") from None
    os.fchmod(file.fileno(), 0o600)
    return file


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
            raise UsageError(f"{path} is not a regular file", expected="one, or none yet")
        path.unlink()
