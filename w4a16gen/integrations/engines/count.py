"""The lines that an engine's log gets: how many layers are served, and why others are not."""

from __future__ import annotations

import logging


class ServedCount:
    """Counts the 4-bit layers of one kind of a model while an engine builds and loads it.

    Each layer is asked about once. Layers that are expected finish when their weight is loaded. The line appears when
    none is left.

    Example:
        >>> count = ServedCount(logging.getLogger("w4a16gen.example"))
        >>> count.asked(None)
        >>> count.expected()
        >>> count.asked("the group size is 48")
        >>> count.finished()
        >>> count.line
        'w4a16gen serves 1 of 2 4-bit linear layers'
    """

    def __init__(self, logger: logging.Logger, kind: str = "linear layer") -> None:
        """Count from 0.

        Args:
            logger: where the lines go.
            kind: what lines call a layer; an s makes it the plural.
        """
        self._logger, self._kind = logger, kind
        self._asked = self._expected = self._served = 0
        self._reasons: set[str] = set()
        self.line = ""
        """The last line about a whole model."""

    def asked(self, reason: str | None) -> None:
        """Count a layer, and log why it is not served. Each reason is logged once.

        Args:
            reason: why the layer is not served, or None.
        """
        self._asked += 1
        if reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            self._logger.info("w4a16gen leaves a 4-bit %s to other kernels: %s", self._kind, reason)

    def expected(self) -> None:
        """Expect the weight of a layer."""
        self._expected += 1

    def finished(self, *, is_served: bool = True) -> None:
        """Count a weight that is loaded, and log the line if it is the last one that is expected.

        Args:
            is_served: whether this package serves the layer.
        """
        self._expected -= 1
        self._served += is_served
        if self._expected > 0:
            return
        self.line = f"w4a16gen serves {self._served} of {max(self._asked, self._served)} 4-bit {self._kind}s"
        self._logger.info("%s", self.line)
        self._asked = self._expected = self._served = 0
