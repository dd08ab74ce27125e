"""Kernels with epilogues on a Hopper GPU, against float64: on ragged problems, in place, and bit for bit again.

The residual is another array, or the output itself. Where the output holds the residual, a value that is read after it
was written, or added twice, is off by about its own size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.kernels.epilogue import Activation, CallEpilogue
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.arrays import DeviceArray
from w4a16gen.runtime.library import Library
from w4a16gen.verify.guards import GuardedGpu, Launch
from w4a16gen.verify.numeric import NumericProof, judge, launched, library_weight
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.quantized import Half, QuantizedWeight
from w4a16gen.weights.reference import Expectation, Extra, random_weight

KIND = "epilogue"
SHAPES = ((272, 768, 128), (400, 1000, 1000), (592, 256, 64))
"""Channels, K and group size: the last tile of channels is a part of a block, or of a pair of blocks."""
TOKENS = (1, 7, 17, 100, 0)
"""0 stands for one more than the kernel's CTA tokens: the last tile has one token, or overlaps the tile before it."""
ROWS = 257
"""Of the activations: the most CTA tokens, and one."""
_RESIDUALS = ("none", "apart", "in place")
_ALPHAS = (1.0, 0.75, -0.5)
PLAN = {
    epilogue: [
        (activation, residual)
        for activation, residual in itertools.product(Activation, _RESIDUALS)
        if CallEpilogue(activation, has_residual=residual != "none").kernels is epilogue is not Epilogue.NONE
    ]
    for epilogue in Epilogue
}
"""The activations and residuals that kernels with an epilogue compute. Other proofs are about plain products."""


@dataclass(frozen=True)
class _Problem:
    """A weight with activations, a bias and residuals, on the host and on the GPU."""

    weight: QuantizedWeight
    expected: Expectation
    bias: Half
    residuals: Mapping[bool, Half]
    """By whether channels are gated: fp16 [rows, n / 2] or [rows, n]."""
    on_gpu: DeviceArray
    packed: Mapping[bool, PackedWeight]
    """By whether it is packed for gated activations."""

    @classmethod
    def draw(
        cls, gpu: GuardedGpu, rng: np.random.Generator, config: KernelConfig, shape: tuple[int, int, int]
    ) -> _Problem:
        """Draw the numbers for kernels of a mode, and move them to the GPU."""
        n, k, group = shape
        weight = random_weight(rng, n, k, group if config.mode.is_grouped else k, config.mode)
        a = rng.standard_normal((ROWS, k)).astype(np.float16)
        columns = {False: n, True: n // 2}
        return cls(
            weight,
            Expectation(a, weight),
            rng.standard_normal(n).astype(np.float16),
            {gated: rng.standard_normal((ROWS, count)).astype(np.float16) for gated, count in columns.items()},
            gpu.upload(a),
            {gated: library_weight(gpu, weight, config, gated=gated) for gated in columns},
        )

    def launches(self, config: KernelConfig) -> Iterator[Launch]:
        """Yield a launch for each activation and residual of a kernel, with the numbers of tokens in turn."""
        for turn, (activation, residual) in enumerate(PLAN[config.epilogue]):
            added = None if residual == "none" else self.residuals[activation.is_gated]
            yield Launch(
                m=TOKENS[turn % len(TOKENS)] or config.cta.tokens + 1,
                alpha=_ALPHAS[turn % len(_ALPHAS)],
                bias=self.bias if turn % 2 else None,
                in_graph=turn % 4 == 1,
                dependent=turn % 3 == 1,
                extra=Extra(activation, added),
                in_place=residual == "in place",
            )


def prove_epilogues(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    *,
    device: int = 0,
    seed: int = 0,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    progress: Progress = no_progress,
) -> None:
    """Run all that kernels with epilogues compute on a Hopper GPU and add the outcomes to the kernels' proofs.

    Args:
        library: the loaded build.
        proofs: the kernels to run, with the proofs to add to.
        device: the GPU.
        seed: of the random numbers.
        shapes: channels, K and group size of the problems.
        progress: called after the kernels of a mode have run a problem.
    """
    gpu = GuardedGpu(library, device)
    by_mode: dict[QuantMode, list[KernelConfig]] = {}
    for config in sorted(proofs):
        if PLAN[config.epilogue]:
            by_mode.setdefault(config.mode, []).append(config)
    todo = list(itertools.product(by_mode, shapes))
    for done, (mode, shape) in enumerate(todo, 1):
        problem = _Problem.draw(gpu, np.random.default_rng((seed, done)), by_mode[mode][0], shape)
        for config in by_mode[mode]:
            _prove(gpu, config, proofs[config], problem)
        progress(done, len(todo), f"{mode} {KIND} n={shape[0]} k={shape[1]}")


def _prove(gpu: GuardedGpu, config: KernelConfig, proof: NumericProof, problem: _Problem) -> None:
    """Run each activation and residual of one kernel twice, and judge the results."""
    weight = problem.weight
    if why_cannot_run(config, Problem(1, weight.n, weight.k, weight.group_size)) is not None:
        return
    what = f"{KIND} n={weight.n} k={weight.k} group={weight.group_size}"
    for launch in problem.launches(config):
        packed = problem.packed[launch.extra.activation.is_gated]
        got = launched(gpu, proof, config, problem.on_gpu, packed, launch, what)
        again = None if got is None else launched(gpu, proof, config, problem.on_gpu, packed, launch, what)
        if got is None or again is None:
            continue
        judge(proof, KIND, f"{what} {launch}", got, problem.expected, launch)
        if not np.array_equal(got.view(np.uint16), again.view(np.uint16)):
            count = int((got.view(np.uint16) != again.view(np.uint16)).sum())
            proof.failures.append(f"{what} {launch}: {count} of {got.size} values differ the second time")
