"""Structure blocks, changed in transactions.

Within a transaction every change goes to a private copy of its block, so that later reads of the
same operation see it and an exception drops it without a trace. What the journal gets is the lines
that changed, not the blocks: an operation's cost does not grow with anything but what it touches.

File data never passes through here: it is stored in place, in blocks of its own, before the
transaction that links them commits.
"""

from __future__ import annotations

from collections.abc import Iterator

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.journal import Journal, Record
from xipfs.memory.region import LINE_SIZE, Medium

Block = bytearray | memoryview
"""4096 bytes to read; never to write."""

_ZERO_BLOCK = bytes(layout.BLOCK_SIZE)
_ALL_LINES = (1 << layout.LINES_PER_BLOCK) - 1


class Metadata:
    """The overlay over one image's blocks and the transaction that is open, if any."""

    def __init__(self, medium: Medium, journal: Journal, block_count: int) -> None:
        self._medium = medium
        self._journal = journal
        self._block_count = block_count
        self._staged: dict[int, bytearray] = {}
        self._dirty: dict[int, int] = {}
        self._open = False

    @property
    def in_transaction(self) -> bool:
        """Whether changes are being staged."""
        return self._open

    def block(self, number: int) -> Block:
        """Return block ``number`` as the open transaction sees it."""
        staged = self._staged.get(number)
        if staged is not None:
            return staged
        if not 0 <= number < self._block_count:
            raise ImageError(f"block {number} is outside the image of {self._block_count} blocks")
        return self._medium.load(number << layout.BLOCK_SHIFT, layout.BLOCK_SIZE)

    def begin(self) -> None:
        """Open a transaction; they do not nest."""
        assert not self._open, "a transaction is open already"
        self._open = True

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Stage ``data`` at ``offset`` of block ``number``."""
        assert self._open, "a change outside a transaction"
        staged = self._staged.get(number)
        if staged is None:
            staged = self._staged[number] = bytearray(self.block(number))
        end = offset + len(data)
        assert end <= layout.BLOCK_SIZE, (offset, len(data))
        if staged[offset:end] == data:
            return
        staged[offset:end] = data
        first, last = offset >> layout.LINE_SHIFT, (end - 1) >> layout.LINE_SHIFT
        lines = ((1 << (last - first + 1)) - 1) << first
        self._dirty[number] = self._dirty.get(number, 0) | lines

    def fresh(self, number: int) -> None:
        """Start a newly allocated structure block as zeros.

        The zeros go to the medium at once, not through the journal: nothing links the block until
        the transaction's mark, and the journal's first fence comes before it.
        """
        assert self._open, "a change outside a transaction"
        assert number not in self._staged, number
        offset = number << layout.BLOCK_SHIFT
        self._medium.store(offset, _ZERO_BLOCK)
        self._medium.flush(offset, layout.BLOCK_SIZE)
        self._staged[number] = bytearray(_ZERO_BLOCK)

    def discard(self, number: int) -> None:
        """Forget what was staged for a block that this transaction frees."""
        self._staged.pop(number, None)
        self._dirty.pop(number, None)

    def commit(self) -> None:
        """Make the staged lines durable, all or none, and close the transaction."""
        assert self._open
        records = list(self._records())
        if records:
            self._journal.commit(records)
        self._staged.clear()
        self._dirty.clear()
        self._open = False

    def abort(self) -> None:
        """Drop what was staged and close the transaction."""
        self._staged.clear()
        self._dirty.clear()
        self._open = False

    def _records(self) -> Iterator[Record]:
        for number, lines in sorted(self._dirty.items()):
            staged = self._staged[number]
            base = number << layout.BLOCK_SHIFT
            if lines == _ALL_LINES:
                yield base, bytes(staged)
                continue
            while lines:
                first = (lines & -lines).bit_length() - 1
                run = lines >> first
                count = (~run & (run + 1)).bit_length() - 1
                start = first * LINE_SIZE
                yield base + start, bytes(staged[start : start + count * LINE_SIZE])
                lines &= ~(((1 << count) - 1) << first)
