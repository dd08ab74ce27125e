"""Chains of dependent launches: a kernel after itself, reading its earlier outputs and overwriting what was read.

All numbers are small integers, so sums are exact in any order and results are compared bit for bit with integer
products. Outputs hold NaN before, so a premature read shows up as NaN, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.library import Library
from w4a16gen.verify.guards import POISON, GuardedGpu
from w4a16gen.verify.numeric import NumericProof, computes_products, library_weight
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.quantized import QuantizedWeight, canonical

KIND = "chain"
GROUP_SIZES = (32, 64, 128)
"""Four, two and one row of scales per block of 128 k: each has its own code."""
TERMS = 4
"""Weights per channel that are not 0."""
LARGEST_ACTIVATION = 4
"""At most four products follow each other: numbers stay within 4 * 4^4 = 1024. fp16 holds all integers up to 2048."""
MOST_TOKENS = 64
REPLAYS = 3

Integers = npt.NDArray[np.float64]
"""float64: exact up to 2^53, and faster to multiply than numpy's integers."""

_LINKS = (
    ("x", "up", "y"),
    ("y", "down", "u"),
    ("x", "up too", "z"),
    ("z", "down", "v"),
    ("u", "up", "z"),
    ("u", "up too", "y"),
    ("z", "down", "w"),
)
"""Activations, weight and output of each launch. Launches read the output of the previous launch, of the one before it,
and of a much earlier one; they overwrite buffers that the previous launch, or an earlier one, read."""

_PATTERNS = {"all dependent": (True,), "every second dependent": (True, False), "none dependent": (False,)}


@dataclass(frozen=True)
class Chain:
    """The weights of a chain, [n, k] each, and the right content of each buffer at its end."""

    mode: QuantMode
    weights: Mapping[str, Integers]
    left: Mapping[str, Integers]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Output channels and K of its weights."""
        return [(n, k) for n, k in (weight.shape for weight in self.weights.values())]

    def __str__(self) -> str:
        n, k = self.weights["up"].shape
        return f"{KIND} n={n} k={k}"


def channels_for(config: KernelConfig, sm_count: int) -> int:
    """Return the output channels for which a kernel's CTAs fill three quarters of a GPU's SMs.

    The CTAs are fewer than the SMs and more than half as many. If an SM holds two CTAs, two such grids run at once.
    """
    tiles = 3 * sm_count // 4 // (config.cluster.tokens * config.cluster.k)
    multiple = max(GROUP_SIZES)
    return max(tiles * config.cta.channels // multiple, 1) * multiple


def quantized(integers: Integers, mode: QuantMode, group_size: int) -> QuantizedWeight:
    """Return integers from -1 to 1, [n, k], as a weight with scales of 1, and zeros of 1 if the mode has zeros."""
    n, k = integers.shape
    zero = 1 if mode.has_zeros else 0
    q = (integers + 8 - zero).astype(np.uint8)
    if not mode.is_grouped:
        return canonical(q, np.ones(n, np.float16), None, group_size=k)
    ones = np.ones((k // group_size, n), np.float16)
    return canonical(q, ones, ones if mode.has_zeros else None, group_size=group_size)


def draw_chain(rng: np.random.Generator, n: int, k: int, mode: QuantMode) -> Chain:
    """Draw the weights and activations of a chain, and compute it on the host."""
    weights: dict[str, Integers] = {}
    for name, shape in {"up": (n, k), "up too": (n, k), "down": (k, n)}.items():
        weight = weights[name] = np.zeros(shape)
        share = shape[1] // TERMS
        places = rng.integers(0, share, (shape[0], TERMS)) + share * np.arange(TERMS)
        np.put_along_axis(weight, places, rng.choice((-1.0, 1.0), places.shape), axis=1)
    x = rng.integers(-LARGEST_ACTIVATION, LARGEST_ACTIVATION + 1, (MOST_TOKENS, k)).astype(np.float64)
    left = {"x": x}
    for source, name, target in _LINKS:
        left[target] = left[source] @ weights[name].T
    return Chain(mode, weights, left)


def prove_chains(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    *,
    sm_count: int,
    device: int = 0,
    k: int = 512,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Run chains of every kernel that computes plain products, and add the outcomes to the kernels' proofs.

    Args:
        library: the loaded build.
        proofs: the kernels to run, with the proofs to add to.
        sm_count: multiprocessors of the GPU, which decide the number of channels (`channels_for`).
        device: the GPU.
        k: input channels of the chain, a multiple of 128.
        seed: of the random numbers.
        progress: called after the kernels that share a chain.
    """
    gpu = GuardedGpu(library, device)
    sharing: dict[tuple[QuantMode, int], list[KernelConfig]] = {}
    for config in filter(computes_products, proofs):
        sharing.setdefault((config.mode, channels_for(config, sm_count)), []).append(config)
    for done, ((mode, n), configs) in enumerate(sorted(sharing.items()), 1):
        chain = draw_chain(np.random.default_rng((seed, done)), n, k, mode)
        for group_size in GROUP_SIZES if mode.is_grouped else (0,):
            runner = _Runner(gpu, chain, group_size)
            for config in configs:
                runner.prove(config, proofs[config])
        progress(done, len(sharing), f"{mode} {chain}")


class _Runner:
    """A chain on the GPU, with weights of one group size; 0 in per-column mode, where the group is each weight's k."""

    def __init__(self, gpu: GuardedGpu, chain: Chain, group_size: int) -> None:
        self._gpu, self._chain, self._group_size = gpu, chain, group_size
        self._packed: dict[Target, dict[str, PackedWeight]] = {}

    def prove(self, config: KernelConfig, proof: NumericProof) -> None:
        """Run the chain with one kernel, for one token and a full tile, in every pattern of dependent launches."""
        if any(why_cannot_run(config, Problem(1, n, k, self._group_size or k)) for n, k in self._chain.shapes):
            return
        for m in sorted({1, min(config.cta.tokens, MOST_TOKENS)}):
            for name, pattern in _PATTERNS.items():
                try:
                    wrong = self._wrong(config, m, pattern)
                except (W4A16Error, RuntimeError) as error:
                    wrong = str(error)
                proof.record(KIND, f"{self._chain} group={self._group_size} m={m} {name}", wrong)

    def _weights(self, config: KernelConfig) -> dict[str, PackedWeight]:
        if config.target not in self._packed:
            self._packed[config.target] = {
                name: library_weight(self._gpu, quantized(integers, self._chain.mode, self._group_size), config)
                for name, integers in self._chain.weights.items()
            }
        return self._packed[config.target]

    def _wrong(self, config: KernelConfig, m: int, pattern: tuple[bool, ...]) -> str | None:
        """Replay the chain from buffers of NaN; return the first wrong buffer in words, or None."""
        library, stream = self._gpu.library, self._gpu.stream
        wanted = {name: values[:m].astype(np.float16) for name, values in self._chain.left.items()}
        weights = self._weights(config)
        buffers = {name: self._gpu.upload(values) for name, values in wanted.items()}
        problems = [Problem(m, n, k, self._group_size or k) for n, k in self._chain.shapes]
        needed = max(library.workspace_bytes(config, problem, device=self._gpu.device) for problem in problems)
        workspace = self._gpu.upload(np.zeros(needed, np.uint8))
        stream.begin_capture()
        try:
            for turn, (source, weight, target) in enumerate(_LINKS):
                library.gemm(
                    buffers[source],
                    weights[weight],
                    config=config,
                    out=buffers[target],
                    workspace=workspace,
                    stream=stream,
                    dependent_launch=pattern[turn % len(pattern)],
                )
        finally:
            stream.end_capture()  # also after a refusal: a stream left in capture fails every later launch
        for _ in range(REPLAYS):
            for name in wanted.keys() - {"x"}:
                buffers[name].buffer.upload(np.full_like(wanted[name], POISON))
            stream.replay()
            stream.synchronize()
            for name, values in wanted.items():
                if count := int((buffers[name].to_host() != values).sum()):
                    return f"{count} of {values.size} values in {name} are wrong"
        return None
