"""What a folder of TensorRT-LLM's generated sources has of its 63 W4A16 kernels, and what else."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.emit import render_trtllm_unit
from w4a16gen.integrations.tensorrt_llm.folders import NotReadError, find_files, printable, read_file
from w4a16gen.integrations.tensorrt_llm.instantiations import Instantiation, Problem, scan
from w4a16gen.integrations.tensorrt_llm.launcher import LAUNCHER
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space

W4A16 = "FP16 x uint4"
_TYPES = {
    "half": "FP16",
    "__nv_bfloat16": "BF16",
    "__nv_fp8_e4m3": "FP8",
    "uint4b_t": "uint4",
    "uint8_t": "uint8",
    "float_e2m1_t": "FP4",
    "SafeFP4": "FP4",
}
_MOST_PLACES = 10


def types_of(found: Instantiation) -> str:
    """Return activation x weight of an instantiation, in the field's words; other templates and macros by name."""
    if found.name != LAUNCHER or len(found.arguments) < 2:  # noqa: PLR2004 # activation and weight
        return found.name
    return " x ".join(_TYPES.get(argument, argument) for argument in found.arguments[:2])


def config_of(found: Instantiation) -> KernelConfig | None:
    """Return the kernel of space `trtllm` that an instantiation is, or None."""
    return _known().get(found.arguments) if found.name == LAUNCHER else None


@cache
def _known() -> dict[tuple[str, ...], KernelConfig]:
    """Return the 63 by their template arguments, read from what is rendered for them."""
    known = {}
    for config in enumerate_space("trtllm"):
        (only,) = scan(render_trtllm_unit([config]).encode()).instantiations
        known[only.arguments] = config
    return known


@dataclass
class AuditedFile:
    """What a file has."""

    path: Path
    name: str
    """Its path in the audited folder, with bytes that cannot be printed as escapes."""
    instantiations: list[Instantiation] = field(default_factory=list)
    """Without those that no build reads."""
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def types(self) -> Counter[str]:
        """Number of instantiations by types."""
        return Counter(types_of(found) for found in self.instantiations)

    @property
    def is_mixed(self) -> bool:
        """Whether FP16 x uint4 shares the file with others: a filter by type names loses these kernels."""
        return W4A16 in self.types and len(self.types) > 1


@dataclass
class Audit:
    """What a folder of generated sources has, against the 63 kernels of space `trtllm`."""

    folder: Path
    files: list[AuditedFile]
    not_read: list[tuple[str, str]] = field(default_factory=list)
    """Links, special files, and what could not be read, each with the reason."""

    def _all(self) -> Iterator[tuple[AuditedFile, Instantiation]]:
        return ((file, found) for file in self.files for found in file.instantiations)

    @cached_property
    def total(self) -> int:
        """Number of instantiations."""
        return sum(len(file.instantiations) for file in self.files)

    @cached_property
    def _by_kernel(self) -> dict[KernelConfig, list[Instantiation]]:
        found = defaultdict(list)
        for _, instantiation in self._all():
            if not instantiation.is_conditional and (config := config_of(instantiation)) is not None:
                found[config].append(instantiation)
        return found

    @cached_property
    def kernels(self) -> Counter[KernelConfig]:
        """Number of instantiations of each of the 63 that is there."""
        return Counter({config: len(found) for config, found in self._by_kernel.items()})

    @cached_property
    def missing(self) -> list[KernelConfig]:
        """Those of the 63 that are not there."""
        return sorted(set(enumerate_space("trtllm")) - set(self.kernels))

    @cached_property
    def duplicates(self) -> list[KernelConfig]:
        """Those that one build may have more than once."""
        return sorted(config for config, found in self._by_kernel.items() if not _are_alternatives(found))

    @cached_property
    def foreign(self) -> Counter[str]:
        """Number of other instantiations: by types, by template, or by the macro that may write them."""
        return Counter(
            types
            for _, found in self._all()
            if not found.is_conditional and (types := types_of(found)) != W4A16
        )

    @cached_property
    def _unknown(self) -> list[tuple[AuditedFile, Instantiation]]:
        return [
            (file, found)
            for file, found in self._all()
            if types_of(found) == W4A16 and config_of(found) is None and not found.is_conditional
        ]

    @property
    def unknown(self) -> list[str]:
        """FP16 x uint4 instantiations that are none of the 63, by their template arguments."""
        return [", ".join(found.arguments) for _, found in self._unknown]

    @property
    def unknown_with_places(self) -> list[str]:
        """The same, each with where it is."""
        return [f"{', '.join(found.arguments)} at {_place(file, found)}" for file, found in self._unknown]

    @property
    def foreign_with_places(self) -> list[str]:
        """Other instantiations by types, each with their number and where the first ones are."""
        return [
            f"{self.foreign[types]} {types} at {', '.join(places)}{' ...' * (self.foreign[types] > len(places))}"
            for types, places in self._foreign_places.items()
        ]

    @cached_property
    def _foreign_places(self) -> dict[str, list[str]]:
        places: dict[str, list[str]] = {types: [] for types in sorted(self.foreign)}
        for file, found in self._all():
            listed = places.get(types_of(found))
            if listed is not None and len(listed) < _MOST_PLACES and not found.is_conditional:
                listed.append(_place(file, found))
        return places

    @cached_property
    def conditional(self) -> list[tuple[str, str]]:
        """Instantiations that need a macro which nobody here defines: what and where, and the conditions."""
        return [
            (f"{types_of(found)} at {_place(file, found)}", " && ".join(found.conditions))
            for file, found in self._all()
            if found.is_conditional
        ]

    @cached_property
    def problems(self) -> list[str]:
        """What could not be read as a compiler reads it, each with its place."""
        return [f"{name}: {reason}" for name, reason in self.not_read] + [
            f"{file.name}:{problem.line}: {problem.message}" if problem.line else f"{file.name}: {problem.message}"
            for file in self.files
            for problem in file.problems
        ]

    @property
    def ok(self) -> bool:
        """Whether the 63 are there, once each, and nothing else is."""
        return not (
            self.missing or self.duplicates or self.foreign or self.unknown or self.conditional or self.problems
        )

    def places(self, types: str) -> list[str]:
        """Return where instantiations of given types are, each as `file:line`."""
        return [_place(file, found) for file, found in self._all() if types_of(found) == types]

    def as_json(self) -> dict[str, object]:
        """Return the object that `--json` carries."""
        return {
            "folder": printable(str(self.folder)),
            "ok": self.ok,
            "instantiations": self.total,
            "present": [config.name for config in sorted(self.kernels)],
            "missing": [config.name for config in self.missing],
            "duplicates": [config.name for config in self.duplicates],
            "foreign": dict(sorted(self.foreign.items())),
            "foreign_places": self._foreign_places,
            "unknown": self.unknown,
            "unknown_places": [_place(file, found) for file, found in self._unknown],
            "conditional": [{"what": what, "condition": condition} for what, condition in self.conditional],
            "problems": self.problems,
            "files": [
                {
                    "file": file.name,
                    "types": dict(sorted(file.types.items())),
                    "mixed": file.is_mixed,
                    "kernels": [config.name for found in file.instantiations if (config := config_of(found))],
                }
                for file in self.files
            ],
        }


def _place(file: AuditedFile, found: Instantiation) -> str:
    return f"{file.name}:{found.line}"


def _are_alternatives(found: list[Instantiation]) -> bool:
    """Return whether no build has two of some instantiations: one's condition is the opposite of another's."""
    seen: list[set[str]] = []
    for instantiation in found:
        conditions = set(instantiation.conditions)
        if any(not _exclude(conditions, other) for other in seen):
            return False
        seen.append(conditions)
    return True


def _exclude(conditions: set[str], others: set[str]) -> bool:
    return any(
        f"!{one}" in second or f"!({one})" in second
        for first, second in ((conditions, others), (others, conditions))
        for one in first
    )


def audit(folder: Path) -> Audit:
    """Read all `.cu` files under a folder as a compiler does, without their includes.

    Args:
        folder: the folder that TensorRT-LLM's generator, or a descendant's, wrote. Only regular files are read; symbolic
            links, special files, and what cannot be read are reported and make the verdict negative.

    Returns:
        Which of the 63 kernels are there, and what else is, with places.

    Example:
        >>> audit(Path("generated")).ok  # doctest: +SKIP
        True

    Raises:
        InvalidValueError: if there are none.
    """
    paths, skipped = find_files(folder, lambda name: name.lower().endswith(".cu"))
    prefix = len(os.path.join(folder, ""))  # noqa: PTH118 # paths as strings: there may be 10^5
    files = []
    not_read = [(printable(str(path)[prefix:] or str(path)), reason) for path, reason in skipped]
    for path in paths:
        name = printable(str(path)[prefix:])
        try:
            found = scan(read_file(path))
        except NotReadError as error:
            not_read.append((name, str(error)))
        else:
            files.append(AuditedFile(path, name, found.instantiations, found.problems))
    if not files and not not_read:
        raise InvalidValueError(f"no .cu files under {folder}: name the folder that TensorRT-LLM's generator wrote")
    return Audit(folder, files, not_read)
