"""Numerical proofs on a Hopper GPU: each kernel of a build against float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Scheduler
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.arrays import DeviceArray
from w4a16gen.runtime.library import Library
from w4a16gen.verify.guards import GuardedGpu, Launch
from w4a16gen.weights.packed import PackedWeight, pack_weight
from w4a16gen.weights.quantized import Half, QuantizedWeight
from w4a16gen.weights.reference import Expectation, dequantized_half, error_over_bound, random_weight


@dataclass
class NumericProof:
    """Outcome for one kernel: passed checks by kind, the largest error over its bound, and every failure."""

    name: str
    passed: dict[str, int] = field(default_factory=dict)
    worst_error_over_bound: float = 0.0
    failures: list[str] = field(default_factory=list)

    def record(self, kind: str, label: str, problem: str | None) -> None:
        """Count a check as passed, or keep the sentence that says what is wrong."""
        if problem is None:
            self.passed[kind] = self.passed.get(kind, 0) + 1
        else:
            self.failures.append(f"{label}: {problem}")

    def as_json(self) -> dict[str, Any]:
        """Return the object that the report carries."""
        return {
            "name": self.name,
            "passed": self.passed,
            "worst_error_over_bound": round(self.worst_error_over_bound, 4),
            "failures": self.failures,
        }


@dataclass(frozen=True)
class Case:
    """One weight with its launches, for every kernel of the mode that can run it."""

    kind: str
    weight: QuantizedWeight
    rows: int
    """Activation rows; a launch uses the first m of them."""
    tokens: tuple[int, ...]
    """The values of m; 0 means one more than the kernel's CTA tokens."""
    options: tuple[tuple[float, bool], ...]
    """(alpha, with bias) pairs, in turn over the values of m."""
    of_stream_k: bool = False
    """Whether only stream-K kernels run it."""

    def suits(self, config: KernelConfig) -> bool:
        """Return whether a kernel runs the case."""
        return not self.of_stream_k or config.scheduler is Scheduler.STREAM_K

    def __str__(self) -> str:
        weight = self.weight
        return f"{self.kind} n={weight.n} k={weight.k} group={weight.group_size}"


_PLAIN = ((1.0, False),)
_MIXED = ((1.0, False), (0.75, True), (-2.0, False), (1.0, True))


def cases(mode: QuantMode, rng: np.random.Generator) -> Iterator[Case]:
    """Yield every case that the kernels of a mode must pass."""

    def case(
        kind: str,
        n: int,
        k: int,
        group: int,
        tokens: Iterable[int],
        options: tuple[tuple[float, bool], ...] = _MIXED,
        *,
        octaves: float = 1,
        size: float = 0.01,
        of_stream_k: bool = False,
    ) -> Case:
        group = group if mode.is_grouped else k
        chosen = tuple(tokens)
        rows = max([*chosen, 257])
        weight = random_weight(rng, n, k, group, mode, octaves=octaves, size=size)
        return Case(kind, weight, rows, chosen, options, of_stream_k)

    for group in (32, 64, 128, 256) if mode.is_grouped else (256,):
        yield case("one_hot", 264, 256, group, (256,), _PLAIN)
    yield case("one_hot", 136, 200, 200, (200,), _PLAIN)
    for group in (32, 64, 96, 128, 192, 256, 384, 768) if mode.is_grouped else (768,):
        yield case("random", 520, 768, group, (1, 7, 17, 100, 0))
    yield case("smallest", 8, 8, 8, (1, 3))
    yield case("smallest", 8, 64, 64, (1, 65))
    yield case("smallest", 1032, 8, 8, (2, 33))
    yield case("ragged_k", 392, 1000, 1000, (5, 129))
    # Subnormal scales, and scales that the native layout divides; alpha keeps results within fp16's range.
    for size, alpha in ((1e-5, 1.0), (0.5, 1.0), (1000.0, 2.0**-8)):
        yield case("scales", 264, 512, 128, (3, 40), ((alpha, False),), octaves=3, size=size)
    yield case("large", 4096, 4096, 128, (1, 300))
    yield case("long_k", 256, 16384, 128, (16, 48))
    # More operands than L2 keeps, so that stream-K forms other units, and most tiles leave SMs idle without it.
    yield case("beyond_l2", 256, 5120, 128, (4990, 5000), of_stream_k=True)


_SAMPLE_KINDS = ("smallest", "ragged_k", "scales")


def sample(configs: Iterable[KernelConfig]) -> list[KernelConfig]:
    """Return one kernel per target, mode, CTA shape, schedule, scheduler and epilogue: that of the largest cluster.

    The schedule decides how many CTAs share an SM and which warps divide K, so each schedule needs its own sample.
    """
    chosen: dict[tuple[object, ...], KernelConfig] = {}
    for config in sorted(configs, key=lambda config: config.cluster):
        kind = config.target, config.mode, config.cta, config.schedule, config.scheduler, config.epilogue
        chosen[kind] = config
    return sorted(chosen.values())


def prove(
    library: Library,
    *,
    device: int = 0,
    seed: int = 0,
    sampled: bool = False,
    progress: Progress = no_progress,
) -> list[NumericProof]:
    """Run every built kernel through every case of its mode on a Hopper GPU.

    All cases are plain products, which gated kernels do not compute: these get an empty proof, see `epilogues`.

    Args:
        library: the loaded build.
        device: the GPU.
        seed: of the random data.
        sampled: run only the kernels of `sample`, on small problems, for slow tools such as compute-sanitizer.
        progress: called after every case of every mode.

    Returns:
        One proof per kernel that ran.
    """
    gpu = GuardedGpu(library, device)
    chosen = sample(library.configs()) if sampled else library.configs()
    proofs = {config: NumericProof(config.name) for config in chosen}
    plain = {config: proof for config, proof in proofs.items() if computes_products(config)}
    modes = sorted({config.mode for config in plain})
    todo = [
        (mode, case)
        for mode in modes
        for case in cases(mode, np.random.default_rng(seed))
        if not sampled or case.kind in _SAMPLE_KINDS
        if any(config.mode is mode and case.suits(config) for config in plain)
    ]
    for done, (mode, case) in enumerate(todo, 1):
        of_mode = [(config, proof) for config, proof in plain.items() if config.mode is mode and case.suits(config)]
        _prove_case(gpu, case, of_mode, np.random.default_rng((seed, done)))
        progress(done, len(todo), f"{mode} {case}")
    return list(proofs.values())


def computes_products(config: KernelConfig) -> bool:
    """Return whether a kernel computes plain products."""
    return config.epilogue is not Epilogue.GATED


def _prove_case(
    gpu: GuardedGpu, case: Case, proofs: list[tuple[KernelConfig, NumericProof]], rng: np.random.Generator
) -> None:
    """Run one case on every kernel that can run it."""
    weight = case.weight
    one_hot = case.kind == "one_hot"
    a = np.eye(weight.k) if one_hot else rng.standard_normal((case.rows, weight.k))
    a = a.astype(np.float16)
    bias = rng.standard_normal(weight.n).astype(np.float16)
    on_gpu = gpu.upload(a)
    packed: dict[Any, PackedWeight] = {}
    expected = Expectation(a, weight)
    for config, proof in proofs:
        if why_cannot_run(config, Problem(1, weight.n, weight.k, weight.group_size)) is not None:
            continue
        if config.target not in packed:
            packed[config.target] = library_weight(gpu, weight, config)
        for turn, tokens in enumerate(case.tokens):
            alpha, with_bias = case.options[turn % len(case.options)]
            launch = Launch(
                m=tokens or config.cta.tokens + 1,
                alpha=alpha,
                bias=bias if with_bias else None,
                in_graph=turn % 2 == 1,
                dependent=turn % 3 == 1,
            )
            got = launched(gpu, proof, config, on_gpu, packed[config.target], launch, case)
            if got is not None and one_hot:
                proof.record(case.kind, f"{case} {launch}", compare_exact(got, weight))
            elif got is not None:
                judge(proof, case.kind, f"{case} {launch}", got, expected, launch)


def launched(
    gpu: GuardedGpu,
    proof: NumericProof,
    config: KernelConfig,
    a: DeviceArray,
    weight: PackedWeight,
    launch: Launch,
    what: object,
) -> Half | None:
    """Run a kernel; return its result, or None after recording the failure."""
    try:
        return gpu.run(config, a, weight, launch)
    except (W4A16Error, RuntimeError) as error:
        proof.failures.append(f"{what} {launch}: {error}")
        return None


def judge(proof: NumericProof, kind: str, label: str, got: Half, expected: Expectation, launch: Launch) -> None:
    """Compare a result with float64 and record the outcome."""
    judge_error(proof, kind, label, error_over_bound(got, expected, launch.alpha, launch.bias, launch.extra))


def judge_error(proof: NumericProof, kind: str, label: str, ratio: float, results: Sequence[Half] = ()) -> None:
    """Record the largest error over its bound, and whether all results of equal launches have the same bits."""
    proof.worst_error_over_bound = max(proof.worst_error_over_bound, ratio)
    fault = f"error is {ratio:.3g} times the bound" if ratio > 1 else None
    bits = [result.view(np.uint16) for result in results]
    if fault is None and any(not np.array_equal(again, bits[0]) for again in bits[1:]):
        fault = "the bits differ when it runs again"
    proof.record(kind, label, fault)


def library_weight(
    gpu: GuardedGpu, weight: QuantizedWeight, config: KernelConfig, *, gated: bool = False
) -> PackedWeight:
    """Pack a weight for a kernel's target, and perhaps for gated activations, and move it to the GPU."""
    moved: PackedWeight = gpu.library.to_device(pack_weight(weight, target=config.target, gated=gated), gpu.device)
    return moved


def compare_exact(got: Half, weight: QuantizedWeight) -> str | None:
    """Return where one-hot activations did not return the dequantised weight bit for bit; None if they did.

    Positive and negative zero are equal.
    """
    wanted = dequantized_half(weight).T
    wrong = ~(got == wanted)
    if not wrong.any():
        return None
    row, channel = (int(index[0]) for index in np.nonzero(wrong))
    return (
        f"{int(wrong.sum())} of {wrong.size} weights are not exact, first at k={row} n={channel}: "
        f"{got[row, channel]} instead of {wanted[row, channel]}"
    )
