"""Proofs on a build that need no GPU: the manifests agree, nothing foreign is in it, and its machine code is right."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w4a16gen.build.toolchain import require_cuobjdump
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.config import KernelConfig, Schedule
from w4a16gen.kernels.problem import Problem
from w4a16gen.kernels.render import render_kernel, source_name
from w4a16gen.runtime.library import Library
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS

FOREIGN = re.compile(r"fp8|e4m3|e5m2|bf16|bfloat|(?<![a-z])u?int8|[^a-z]s8[^0-9a-z]|fp4|e2m1", re.IGNORECASE)
"""Type names of other kernels: FP8, BF16, INT8, FP4, in CUDA's, CUTLASS's and TensorRT-LLM's spellings."""
_NAME = re.compile(r"w4a16_sm90_[a-z0-9_]+")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_BESIDE = re.compile(
    r"^_ZN5w4a166native\d+(?:pack_(?:factors|blocks)|probe_(?:read|multiply)|route|count_routes|list_(?:token_tiles|indexed_rows)"
    r"|(?:gather|activate|combine)_rows)ILi\d+EE"
)
"""The functions that pack weights on the GPU, that measure it, and that route to experts: no kernels of the table."""
_REGISTER_HGMMA = re.compile(r"HGMMA[.\w]* R\d+, R\d+[.\w]*, gdesc")
"""An HGMMA whose A operand is registers: the weights."""
_COUNTED = ("HGMMA", "UTMALDG", "UBLKCP", "HMMA", "STL", "LDL")
_INSTRUCTION_BYTES = 16
_MAX_SOURCE_BYTES = 1 << 20
"""More than any source has; a file that is larger differs whatever follows."""
_PROBED = Problem(m=1, n=264, k=1152, group_size=128)


@dataclass
class KernelCode:
    """The properties of a kernel's machine code."""

    registers: int = 0
    stack_bytes: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    register_hgmmas: int = 0

    @property
    def code_bytes(self) -> int:
        """Size of the machine code."""
        return _INSTRUCTION_BYTES * sum(self.instructions.values())


@dataclass
class StaticProof:
    """Outcome: what was proven of each kernel, and every violation as a sentence."""

    kernels: list[dict[str, Any]]
    violations: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything held."""
        return not self.violations


def _run(program: Path, option: str, library: Path) -> str:
    """Run cuobjdump beside a library: it passes file names to a shell, and a folder may have any name."""
    arguments = [option, library.name]
    finished = subprocess.run(  # noqa: S603
        [program.absolute(), *arguments], cwd=library.parent, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0 and "does not contain device code" not in finished.stderr:
        raise NotBuiltError(f"{program.name} {' '.join(arguments)} failed: {finished.stderr.strip()[:300]}")
    return finished.stdout


def read_code(library: Path) -> dict[str, KernelCode]:
    """Read registers, stack and instructions of every device function of a library, by kernel name.

    Functions whose symbol holds no kernel name are listed under their symbol.

    Raises:
        MissingToolError: if cuobjdump is not installed.
        NotBuiltError: if it cannot read the library.
    """
    cuobjdump = require_cuobjdump()
    found: dict[str, KernelCode] = {}

    def kernel(symbol: str) -> KernelCode:
        name = _NAME.search(symbol)
        return found.setdefault(name[0] if name else symbol, KernelCode())

    for block in re.split(r"^ ?Function ", _run(cuobjdump, "-res-usage", library), flags=re.MULTILINE)[1:]:
        resources = _RESOURCES.search(block)
        if resources is not None:
            code = kernel(block.split(":", 1)[0])
            code.registers = max(code.registers, int(resources[1]))
            code.stack_bytes = max(code.stack_bytes, int(resources[2]) + int(resources[4]))
    for block in re.split(r"^\s*Function : ", _run(cuobjdump, "-sass", library), flags=re.MULTILINE)[1:]:
        symbol, _, body = block.partition("\n")
        kernel(symbol).instructions.update(_INSTRUCTION.findall(body))
        kernel(symbol).register_hgmmas += len(_REGISTER_HGMMA.findall(body))
    return found


def code_violations(name: str, code: KernelCode) -> list[str]:
    """Say what is wrong with one kernel's machine code."""
    count = code.instructions
    by_warps = f"_{Schedule.EIGHT_WARPS}_" in name
    multiplies = (
        (
            (count["HMMA"] > 0, "has no HMMA: the tensor cores' instruction for a warp"),
            (count["HGMMA"] == 0, f"has {count['HGMMA']} HGMMA: what warpgroups multiply by"),
        )
        if by_warps
        else (
            (count["HGMMA"] > 0, "has no HGMMA: the tensor cores' warpgroup instruction"),
            (count["HMMA"] == 0, f"has {count['HMMA']} HMMA: tensor-core instructions of older GPUs"),
        )
    )
    rules = (
        *multiplies,
        (
            code.register_hgmmas == count["HGMMA"],
            f"has {count['HGMMA'] - code.register_hgmmas} HGMMA that read weights from shared memory, not registers",
        ),
        (count["UTMALDG"] > 0, "has no UTMALDG: loads by the tensor memory accelerator"),
        ("_native_" not in name or count["UBLKCP"] > 0, "has no UBLKCP: bulk copies of packed weights"),
        (count["STL"] + count["LDL"] == 0, f"spills: {count['STL']} STL and {count['LDL']} LDL"),
        (code.stack_bytes == 0, f"uses {code.stack_bytes} bytes of stack"),
    )
    return [f"{name} {what}" for holds, what in rules if not holds]


def _difference(left: str, a: set[str], right: str, b: set[str]) -> list[str]:
    """Say which names two sets do not share."""
    return [f"{name} is {left} but not {right}" for name in sorted(a - b)] + [
        f"{name} is {right} but not {left}" for name in sorted(b - a)
    ]


def source_violations(names: Sequence[str], sources: Path | None) -> list[str]:
    """Compare the emitted sources with what the renderer returns, and find type names of other kernels in them."""
    if sources is None:
        return ["the build does not name the folder of its sources: pass --generated-dir"]
    missing, violations = [], []
    for config in map(KernelConfig.parse, names):
        path = sources / source_name(config)
        if not path.is_file():
            missing.append(config.name)
            continue
        with path.open("rb") as file:
            data = file.read(_MAX_SOURCE_BYTES)
        if data != render_kernel(config).encode():
            violations.append(f"{path} differs from what the kernel was compiled from: run `w4a16gen build`")
        violations += _foreign_violations({str(path): data.decode(errors="replace")})
    if missing:
        violations.append(
            f"{sources} lacks the sources of {len(missing)} of {len(names)} kernels: pass --generated-dir, or run "
            f"`w4a16gen build`; the first is {missing[0]}"
        )
    return violations


def _foreign_violations(texts: Mapping[str, str]) -> list[str]:
    """Find type names of other kernels in texts, which are given by what they are."""
    return [
        f"{where} names a foreign type: {match[0]}" for where, text in texts.items() if (match := FOREIGN.search(text))
    ]


def _packing_violations(library: Library) -> list[str]:
    """Compare the packed sizes that Python and the library compute."""
    violations = []
    for config in (*library.configs(), *library.grouped_configs()):
        group = _PROBED.group_size if config.mode.is_grouped else _PROBED.k
        problem = Problem(_PROBED.m, _PROBED.n, _PROBED.k, group)
        layout = TARGET_LAYOUTS[config.target]
        expected, actual = (
            LAYOUTS[layout].packed_bytes(WeightGeometry(problem.n, problem.k, group, config.mode)),
            library.packed_bytes(config, problem),
        )
        if expected != actual:
            violations.append(f"{config.name} reads {actual} packed bytes for {problem}; packing writes {expected}")
    return violations


def prove(library: Library, generated: Path | None = None) -> StaticProof:
    """Prove a build without a GPU.

    Asked = emitted = exported = in the machine code, with nothing missing and nothing foreign; every kernel has HGMMA
    with weights from registers and no HMMA, or if its schedule is warps8 the other way round, TMA loads, no spills, no
    stack; the packed sizes of Python and the library agree.

    Args:
        library: the loaded build.
        generated: the folder that its sources were emitted to; None takes the one that the build's manifest names.
    """
    build = library.build
    asked = set(build.manifest.asked)
    exported = {info.config.name for info in library.kernels}
    code = read_code(build.library)
    violations = [f"{name} was asked for but failed to compile" for name in build.manifest.failed]
    violations += source_violations(build.manifest.asked, generated or build.sources)
    violations += _difference("asked for", asked, "exported", exported)
    kernels_in_code = {name for name in code if not _BESIDE.search(name)}
    violations += _difference("exported", exported, "in the machine code", kernels_in_code)
    violations += _foreign_violations({f"symbol {symbol}": symbol for symbol in sorted(set(code) | exported)})
    violations += _packing_violations(library)
    for name in sorted(exported & code.keys()):
        violations += code_violations(name, code[name])
    described = {info.config: info for info in library.kernels}
    kernels = []
    for kernel in build.manifest.kernels:
        seen, info = code.get(kernel.config.name, KernelCode()), described.get(kernel.config)
        kernels.append(
            kernel.as_json()
            | {key: getattr(info, key, None) for key in ("stages", "threads", "shared_memory_bytes")}
            | {"registers": seen.registers, "stack_bytes": seen.stack_bytes, "code_bytes": seen.code_bytes}
            | {"instructions": {name: seen.instructions[name] for name in _COUNTED}}
        )
    return StaticProof(kernels, violations)
