"""Which of several kernels to use when the caller names none."""

from __future__ import annotations

from collections.abc import Iterable

from w4a16gen.config import KernelConfig, QuantMode, Scheduler
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.problem import Problem, why_cannot_run


def runnable(configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem) -> list[KernelConfig]:
    """Give the kernels of a mode that can run a problem, sorted."""
    return sorted(config for config in configs if config.mode is mode and why_cannot_run(config, problem) is None)


def choose(configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem) -> KernelConfig:
    """Pick a kernel by a rule of thumb, not by measurement; deterministic.

    The token tile is the smallest that covers m, or the largest there is: padding tokens cost tensor-core time, and
    more token tiles read the weights again. Then stream-K, which keeps all SMs busy when tiles are few, then the larger
    cluster once there are several token tiles to share activations, then the listing order.

    Raises:
        UnsupportedProblemError: if none can run the problem; the text says why the closest one cannot.
    """
    configs = list(configs)
    found = runnable(configs, mode, problem)
    if found:
        largest = max(config.cta.tokens for config in found)

        def preference(config: KernelConfig) -> tuple[object, ...]:
            tokens = config.cta.tokens if config.cta.tokens >= problem.m else 2 * largest - config.cta.tokens
            cluster = config.cluster.channels * config.cluster.tokens
            wide = problem.m > config.cta.tokens
            return (tokens, config.scheduler is not Scheduler.STREAM_K, -cluster if wide else cluster, config)

        return min(found, key=preference)
    of_mode = [config for config in configs if config.mode is mode]
    if not of_mode:
        raise UnsupportedProblemError(f"no kernel of mode {mode} is built: build one, for example with --mode {mode}")
    raise UnsupportedProblemError(f"no built kernel can run {problem}: {why_cannot_run(of_mode[0], problem)}")
