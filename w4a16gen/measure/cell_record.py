"""The cells of a random draw in a file, each as soon as it is timed: a later run goes on where this one stopped."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.results import Comparison, comparison_of

SCHEMA = "w4a16gen.random-cells/1"
CELLS = "cells.jsonl"
"""File name in the report's folder."""
MOST_CRASHES = 2
"""A rival that ended the process so often in a cell is left out there: a process that was killed has the same trace."""


@dataclass(frozen=True)
class Cell:
    """A cell that was timed."""

    layer: str
    comparison: Comparison
    seconds: float
    """The time that it took to draw, check and measure."""

    def as_json(self) -> dict[str, Any]:
        """Return the object of a line."""
        return {"layer": self.layer, "seconds": round(self.seconds, 2), "comparison": self.comparison.as_json()}


class CellRecord:
    """A file of cells: a line that says what they are cells of, then events in order."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        """Open the record in a folder, which is made, and begin a run.

        Args:
            folder: the folder.
            head: what all cells share: draw, GPU, build and method.

        Raises:
            InvalidValueError: if the folder has cells of something else, or the file is no record.
            OSError: if it cannot be written.
        """
        self._path = folder / CELLS
        self.cells: dict[Problem, Cell] = {}
        self._crashes: Counter[tuple[Problem, str]] = Counter()
        lines = self._read(json.loads(json.dumps(head))) if self._path.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        texts = map(json.dumps, [{"schema": SCHEMA, **head}, *lines, {"run": True}])
        write_if_changed(self._path, "".join(f"{text}\n" for text in texts))

    def _read(self, head: dict[str, Any]) -> list[dict[str, Any]]:
        """Read the cells and the crashes; return the lines after the first, without a last one that was cut off."""
        try:
            texts = self._path.read_text().splitlines()
            found = json.loads(texts[0])
            if found.pop("schema") != SCHEMA:
                raise InvalidValueError(f"its schema is not {SCHEMA!r}")
            lines = [json.loads(text) for text in texts[1:-1]]
            with suppress(ValueError):  # the process may have ended while it wrote the last line
                lines += [json.loads(text) for text in texts[1:][-1:]]
            self._replay(lines)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise InvalidValueError(
                f"{self._path} is no record of `w4a16gen bench --random` ({error}): remove it, or name another folder "
                "with --report"
            ) from None
        differing = sorted(name for name in head | found if head.get(name) != found.get(name))
        if differing:
            values = "; ".join(f"{name} of {found.get(name)!r}, now {head.get(name)!r}" for name in differing)
            raise InvalidValueError(
                f"{self._path} has cells of other settings ({values}): name another folder with --report"
            )
        return lines

    def _replay(self, lines: list[dict[str, Any]]) -> None:
        tried: tuple[Problem, str] | None = None
        for line in [*lines, {"run": True}]:
            if "begun" in line:
                tried = Problem(**line["begun"]), str(line["contender"])
                continue
            if "comparison" in line:
                cell = Cell(str(line["layer"]), comparison_of(line["comparison"]), float(line["seconds"]))
                self.cells[cell.comparison.problem] = cell
            elif "run" in line and tried is not None:
                self._crashes[tried] += 1
            tried = None

    def excluded(self, problem: Problem) -> dict[str, str]:
        """Return the rivals that are not tried again in a cell, each with the reason."""
        return {
            name: f"it ended the process {count} times"
            for (where, name), count in self._crashes.items()
            if where == problem and count >= MOST_CRASHES
        }

    def begin(self, problem: Problem, contender: str) -> None:
        """Note that a rival is launched next."""
        self._write({"begun": vars(problem), "contender": contender})

    def add(self, cell: Cell) -> None:
        """Add a cell."""
        self.cells[cell.comparison.problem] = cell
        self._write(cell.as_json())

    def interrupted(self) -> None:
        """Note that the user, or the disk, ended the run, so that no rival is blamed."""
        self._write({"interrupted": True})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
