"""Find the experts of each layer of a checkpoint by their names.

Experts have names of their own, such as `model.layers.3.mlp.experts.17.gate_proj`. Formats that store experts together
name them `NAME.17`, such as `blk.3.ffn_gate_exps.17`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import MAX_EXPERTS

GATE, UP, DOWN, GATE_UP = "gate", "up", "down", "gate_up"
ROLES = {
    **dict.fromkeys(("gate_proj", "w1", "ffn_gate_exps"), GATE),
    **dict.fromkeys(("up_proj", "w3", "ffn_up_exps"), UP),
    **dict.fromkeys(("down_proj", "w2", "ffn_down_exps"), DOWN),
    **dict.fromkeys(("gate_up_proj", "ffn_gate_up_exps"), GATE_UP),
}
"""What a projection of an expert is, by the last word of its name; `gate_up` holds the rows of the gate, then of up."""
_FORMS = ((GATE, UP, DOWN), (GATE_UP, DOWN))
"""The projections that an expert has."""
_SHOWN = 4
"""Experts that a message names."""
_MOST_DIGITS = 9
"""Digits of the largest number that is read; larger ones all count as the number that follows it."""


@dataclass(frozen=True)
class ExpertNames:
    """Names of the experts of one layer.

    Attributes:
        name: path of the module that holds the experts, such as `model.layers.3.mlp.experts`; of a GGUF file `blk.3`.
        found: the name of each expert's projection, by role and number.
        doubled: names of projections that another name stands for already.
    """

    name: str
    found: dict[str, dict[int, str]] = field(default_factory=dict)
    doubled: tuple[str, ...] = ()

    @property
    def experts(self) -> int:
        """Number of experts: one more than the largest number that occurs."""
        return 1 + max(number for of_role in self.found.values() for number in of_role)

    @property
    def form(self) -> tuple[str, ...]:
        """The roles that each expert has: gate, up and down, or gate_up and down."""
        return _FORMS[1] if GATE_UP in self.found else _FORMS[0]

    @property
    def names(self) -> set[str]:
        """All names."""
        return {name for of_role in self.found.values() for name in of_role.values()} | set(self.doubled)

    def why_incomplete(self) -> str | None:
        """Return why these are not the projections of all experts, once each; or None."""
        where = f"experts of {shown_name(self.name)}"
        if self.doubled:
            return f"{where}: {shown_name(self.doubled[0])} is doubled under another name: keep one of them"
        if self.experts > MAX_EXPERTS:
            return f"{where}: the largest number, {self.experts - 1}, must be 0 to {MAX_EXPERTS - 1}"
        for role in self.found:
            if role not in self.form:
                return f"{where} have a {role} projection beside {' and '.join(self.form)}: keep one form"
        for role in self.form:
            missing = [number for number in range(self.experts) if number not in self.found.get(role, {})]
            if missing:
                listed = ", ".join(str(number) for number in missing[:_SHOWN]) + (", ..." if missing[_SHOWN:] else "")
                return f"{where}: {len(missing)} of {self.experts} lack a 4-bit {role} projection: number {listed}"
        return None

    def of_role(self, role: str) -> list[str]:
        """Return the names of one role in the order of the experts.

        Raises:
            InvalidValueError: if a projection is missing or doubled.
        """
        if reason := self.why_incomplete():
            raise InvalidValueError(reason)
        return [self.found[role][number] for number in range(self.experts)]


def place_of(name: str) -> tuple[str, str, int] | None:
    """Return the module of a layer's experts, the role and the number of an expert's projection, by its name.

    Args:
        name: the name of a layer of a checkpoint.

    Returns:
        The module, the role and the number; None if the name is not that of an expert.

    Example:
        >>> place_of("model.layers.3.block_sparse_moe.experts.5.w3")
        ('model.layers.3.block_sparse_moe.experts', 'up', 5)
        >>> place_of("blk.3.ffn_down_exps.17")
        ('blk.3', 'down', 17)
        >>> place_of("model.layers.3.mlp.shared_expert.up_proj")
    """
    words = name.split(".")
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in ROLES and _is_number(before) and len(words) > 2 and words[-3].endswith("experts"):  # noqa: PLR2004
        return ".".join(words[:-2]), ROLES[last], _number(before)
    if before in ROLES and _is_number(last):
        return ".".join(words[:-2]), ROLES[before], _number(last)
    return None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def _number(word: str) -> int:
    """Return a number of any length. Python refuses to read one of thousands of digits."""
    digits = word.lstrip("0")
    return int(digits or "0") if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS


def find_experts(names: Iterable[str]) -> dict[str, ExpertNames]:
    """Return the experts of each layer, by the module that holds them, in the order of the names.

    Layers that are not of experts are left out. Nothing is checked: see `ExpertNames.why_incomplete`.

    Args:
        names: names of a checkpoint's layers, in any order.

    Example:
        >>> found = find_experts(f"mlp.experts.{i}.{part}" for i in range(2) for part in ("w1", "w2", "w3"))
        >>> found["mlp.experts"].of_role("up")
        ['mlp.experts.0.w3', 'mlp.experts.1.w3']
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    doubled: dict[str, list[str]] = {}
    for name in names:
        place = place_of(name)
        if place is None:
            continue
        module, role, number = place
        of_role = found.setdefault(module, {}).setdefault(role, {})
        if number in of_role:
            doubled.setdefault(module, []).append(name)
        else:
            of_role[number] = name
    return {module: ExpertNames(module, roles, tuple(doubled.get(module, ()))) for module, roles in found.items()}
