"""What a folder of TensorRT-LLM's generated sources has of its 63 W4A16 kernels, and what else."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.folders import NotReadError, find_files, printable, read_file
from w4a16gen.integrations.tensorrt_llm.instantiations import Problem, scan
from w4a16gen.integrations.tensorrt_llm.known import W4A16, Found, classify
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space

_MOST_PLACES = 10


@dataclass
class AuditedFile:
    """What a file has."""

    path: Path
    name: str
    """Its path in the audited folder, with bytes that cannot be printed as escapes."""
    found: list[Found] = field(default_factory=list)
    """Its instantiations, without those that no build reads."""
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def types(self) -> Counter[str]:
        """Number of instantiations by types."""
        return Counter(found.types for found in self.found)

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
    total: int = 0
    """Number of instantiations, also conditional ones."""
    foreign: Counter[str] = field(default_factory=Counter)
    """Number of other instantiations: by types, by template, or by the macro that may write them."""
    foreign_places: dict[str, list[str]] = field(default_factory=dict)
    """Where the first ones are, each as `file:line`."""
    unknown: list[str] = field(default_factory=list)
    """FP16 x uint4 instantiations that are none of the 63, by their template arguments."""
    unknown_places: list[str] = field(default_factory=list)
    conditional: list[tuple[str, str]] = field(default_factory=list)
    """Instantiations that need a macro which nobody here defines: what and where, and the conditions."""
    _by_kernel: dict[str, list[Found]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        """Count what the files have."""
        for file in self.files:
            self.total += len(file.found)
            for found in file.found:
                self._count(file, found)

    def _count(self, file: AuditedFile, found: Found) -> None:
        if found.kernel is not None and not found.is_conditional:
            self._by_kernel[found.kernel].append(found)
            return
        place = f"{file.name}:{found.instantiation.line}"
        if found.is_conditional:
            self.conditional.append((f"{found.types} at {place}", " && ".join(found.instantiation.conditions)))
        elif found.types == W4A16:
            self.unknown.append(", ".join(found.instantiation.arguments))
            self.unknown_places.append(place)
        else:
            self.foreign[found.types] += 1
            places = self.foreign_places.setdefault(found.types, [])
            if len(places) < _MOST_PLACES:
                places.append(place)

    @cached_property
    def kernels(self) -> Counter[KernelConfig]:
        """Number of instantiations of each of the 63 that is there."""
        return Counter({KernelConfig.parse(name): len(found) for name, found in self._by_kernel.items()})

    @cached_property
    def missing(self) -> list[KernelConfig]:
        """Those of the 63 that are not there."""
        return sorted(set(enumerate_space("trtllm")) - set(self.kernels))

    @cached_property
    def duplicates(self) -> list[KernelConfig]:
        """Those that one build may have more than once."""
        return sorted(
            KernelConfig.parse(name) for name, found in self._by_kernel.items() if not _are_alternatives(found)
        )

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
            "foreign_places": dict(sorted(self.foreign_places.items())),
            "unknown": self.unknown,
            "unknown_places": self.unknown_places,
            "conditional": [{"what": what, "condition": condition} for what, condition in self.conditional],
            "problems": self.problems,
            "files": [
                {
                    "file": file.name,
                    "types": dict(sorted(file.types.items())),
                    "mixed": file.is_mixed,
                    "kernels": [found.kernel for found in file.found if found.kernel],
                }
                for file in self.files
            ],
        }


def _are_alternatives(several: list[Found]) -> bool:
    """Return whether no build has two of some instantiations: one's condition is the opposite of another's."""
    seen: list[set[str]] = []
    for found in several:
        conditions = set(found.instantiation.conditions)
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
        folder: the folder that TensorRT-LLM's generator, or a descendant's, wrote. Only regular files are read.
            Symbolic links, special files, and what cannot be read are reported and make the verdict negative.

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
            files.append(AuditedFile(path, name, [classify(one) for one in found.instantiations], found.problems))
    if not files and not not_read:
        raise InvalidValueError(f"no .cu files under {folder}: name the folder that TensorRT-LLM's generator wrote")
    return Audit(folder, files, not_read)
