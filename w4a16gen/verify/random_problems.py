"""Random problems on random kernels, beside the fixed cases of numeric.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.kernels.epilogue import Activation, CallEpilogue, why_not_by, why_not_gated
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.library import Library
from w4a16gen.verify.guards import GuardedGpu, Launch
from w4a16gen.verify.numeric import NumericProof, judge, launched, library_weight
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import PLAIN, Expectation, Extra, random_weight

KIND = "random problem"
LAUNCHES_PER_WEIGHT = 24
"""Problems that share a weight and activations, because drawing and multiplying those in float64 takes longest."""
GROUP_SIZES = (32, 64, 96, 128, 160, 192, 256, 320, 512)
MOST_TOKENS = (1, 8, 17, 64, 130, 300, 700)
ALPHAS = (1.0, 0.75, -2.0)


def draw_weight(rng: np.random.Generator, mode: QuantMode) -> QuantizedWeight:
    """Draw a weight of up to 480 channels and K of 1,536, or in one of ten cases 2,400 and 4,096.

    One in ten grouped weights has a single group, of any multiple of 8; the others may have several. One weight in five
    has scales of 2^-8 to 2^9 times the usual size.
    """
    large = rng.random() < 0.1  # noqa: PLR2004
    n = 8 * int(rng.integers(1, 301 if large else 61))
    if mode.is_grouped and rng.random() < 0.9:  # noqa: PLR2004
        group = int(rng.choice(GROUP_SIZES))
        k = group * int(rng.integers(1, (4096 if large else 1536) // group + 1))
    else:
        group = k = 8 * int(rng.integers(1, 301))
    size = 0.01 * 2.0 ** int(rng.integers(-8, 10)) if rng.random() < 0.2 else 0.01  # noqa: PLR2004
    return random_weight(rng, n, k, group, mode, size=size)


class _Deck:
    """Deals kernels in random order; each comes once per round."""

    def __init__(self, rng: np.random.Generator, configs: Iterable[KernelConfig]) -> None:
        self._rng, self._configs = rng, list(configs)
        self._left: list[KernelConfig] = []

    def deal(self, weight: QuantizedWeight) -> KernelConfig | None:
        """Return the next kernel that can run a weight; None if no kernel of a whole round can."""
        for _ in range(2 * len(self._configs)):
            if not self._left:
                self._left = [self._configs[index] for index in self._rng.permutation(len(self._configs))]
            config = self._left.pop()
            fits = config.epilogue is not Epilogue.GATED or why_not_gated(weight.n) is None
            if fits and why_cannot_run(config, Problem(1, weight.n, weight.k, weight.group_size)) is None:
                return config
        return None


def prove_random(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    count: int,
    *,
    device: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Run random problems on a Hopper GPU and add the outcomes to the kernels' proofs.

    Shape, group size, m, alpha, bias, scales, kernel, graph and dependent launch are random, and of kernels with an
    epilogue the activation and whether there is a residual. Results are judged like those of the fixed cases: against
    float64, on poisoned outputs between guards.

    Args:
        library: the loaded build.
        proofs: the kernels to run, with the proofs to add to.
        count: how many problems; all of them run, even if some fail.
        device: the GPU.
        seed: of the random numbers.
        progress: called after every weight.
    """
    gpu = GuardedGpu(library, device)
    rng = np.random.default_rng(seed)
    modes = sorted({config.mode for config in proofs})
    decks = {mode: _Deck(rng, sorted(config for config in proofs if config.mode is mode)) for mode in modes}
    done = 0
    while done < count and modes:
        mode = modes[int(rng.integers(len(modes)))]
        weight = draw_weight(rng, mode)
        launches = min(LAUNCHES_PER_WEIGHT, count - done)
        done += _run_weight(gpu, rng, weight, decks[mode], proofs, launches)
        progress(done, count, f"{KIND} {mode} n={weight.n} k={weight.k} group={weight.group_size}")


def _run_weight(
    gpu: GuardedGpu,
    rng: np.random.Generator,
    weight: QuantizedWeight,
    deck: _Deck,
    proofs: Mapping[KernelConfig, NumericProof],
    launches: int,
) -> int:
    """Run some problems of one weight; return how many ran."""
    most = int(rng.choice(MOST_TOKENS))
    a = rng.standard_normal((most, weight.k)).astype(np.float16)
    bias = rng.standard_normal(weight.n).astype(np.float16)
    on_gpu = gpu.upload(a)
    expected = Expectation(a, weight)
    small = min(1.0, 0.01 / float(weight.scales.max()))  # keeps what epilogues multiply or square within fp16
    packed: dict[object, PackedWeight] = {}
    what = f"{KIND} n={weight.n} k={weight.k} group={weight.group_size}"
    for turn in range(launches):
        config = deck.deal(weight)
        if config is None:
            return turn
        layout = config.target, config.epilogue is Epilogue.GATED
        if layout not in packed:
            packed[layout] = library_weight(gpu, weight, config, gated=layout[1])
        with_bias, in_graph, dependent = (bool(flag) for flag in rng.integers(0, 2, 3))
        launch = Launch(
            m=int(rng.integers(1, most + 1)),
            alpha=float(rng.choice(ALPHAS)) * (1 if config.epilogue is Epilogue.NONE else small),
            bias=bias if with_bias else None,
            in_graph=in_graph,
            dependent=dependent,
            extra=_draw_extra(rng, config, most, weight.n),
        )
        got = launched(gpu, proofs[config], config, on_gpu, packed[layout], launch, what)
        if got is not None:
            judge(proofs[config], KIND, f"{what} {launch}", got, expected, launch)
    return launches


def _draw_extra(rng: np.random.Generator, config: KernelConfig, rows: int, n: int) -> Extra:
    """Draw an activation that a kernel computes, and perhaps a residual; for plain kernels nothing is drawn."""
    if config.epilogue is Epilogue.NONE:
        return PLAIN
    able = [
        (activation, has_residual)
        for activation in Activation
        for has_residual in (False, True)
        if why_not_by(config.epilogue, CallEpilogue(activation, has_residual=has_residual)) is None
    ]
    activation, has_residual = able[int(rng.integers(len(able)))]
    shape = rows, CallEpilogue(activation).outputs(n)
    return Extra(activation, rng.standard_normal(shape).astype(np.float16) if has_residual else None)
