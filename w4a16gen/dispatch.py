"""Which of several kernels to use when the caller names none."""

from __future__ import annotations

from collections.abc import Iterable

from w4a16gen.config import KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.problem import Problem, why_cannot_run

SM_COUNT = 132
"""Multiprocessors of H100, H800 and H200 with SXM sockets; the PCIe H100 has 114, which changes few choices."""
CLUSTERS_OF_4 = 30
"""Clusters of four CTAs that fit on the GPU at once (one CTA to an SM)."""
LAUNCH_CYCLES = 4000
"""From launch to the first product, and from the last product to the last store."""
CLUSTER_CYCLES = 800
"""Summing over a cluster."""


def runnable(configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem) -> list[KernelConfig]:
    """Give the kernels of a mode that can run a problem, sorted."""
    return sorted(config for config in configs if config.mode is mode and why_cannot_run(config, problem) is None)


def choose(configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem) -> KernelConfig:
    """Pick a kernel by an estimate, not by measurement; deterministic. Native kernels come before CUTLASS's.

    Raises:
        UnsupportedProblemError: if none can run the problem; the text says why the closest one cannot.
    """
    configs = list(configs)
    found = runnable(configs, mode, problem)
    native = [config for config in found if config.target is Target.NATIVE]
    if native:
        return min(native, key=lambda config: (native_cycles(config, problem), config))
    if found:
        return _choose_cutlass(found, problem)
    of_mode = sorted(config for config in configs if config.mode is mode)
    if not of_mode:
        raise UnsupportedProblemError(
            f"no kernel of mode {mode} that reads this weight's layout is built: `w4a16gen list --built` shows what is"
        )
    raise UnsupportedProblemError(f"no built kernel can run {problem}: {why_cannot_run(of_mode[-1], problem)}")


def native_cycles(config: KernelConfig, problem: Problem) -> float:
    """Estimate the SM cycles of a native kernel: waves of CTAs times their packed blocks of 64 channels x 128 k.

    Constants are a fit by eye to an H200 at five shapes and 1 to 4096 tokens (NVIDIA H200, 2026-11).
    """
    cta, splits = config.cta, config.cluster.k
    tiles = -(-problem.n // cta.channels) * -(-problem.m // cta.tokens)
    at_once = CLUSTERS_OF_4 if splits == 4 else SM_COUNT // splits  # noqa: PLR2004
    waves = max(1, -(-tiles // at_once))
    k_blocks = -(-problem.k // 128)
    blocks = cta.channels // 64 * -(-k_blocks // splits)
    cycles = blocks * _block_cycles(config)
    if config.schedule is Schedule.SPLIT_K:
        return waves * (cycles + LAUNCH_CYCLES) + (CLUSTER_CYCLES if splits > 1 else 0)
    return waves * cycles + LAUNCH_CYCLES + (waves - 1) * cta.tokens * 10


def _block_cycles(config: KernelConfig) -> float:
    """Estimate the cycles of one packed block: the slower of dequantising it and multiplying it.

    A WGMMA of 64 x tokens x 16 takes tokens / 2 cycles, a block has eight. Dequantising slows as it shares issue slots
    with more instructions; wide tiles are fetched best.
    """
    dequantize = {64: 330, 128: 270, 256: 240}[config.cta.channels]
    return max(dequantize + 2.5 * config.cta.tokens, 4.6 * config.cta.tokens)


def _choose_cutlass(found: list[KernelConfig], problem: Problem) -> KernelConfig:
    """Pick one of CUTLASS's kernels by a rule of thumb.

    The token tile is the smallest that covers m, or the largest there is: padding tokens cost tensor-core time, and
    more token tiles read the weights again. Then stream-K, which keeps all SMs busy when tiles are few, then the larger
    cluster once there are several token tiles to share activations, then the listing order.
    """
    largest = max(config.cta.tokens for config in found)

    def preference(config: KernelConfig) -> tuple[object, ...]:
        tokens = config.cta.tokens if config.cta.tokens >= problem.m else 2 * largest - config.cta.tokens
        cluster = config.cluster.channels * config.cluster.tokens
        wide = problem.m > config.cta.tokens
        return (tokens, config.scheduler is not Scheduler.STREAM_K, -cluster if wide else cluster, config)

    return min(found, key=preference)
