"""A recording that is not finished: what the recorder writes until it makes the trace file of it.

Parquet can be read only once its end is written. So the recorder writes rows as an Arrow stream
(one record batch a poll) to FILE.partial, and at the end makes FILE of it. Whatever kills the
recorder, the batches before are whole, and can be read and followed while they come. Each batch
tells in its own metadata what had been lost until then. Who records holds the file's lock (flock);
without the lock nothing more will come.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from xipfs.stats.trace_columns import TraceError, arrow, checked, unpacked

#: What an Arrow stream begins with.
STREAM_MAGIC: Final = b"\xff\xff\xff\xff"
LOSSES: Final = b"losses"
CUT: Final = "cut off"
WRITTEN: Final = "being recorded"

Batch = dict[str, list[Any]]


def partial_of(path: Path) -> Path:
    """Return where the recording of trace ``path`` is until it is finished."""
    return path.with_name(path.name + ".partial")


def is_written(partial: Path) -> bool:
    """Return whether a recorder lives that writes the file."""
    try:
        with partial.open("rb") as file:
            return _is_locked(file)
    except OSError:
        return False


def _is_locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


class _Source:
    """The file as pyarrow reads it: each read is whole, or is the last one.

    ``wait`` is asked at the end of the file whether to try again.
    """

    closed = False

    def __init__(self, file: BinaryIO, wait: Callable[[], bool]) -> None:
        self._file = file
        self._wait = wait
        self.last = b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        while len(data) < size and self._wait():
            data += self._file.read(size - len(data))
        self.last = data
        return data

    def close(self) -> None:
        """The file is closed by who opened it."""


class _Stream:
    """The batches of an open file, each with the losses until then; then ``finished`` tells."""

    def __init__(self, path: Path, file: BinaryIO, wait: Callable[[], bool]) -> None:
        self._pa = arrow()
        self._source = _Source(file, wait)
        #: Whether the recorder has ended the stream itself.
        self.finished = False
        source = self._pa.PythonFile(self._source, mode="r")
        try:
            self._reader = self._pa.ipc.open_stream(source)
            told = unpacked(self._reader.schema.metadata)
        except (self._pa.ArrowException, OSError, ValueError) as error:
            raise TraceError(
                f"{path} was cut off before its first row, or is no trace: {error}",
                expected="a file of `xipfs record`",
            ) from None
        self.metadata = checked(path, told, self._reader.schema)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        while True:
            try:
                batch, told = self._reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                # A stream that ends itself does so by a length of zero.
                self.finished = self._source.last == bytes(4)
                return
            except (self._pa.ArrowException, OSError):
                return  # the last batch is there in part only
            yield batch, json.loads(told[LOSSES])


class PartialTrace:
    """What FILE.partial has now: ``metadata``, ``rows`` and ``batches``, as of a whole trace."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}") from None
        self._path = path
        try:
            self._count()
        except BaseException:
            self._file.close()
            raise

    def _count(self) -> None:
        # Before the rows are counted, or a recording could end in between and seem cut off.
        written = _is_locked(self._file)
        stream = _Stream(self._path, self._file, lambda: False)
        self.metadata = stream.metadata
        self.rows = self._batches = 0
        for batch, losses in stream:
            self.metadata = self.metadata | {"losses": stream.metadata["losses"] | losses}
            self.rows += batch.num_rows
            self._batches += 1
        if not stream.finished:
            self.metadata["unfinished"] = WRITTEN if written else CUT

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that were there when the file was opened."""
        self._file.seek(0)
        stream = _Stream(self._path, self._file, lambda: False)
        for (batch, _), _ in zip(stream, range(self._batches), strict=False):
            yield batch.to_pydict()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def follow(path: Path, wait: Callable[[], bool]) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Yield the batches of FILE.partial with the metadata until then, as they are written.

    Ends with the recording, or when ``wait``, which is called while nothing comes, returns False.
    The last yield has an empty batch, and ``unfinished`` if the recorder did not end the file.
    """
    with path.open("rb") as file:

        def more() -> bool:
            # What came before the lock was let go is read once more.
            return more_comes() and wait()

        locked = True

        def more_comes() -> bool:
            nonlocal locked
            was, locked = locked, _is_locked(file)
            return was

        stream = _Stream(path, file, more)
        metadata = stream.metadata
        for batch, losses in stream:
            metadata = metadata | {"losses": stream.metadata["losses"] | losses}
            yield batch.to_pydict(), metadata
        if not stream.finished:
            metadata = metadata | {"unfinished": WRITTEN if _is_locked(file) else CUT}
        yield {}, metadata
