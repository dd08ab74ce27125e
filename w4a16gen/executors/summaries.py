"""What each machine did for an executor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class NodeSummary:
    """What one machine did."""

    node: str
    tasks: int = 0
    """Tasks that it finished."""
    seconds: float = 0.0
    """Time of these tasks, added up."""
    lost: int = 0
    """Tasks that it lost."""

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return {"node": self.node, "tasks": self.tasks, "seconds": round(self.seconds, 1), "lost": self.lost}


def add_summaries(summaries: Iterable[NodeSummary]) -> list[NodeSummary]:
    """Return one summary for each machine, sorted by name."""
    total: dict[str, NodeSummary] = {}
    for one in summaries:
        known = total.setdefault(one.node, NodeSummary(one.node))
        known.tasks += one.tasks
        known.seconds += one.seconds
        known.lost += one.lost
    return [total[node] for node in sorted(total)]
