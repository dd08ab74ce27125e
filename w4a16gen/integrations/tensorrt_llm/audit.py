"""What files that TensorRT-LLM's generator wrote hold of its 63 W4A16 kernels, read by their template arguments."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed
from w4a16gen.integrations.tensorrt_llm.emit import render_trtllm_unit
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space

LAUNCHER = "sm90_generic_mixed_gemm_kernelLauncher"


@dataclass(frozen=True)
class Instantiation:
    """One explicit instantiation in a file."""

    begin: int
    end: int
    text: str
    function: str
    arguments: tuple[str, ...]
    """Template arguments, without white space."""

    @property
    def types(self) -> str:
        """Activation x weight, in the field's words where they are known."""
        if self.function != LAUNCHER or len(self.arguments) < 2:  # noqa: PLR2004
            return self.function
        return " x ".join(_TYPES.get(argument, argument) for argument in self.arguments[:2])

    def config(self) -> KernelConfig | None:
        """Give the kernel of space `trtllm` that it is, or None."""
        return _known().get((self.function, self.arguments))


_TYPES = {
    "half": "FP16",
    "__nv_bfloat16": "BF16",
    "__nv_fp8_e4m3": "FP8",
    "cutlass::uint4b_t": "uint4",
    "uint8_t": "uint8",
    "cutlass::float_e2m1_t": "FP4",
    "SafeFP4": "FP4",
}
W4A16 = "FP16 x uint4"


def _template_arguments(config: KernelConfig, *, mixed_input: bool) -> tuple[str, ...]:
    """Give the template arguments of a kernel's instantiation, read from what is rendered for it."""
    (only,) = parse_instantiations(render_trtllm_unit([config], mixed_input=mixed_input))
    return only.arguments


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
_HEAD = re.compile(r"\btemplate\s+(?!<)(?:[\w:]+[\s*&]+)+?([\w:]+)\s*(?=<)")


def _blanked(text: str) -> str:
    """Give a source with its comments, strings and preprocessor lines as spaces, everything else where it was."""

    def spaces(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return _DIRECTIVE.sub(spaces, _COMMENT.sub(spaces, text))


def parse_instantiations(text: str) -> list[Instantiation]:
    """Find the explicit instantiations of function templates in a source: by their grammar, not by names in them.

    Raises:
        InvalidValueError: if one does not end.
    """
    code = _blanked(text)
    found = []
    for head in _HEAD.finditer(code):
        arguments, after = _split_arguments(code, head.end())
        end = code.find(";", after)
        if end < 0:
            line = code.count("\n", 0, head.start()) + 1
            raise InvalidValueError(f"line {line}: the instantiation of {head[1]} does not end")
        found.append(
            Instantiation(head.start(), end + 1, text[head.start() : end + 1], head[1].split("::")[-1], arguments)
        )
    return found


def _split_arguments(code: str, begin: int) -> tuple[tuple[str, ...], int]:
    """Split a bracketed list at its own commas; give the parts without white space, and where it ends."""
    depth = 0
    parts = [""]
    for at in range(begin, len(code)):
        character = code[at]
        if character in "<(":
            depth += 1
            if depth == 1:
                continue
        elif character in ">)":
            depth -= 1
            if depth == 0:
                return tuple(re.sub(r"\s+", "", part) for part in parts), at + 1
        if character == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(re.sub(r"\s+", "", part) for part in parts), len(code)


@cache
def _known() -> dict[tuple[str, tuple[str, ...]], KernelConfig]:
    """Give the 63 by their launcher and its template arguments, with both spellings of schedules."""
    return {
        (LAUNCHER, _template_arguments(config, mixed_input=mixed_input)): config
        for config in enumerate_space("trtllm")
        for mixed_input in (False, True)
    }


@dataclass
class AuditedFile:
    """What a file holds."""

    path: Path
    instantiations: list[Instantiation] = field(default_factory=list)

    @property
    def types(self) -> Counter[str]:
        """How many of which types."""
        return Counter(found.types for found in self.instantiations)

    @property
    def is_mixed(self) -> bool:
        """Whether FP16 x uint4 shares the file with others: what a filter by type names loses."""
        return W4A16 in self.types and len(self.types) > 1


@dataclass
class Audit:
    """What a folder of generated sources holds, against the 63 kernels of space `trtllm`."""

    folder: Path
    files: list[AuditedFile]

    @property
    def _all(self) -> Iterator[tuple[AuditedFile, Instantiation]]:
        return ((file, found) for file in self.files for found in file.instantiations)

    @property
    def total(self) -> int:
        """Instantiations altogether."""
        return sum(1 for _ in self._all)

    @property
    def kernels(self) -> Counter[KernelConfig]:
        """How often each of the 63 is there."""
        return Counter(config for _, found in self._all if (config := found.config()) is not None)

    @property
    def missing(self) -> list[KernelConfig]:
        """Those of the 63 that are not there."""
        return sorted(set(enumerate_space("trtllm")) - set(self.kernels))

    @property
    def duplicates(self) -> list[KernelConfig]:
        """Those that are there more than once."""
        return sorted(config for config, count in self.kernels.items() if count > 1)

    @property
    def foreign(self) -> Counter[str]:
        """How many instantiations of other types there are, by type."""
        return Counter(found.types for _, found in self._all if found.types != W4A16)

    @property
    def unknown(self) -> list[str]:
        """FP16 x uint4 instantiations that are none of the 63, by their template arguments."""
        return [", ".join(found.arguments) for _, found in self._all if found.types == W4A16 and not found.config()]

    @property
    def ok(self) -> bool:
        """Whether the 63 are there and nothing else is."""
        return not (self.missing or self.foreign or self.unknown or self.duplicates)

    def as_json(self) -> dict[str, object]:
        """Give the object that `--json` carries."""
        return {
            "folder": str(self.folder),
            "instantiations": self.total,
            "present": [config.name for config in sorted(self.kernels)],
            "missing": [config.name for config in self.missing],
            "duplicates": [config.name for config in self.duplicates],
            "foreign": dict(sorted(self.foreign.items())),
            "unknown": self.unknown,
            "files": [
                {
                    "file": str(file.path.relative_to(self.folder)),
                    "types": dict(sorted(file.types.items())),
                    "mixed": file.is_mixed,
                    "kernels": [config.name for found in file.instantiations if (config := found.config())],
                }
                for file in self.files
            ],
        }


def audit(folder: Path) -> Audit:
    """Read all `.cu` files under a folder.

    Raises:
        InvalidValueError: if there are none, or one cannot be read as C++.
    """
    files = []
    for path in sorted(folder.rglob("*.cu")):
        try:
            files.append(AuditedFile(path, parse_instantiations(path.read_text(errors="replace"))))
        except InvalidValueError as error:
            raise InvalidValueError(f"{path}, {error}") from None
    if not files:
        raise InvalidValueError(f"no .cu files under {folder}: name the folder that TensorRT-LLM's generator wrote")
    return Audit(folder, files)


def extract(audited: Audit, output: Path) -> Sequence[Path]:
    """Write what is FP16 x uint4, also out of mixed files: each file with its includes and namespaces.

    Of an instantiation that is there more than once, the first is written.

    Raises:
        OSError: if the output folder cannot be written.
    """
    written = []
    seen: set[tuple[str, ...]] = set()
    for file in audited.files:
        kept = [found for found in file.instantiations if found.types == W4A16 and found.arguments not in seen]
        if not kept:
            continue
        seen |= {found.arguments for found in kept}
        text = file.path.read_text(errors="replace")
        first, last = file.instantiations[0], file.instantiations[-1]
        parts = [text[: first.begin].rstrip(), *(found.text for found in kept), text[last.end :].strip()]
        path = output / file.path.relative_to(audited.folder)
        write_if_changed(path, "\n\n".join(parts) + "\n")
        written.append(path)
    return written
