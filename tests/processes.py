"""Programs that tests start."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Undo what a background job inherits: ignored signals, which Python then leaves ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
