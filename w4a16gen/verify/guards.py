"""Launches between guards: bytes written beside an output, and outputs not written, are detected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import DeviceArray
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import PLAIN, Extra

CANARY = 0xA5
GUARD_BYTES = 4096
POISON = np.float16(np.nan)


@dataclass(frozen=True)
class Launch:
    """The options of one launch, on the first m rows of the activations."""

    m: int
    alpha: float
    bias: Half | None
    in_graph: bool
    dependent: bool
    extra: Extra = PLAIN
    """The activation, and a residual of at least m rows."""
    in_place: bool = False
    """Whether the output holds the residual. A graph is then replayed once, since a second time would add to the first
    result."""

    def __str__(self) -> str:
        residual = "" if self.extra.residual is None else " residual in place" if self.in_place else " residual"
        epilogue = "" if self.extra.activation is Activation.NONE else f" {self.extra.activation}"
        return (
            f"m={self.m} alpha={self.alpha} bias={self.bias is not None} graph={self.in_graph} "
            f"dependent launch={self.dependent}{epilogue}{residual}"
        )


class GuardedGpu:
    """Runs kernels on a Hopper GPU with canaries around all they write and poison where they must write."""

    def __init__(self, library: Library, device: int) -> None:
        """Use a loaded build on the GPU with this index."""
        self.library = library
        self.device = device
        self.stream = library.module.Stream(device)

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        """Copy an array to the GPU."""
        return DeviceArray.from_host(self.library.module, array, self.device)

    def guarded(self, nbytes: int, fill: npt.NDArray[np.uint8] | None = None) -> DeviceArray:
        """Allocate bytes between two guards of canaries."""
        host = np.full(GUARD_BYTES + nbytes + GUARD_BYTES, CANARY, np.uint8)
        if fill is not None:
            host[GUARD_BYTES : GUARD_BYTES + nbytes] = fill
        return self.upload(host)

    def capture(self, launch: Callable[[], None]) -> None:
        """Capture launches on the stream, which `stream.replay` then repeats."""
        self.stream.begin_capture()
        try:
            launch()
        finally:
            self.stream.end_capture()  # also after a refusal: a stream left in capture fails every later launch

    def launch(self, launch: Callable[[], None], *, in_graph: bool, replays: int = 2) -> None:
        """Launch on the stream, or in a graph that is then replayed, and wait for the end."""
        if in_graph:
            self.capture(launch)
            for _ in range(replays):
                self.stream.replay()
        else:
            launch()
        self.stream.synchronize()

    def run(self, config: KernelConfig, a: DeviceArray, weight: PackedWeight, asked: Launch) -> Half:
        """Launch on a poisoned output between canaries, with a workspace of exactly the stated size.

        Raises:
            W4A16Error: if the launch is refused, or a canary was overwritten.
        """
        m = asked.m
        problem = Problem(m, weight.n, weight.k, weight.group_size)
        residual = None if asked.extra.residual is None else asked.extra.residual[:m]
        held = residual if asked.in_place and residual is not None else np.full((m, weight.outputs), POISON, np.float16)
        output = self.guarded(held.nbytes, np.ascontiguousarray(held).reshape(-1).view(np.uint8))
        out = Window(output, (m, weight.outputs), "<f2", GUARD_BYTES)
        added = out if asked.in_place else None if residual is None else self.upload(residual)
        needed = self.library.workspace_bytes(config, problem, device=self.device)
        workspace = self.guarded(needed)
        bias = None if asked.bias is None else self.upload(asked.bias)

        def launch() -> None:
            self.library.gemm(
                Window(a, (m, weight.k), "<f2", 0),
                weight,
                bias=bias,
                alpha=asked.alpha,
                config=config,
                out=out,
                workspace=Window(workspace, (needed,), "|u1", GUARD_BYTES),
                stream=self.stream,
                dependent_launch=asked.dependent,
                activation=asked.extra.activation,
                residual=added,
            )

        self.launch(launch, in_graph=asked.in_graph, replays=1 if asked.in_place else 2)
        result: Half = unguarded(output.to_host(), "output").view(np.float16).reshape(m, weight.outputs)
        unguarded(workspace.to_host(), "workspace")
        return result


def unguarded(host: npt.NDArray[np.uint8], what: str) -> npt.NDArray[np.uint8]:
    """Return what lies between the guards.

    Raises:
        W4A16Error: if a canary was overwritten.
    """
    if (host[:GUARD_BYTES] != CANARY).any() or (host[-GUARD_BYTES:] != CANARY).any():
        raise W4A16Error(f"wrote beyond the {what}")
    return host[GUARD_BYTES:-GUARD_BYTES]


@dataclass(frozen=True)
class Window:
    """Part of a device array, seen as another shape and dtype."""

    base: DeviceArray
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.base.buffer.pointer + self.offset
        return {"shape": self.shape, "typestr": self.dtype, "data": (address, False), "strides": None, "version": 3}
