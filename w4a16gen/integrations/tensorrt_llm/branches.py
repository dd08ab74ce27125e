"""The branches of `#if`: which builds read them, and under which conditions."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from w4a16gen.integrations.tensorrt_llm.tokens import Token

_LONGEST_CHAIN = 20
"""Conditions of earlier branches that a branch names, so that a chain of `#elif` takes linear time."""


class Reach(enum.IntEnum):
    """In which builds a compiler reads a token."""

    DEAD = 0
    """In none."""
    CONDITIONAL = 1
    """Only where a macro is defined that neither the file nor TensorRT-LLM's build defines."""
    LIVE = 2
    """In a build of TensorRT-LLM or of a descendant."""


@dataclass
class Branch:
    """The open branch of an `#if`."""

    parent: Branch | None
    begin: int
    reach: Reach
    is_certain: bool = True
    """Whether every build that reads the parent reads it."""
    is_in_every_build: bool = True
    condition: str = ""
    """Empty where it is certain."""
    earlier: list[str] = field(default_factory=list)
    """Conditions of the branches before it."""
    taken: list[bool] = field(default_factory=lambda: [False, False])
    """Whether a branch before it is certainly taken: in builds of TensorRT-LLM, in any build."""
    may_be_taken: bool = False
    """Whether a branch before it is taken in some build."""
    has_else: bool = False
    assumed: list[str] = field(default_factory=list)
    """Names whose definition the condition or an earlier one asks for, and nothing else."""
    decides_on: str | None = None
    """The name of which the condition asks only whether it is defined."""
    changed: list[str] = field(default_factory=list)
    """Names that it defines or undefines."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of this branch and all around it, outermost first."""
        found: list[str] = []
        branch: Branch | None = self
        while branch is not None:
            found += [branch.condition] if branch.condition else []
            found += branch.earlier[-_LONGEST_CHAIN:][::-1] if not branch.is_certain else []
            branch = branch.parent
        return tuple(reversed(found))


def condition_text(condition: Sequence[Token]) -> str:
    """Return a condition as a report writes it."""
    texts = [token.text for token in condition]
    if texts[:1] == ["defined"] and len(texts) == 2:  # noqa: PLR2004 # a name without parentheses
        return f"defined({texts[1]})"
    if texts[:2] == ["!", "defined"] and len(texts) == 3:  # noqa: PLR2004 # a name without parentheses
        return f"!defined({texts[2]})"
    return re.sub(r"(?<=\() | (?=\))|(?<=!) |(?<=defined) (?=\()", "", " ".join(texts))


def negated(condition: str) -> str:
    """Return the opposite of a condition."""
    if re.fullmatch(r"!defined\(\w+\)", condition):
        return condition[1:]
    return f"!{condition}" if re.fullmatch(r"defined\(\w+\)", condition) else f"!({condition})"
