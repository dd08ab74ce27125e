"""Builds kernels for the CPU and runs them there: every CUDA thread is a fiber (tests/cpp/emulated)."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from c_structures import CGemmArguments, CProblem
from paths import CPP

from w4a16gen.build import toolchain
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.render import render_kernel, render_registry, render_unit, source_name
from w4a16gen.weights.packed import pack_weight
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import random_weight

EMULATED = CPP / "emulated"
ALIGNMENT = 128
CANARY = 256
"""Bytes behind an output or a workspace that nobody may write."""
FLAG_BYTES = 128
"""The flags of a stream-K work unit, ahead of its sums."""
MESSAGE_BYTES = 2000
Half = npt.NDArray[np.float16]
_OBJECTS = tempfile.TemporaryDirectory(prefix="emulated-")
"""What was compiled in this process: libraries share the emulation itself."""


class EmulationError(Exception):
    """A launch failed: a deadlock, or something that the hardware forbids."""


def build_for_emulation(
    configs: Iterable[KernelConfig],
    folder: Path,
    headers: Path = CUDA_FOLDER,
    rendered: Callable[[KernelConfig], str] = render_kernel,
    optimisation: str = "-O1",
) -> Emulation:
    """Compile native kernels with the host compiler into a library.

    Args:
        configs: the kernels.
        folder: for the sources and the library.
        headers: the folder of the package's headers, or of a copy of it.
        rendered: returns the source of a kernel.
        optimisation: an option of the compiler, for the kernels. With -O2 they take half as long again to compile, and
            run no faster.
    """
    kernels = sorted(configs)
    folder.mkdir(exist_ok=True)
    for config in kernels:
        (folder / source_name(config)).write_text(rendered(config))
    unit, registry = folder / "unit.cu", folder / "registry.cpp"
    unit.write_text(render_unit([source_name(config) for config in kernels]))
    registry.write_text(render_registry(kernels))
    tools = toolchain.find_toolchain()
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
    includes = [f"-I{EMULATED}", f"-I{headers}", f"-I{folder}", f"-isystem{tools.cuda_include}"]
    compiler = [str(tools.host_compiler), "-std=c++17", "-fPIC", "-fvisibility=hidden", *warnings, *includes]
    shared = [registry, *sorted((headers / "library").glob("*.cpp")), *sorted(EMULATED.glob("*.cpp"))]
    objects = [
        _compiled([*compiler, option, "-x", "c++", str(source)])
        for option, source in [(optimisation, unit), *(("-O2", source) for source in shared)]
    ]
    library = folder / "emulated.so"
    subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)  # noqa: S603
    return Emulation(library)


def _compiled(command: Sequence[str]) -> Path:
    """Return the object that a command compiles; one of the same options and preprocessed text is compiled once."""
    text = subprocess.run([*command, "-E", "-P"], check=True, stdout=subprocess.PIPE).stdout  # noqa: S603
    options = " ".join(option for option in command if option.startswith("-") and not option.startswith("-I"))
    made = Path(_OBJECTS.name) / f"{hashlib.sha256(options.encode() + text).hexdigest()}.o"
    if not made.exists():
        subprocess.run([*command, "-c", "-o", str(made)], check=True)  # noqa: S603
    return made


def build_mutant(configs: Iterable[KernelConfig], folder: Path, header: str, statement: str, other: str) -> Emulation:
    """Compile kernels of which a native header has another statement.

    Args:
        configs: the kernels.
        folder: for the headers, the sources and the library.
        header: name of the header.
        statement: the text to replace, wherever it stands.
        other: what takes its place.
    """
    headers = folder / "cuda"
    shutil.copytree(CUDA_FOLDER, headers)
    path = headers / "native" / header
    text = path.read_text()
    assert statement in text
    path.write_text(text.replace(statement, other))
    return build_for_emulation(configs, folder / "build", headers, optimisation="-O0")  # it runs for a moment


@dataclass(frozen=True)
class Launch:
    """How a product is launched."""

    seed: int = 0
    """Of the order in which threads run and copies complete."""
    sm_count: int = 4
    """Multiprocessors of the GPU, below 64."""
    alpha: float = 1.0
    bias: Half | None = None
    is_dependent: bool = False
    """Whether the kernel before, which writes activations, bias and residual, still runs when this launch begins."""
    activation: Activation = Activation.NONE
    residual: Half | None = None
    """What is added, of the shape of the output."""
    in_place: bool = False
    """Whether the output holds the residual."""
    is_captured: bool = False
    """Whether it is captured, behind a kernel of another library."""
    slow_cta: int | None = None
    """A CTA that is slow, so that others wait for it."""


class Operands(NamedTuple):
    """The operands of a product."""

    a: Half
    """[m, k]."""
    weight: QuantizedWeight
    bias: Half
    """[n]."""


def draw_operands(rng: np.random.Generator, config: KernelConfig, problem: tuple[int, int, int, int]) -> Operands:
    """Draw operands for a kernel.

    Args:
        rng: source of the numbers.
        config: the kernel, whose mode the weight gets.
        problem: m, n, k, and the group size of modes that have groups.
    """
    m, n, k, group_size = problem
    weight = random_weight(rng, n, k, group_size if config.mode.is_grouped else k, config.mode)
    a = rng.standard_normal((m, k)).astype(np.float16)
    return Operands(a, weight, rng.standard_normal(n).astype(np.float16))


class Emulation:
    """A library of kernels that run on the CPU."""

    def __init__(self, library: Path) -> None:
        """Load the library."""
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_add_buffer.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.library.emulation_add_previous.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
        self.library.emulation_shared_bytes.restype = ctypes.c_size_t

    def gemm(self, config: KernelConfig, a: Half, weight: QuantizedWeight, launch: Launch) -> Half:
        """Return activation(alpha * a x weight + bias) + residual.

        The workspace begins with random bytes, or with zeros for odd seeds. Copies may read the given arrays only.

        Raises:
            EmulationError: if the launch failed, wrote behind the output or the workspace, or left a flag set.
        """
        (m, k), n = a.shape, weight.n
        rng = np.random.default_rng(launch.seed)
        gated = launch.activation.is_gated
        columns = n // 2 if gated else n
        activations, packed = aligned(a), aligned(pack_weight(weight, gated=gated).data)
        bias = None if launch.bias is None else aligned(launch.bias)
        output = aligned(np.full(m * columns * 2 + CANARY, 0xFF, np.uint8))
        residual = None if launch.residual is None else aligned(launch.residual)
        if residual is not None and launch.in_place:
            residual = output[:-CANARY].view(np.float16).reshape(m, columns)
            residual[...] = launch.residual
        problem = CProblem(m, n, k, weight.group_size)
        kernel = self.library.w4a16_find_kernel(config.name.encode())
        needed = ctypes.c_size_t()
        self._call("w4a16_workspace_bytes", kernel, problem, launch.sm_count, ctypes.byref(needed))
        before = rng.integers(0, 1 if launch.seed % 2 else 256, needed.value, np.uint8)
        memory = aligned(np.append(before, np.full(CANARY, 0xFF, np.uint8)))
        workspace = memory[: needed.value]
        self.library.emulation_set(launch.seed, launch.sm_count)
        if launch.is_captured:
            self.library.emulation_capture()
        if launch.slow_cta is not None:
            self.library.emulation_slow_down(launch.slow_cta)
        for buffer in (activations, packed, bias, residual):
            if buffer is not None:
                self.library.emulation_add_buffer(buffer.ctypes.data, buffer.nbytes)
        late = {}
        for name, array in (("activations", activations), ("bias", bias), ("residual", residual)):
            if launch.is_dependent and array is not None:
                late[name] = array.copy()
                self.library.emulation_add_previous(array.ctypes.data, late[name].ctypes.data, array.nbytes)
                array[...] = np.nan
        arguments = CGemmArguments(
            activations=activations.ctypes.data,
            packed=packed.ctypes.data,
            packed_bytes=packed.nbytes,
            bias=None if bias is None else bias.ctypes.data,
            output=output.ctypes.data,
            workspace=workspace.ctypes.data if workspace.size else None,
            workspace_bytes=workspace.nbytes,
            stream=None,
            alpha=launch.alpha,
            dependent_launch=int(launch.is_dependent),
            activation=launch.activation.number,
            residual=None if residual is None else residual.ctypes.data,
        )
        self._call("w4a16_gemm", kernel, problem, ctypes.byref(arguments))
        if not (output[-CANARY:] == 0xFF).all():
            raise EmulationError("the kernel wrote behind its output")
        if not (memory[needed.value :] == 0xFF).all():
            raise EmulationError("the kernel wrote behind its workspace")
        check_flags(flags_of(workspace, config), flags_of(before, config))
        return output[:-CANARY].view(np.float16).reshape(m, columns)

    def launched(self) -> tuple[int, int]:
        """Return the CTAs of the last launch, and the bytes of shared memory of each."""
        return self.library.emulation_grid(), self.library.emulation_shared_bytes()

    def _call(self, name: str, kernel: int, problem: CProblem, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        call = getattr(self.library, name)
        if call(kernel, ctypes.byref(problem), *arguments, message, MESSAGE_BYTES):
            raise EmulationError(message.value.decode())


def flags_of(workspace: npt.NDArray[np.uint8], config: KernelConfig) -> npt.NDArray[np.uint64]:
    """Return the flags of all work units of a kernel."""
    sums = 4 * config.cta.channels * config.cta.tokens
    flags: npt.NDArray[np.uint64] = workspace.reshape(-1, FLAG_BYTES + sums)[:, :FLAG_BYTES].copy().view(np.uint64)
    return flags


def check_flags(flags: npt.NDArray[np.uint64], before: npt.NDArray[np.uint64]) -> None:
    """Check that a launch cleared all flags that it set.

    Raises:
        EmulationError: if it left one set. A graph would repeat the launch with the same epoch.
    """
    if not ((flags == 0) | (flags == before)).all():
        raise EmulationError("the kernel left the flag of a work unit set")


def aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy at an address that kernels take."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    copy: npt.NDArray[Any] = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
