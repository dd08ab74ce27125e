"""How humming's launcher reads a `tuning_config`."""

from __future__ import annotations

import json
from typing import Any


def kernel_taken(tuning: str, rows: int) -> Any:
    """Return the kernel of the first range that holds the rows; each call reads the entry of one row too."""
    ranges = json.loads(tuning)

    def entry(count: int) -> Any:
        found = [kernel for least, most, kernel in ranges if least < count <= most]
        assert found, f"{count} is not within any range"
        return found[0]

    entry(1)
    return entry(rows)
