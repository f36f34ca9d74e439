"""Two ways for the model to stop: where the kernel would BUG, and where the model itself is wrong.

They are kept apart on purpose. A ``KernelBug`` is a correct answer (the recorded kernels do crash
there); an ``InvariantError`` is a defect of this package and never a result.
"""

from __future__ import annotations

from xipfs.errors import XipfsError


class KernelBug(XipfsError):  # noqa: N818  (a result that the kernel calls a bug)
    """A BUG_ON() of the modelled kernel fired; nothing after it has a meaning.

    ``condition`` is the C condition, ``function`` the kernel function that tests it.
    """

    def __init__(self, function: str, condition: str) -> None:
        super().__init__(f"BUG_ON({condition}) in {function}()")
        self.function = function
        self.condition = condition


class InvariantError(XipfsError):
    """One of the invariants T1 to T9 does not hold; the message carries the counters."""
