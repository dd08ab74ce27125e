"""The one way to choose a kernel: `gemm` and every command ask `Chooser.choose`; C++ follows it in sdk/chooser.h."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from w4a16gen.choose.cards import card_of
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.overrides import kernels_in_use
from w4a16gen.choose.timing_table import TuningTable, table_for
from w4a16gen.errors import NotBuiltError, UnsupportedProblemError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Scheduler, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.epilogue import why_not_built, why_not_gated
from w4a16gen.kernels.problem import Problem, runnable, why_cannot_run


class ChoiceSource(Enum):
    """The source of a choice, in order of precedence. The value is its name in JSON."""

    OVERRIDE = "override"
    TUNING_TABLE = "tuning_table"
    ESTIMATE = "estimate"
    RULE_OF_THUMB = "rule_of_thumb"

    @property
    def sentence(self) -> str:
        """The source in words."""
        return _SENTENCES[self]


_SENTENCES = {
    ChoiceSource.OVERRIDE: "use_kernels or W4A16GEN_KERNELS",
    ChoiceSource.TUNING_TABLE: "the build's tuning table",
    ChoiceSource.ESTIMATE: "an estimate",
    ChoiceSource.RULE_OF_THUMB: "a rule of thumb for CUTLASS kernels",
}


@dataclass(frozen=True)
class Choice:
    """A kernel, the time it is expected to take, and the source of both."""

    kernel: KernelConfig
    microseconds: float | None
    """None for an override or a rule of thumb, which know no times."""
    source: ChoiceSource
    dependent: bool = False
    """Whether the time is that of a dependent launch."""


class Chooser:
    """Chooses among the kernels of one build."""

    def __init__(self, content_hashes: Mapping[KernelConfig, str], table: Path) -> None:
        """Choose among built kernels.

        Args:
            content_hashes: the built kernels, each with the hash of all that decided its machine code.
            table: path of the build's tuning table; it need not exist.
        """
        self._hashes = {config: digest for config, digest in content_hashes.items() if not config.is_grouped}
        self._holds_grouped_only = bool(content_hashes) and not self._hashes
        self._epilogues = {(config.mode, config.epilogue) for config in self._hashes}
        self._path = table
        self._tables: dict[Device | None, TuningTable | None] = {}

    def choose(
        self,
        problem: Problem,
        mode: QuantMode,
        *,
        device: Device | None,
        target: Target | None = None,
        overrides: Sequence[KernelConfig] | None = None,
        epilogue: Epilogue = Epilogue.NONE,
    ) -> Choice:
        """Return the kernel of a call without `config=`: always the same for the same arguments and files.

        The first of these with an answer decides: overrides, the build's tuning table, the estimate, and for CUTLASS
        kernels a rule of thumb.

        Args:
            problem: the problem.
            mode: the weight's quantisation mode.
            device: the GPU; None, on a machine without one, accepts every tuning table and estimates for an H100.
            target: the kernel family that reads the weight's layout; None allows all.
            overrides: kernels that take precedence; None takes those of `use_kernels` or W4A16GEN_KERNELS.
            epilogue: that of the kernels to choose among. They are estimated as the plain ones.

        Raises:
            NotBuiltError: if an override applies and is not in the build, or the build has no kernel with the epilogue.
            UnsupportedProblemError: if neither the override nor any built kernel can run the problem.

        Example:
            >>> library.chooser.choose(Problem(16, 4096, 4096, 128), QuantMode.FINEGRAINED_SCALE_ONLY, device=None)
        """
        for kernel in kernels_in_use() if overrides is None else overrides:
            if kernel.mode is mode and kernel.epilogue is epilogue and target in (None, kernel.target):
                return self._override(kernel, problem)
        self.check_built(mode, epilogue)
        reason = why_not_gated(problem.n) if epilogue is Epilogue.GATED else None
        if reason is not None:
            raise UnsupportedProblemError(reason)
        able = runnable(self._of_target(target), mode, problem, epilogue)
        if not able:
            raise UnsupportedProblemError(self._why_none(target, mode, problem, epilogue))
        if tuned := self._tuned(able, mode, problem, device):
            return tuned
        if estimated := default_cost_model().estimate(able, mode, problem, card_of(device), epilogue):
            return Choice(*estimated[0], ChoiceSource.ESTIMATE)
        return Choice(_choose_cutlass(able, problem), None, ChoiceSource.RULE_OF_THUMB)

    def has(self, mode: QuantMode, epilogue: Epilogue) -> bool:
        """Return whether the build has a kernel of a mode with an epilogue."""
        return (mode, epilogue) in self._epilogues

    def check_built(self, mode: QuantMode, epilogue: Epilogue) -> None:
        """Raise if the build has no kernel of a mode with an epilogue. A mode without any kernel is not judged here.

        Raises:
            NotBuiltError: naming the command that builds such kernels; also if all kernels are grouped ones.
        """
        if self._holds_grouped_only:
            raise NotBuiltError(
                "the build holds grouped kernels only, which gemm does not call: run `w4a16gen build --space default "
                "--space experts`"
            )
        has_mode = any(self.has(mode, other) for other in Epilogue)
        if not self.has(mode, epilogue) and (epilogue is not Epilogue.NONE or has_mode):
            raise NotBuiltError(why_not_built(mode, epilogue))

    def estimates(
        self,
        problem: Problem,
        mode: QuantMode,
        device: Device | None = None,
        epilogue: Epilogue = Epilogue.NONE,
    ) -> list[tuple[KernelConfig, float]]:
        """Return the native kernels that can run a problem with their estimated microseconds, the best first.

        Args:
            problem: the problem.
            mode: the quantisation mode.
            device: the GPU to estimate for; None stands for an H100.
            epilogue: that of the kernels.
        """
        return default_cost_model().estimate(self._hashes, mode, problem, card_of(device), epilogue)

    def _of_target(self, target: Target | None) -> Iterable[KernelConfig]:
        return [config for config in self._hashes if target in (None, config.target)]

    def _override(self, kernel: KernelConfig, problem: Problem) -> Choice:
        if kernel not in self._hashes:
            raise NotBuiltError(
                f"{kernel.name}, which {ChoiceSource.OVERRIDE.sentence} names, is not in the build: "
                "`w4a16gen list --built` shows what is"
            )
        reason = why_cannot_run(kernel, problem)
        if reason is not None:
            raise UnsupportedProblemError(f"{kernel.name} cannot run {problem}: {reason}")
        return Choice(kernel, None, ChoiceSource.OVERRIDE)

    def _tuned(
        self, able: Sequence[KernelConfig], mode: QuantMode, problem: Problem, device: Device | None
    ) -> Choice | None:
        """Return the fastest kernel of the build's tuning table, or None without any.

        A damaged table, or one of another GPU model, is ignored with a single warning.
        """
        if device not in self._tables:
            self._tables[device] = table_for(self._path, device)
        table = self._tables[device]
        if table is None:
            return None
        hashes = {config: self._hashes[config] for config in able}
        found = table.fastest(mode, problem, hashes)
        if found is None and not any(config.target is Target.NATIVE for config in able):
            found = table.fastest_at_more_tokens(mode, problem, hashes)  # nothing estimates CUTLASS kernels
        return None if found is None else Choice(*found, ChoiceSource.TUNING_TABLE, table.dependent)

    def _why_none(self, target: Target | None, mode: QuantMode, problem: Problem, epilogue: Epilogue) -> str:
        of_target = self._of_target(target)
        of_mode = sorted(config for config in of_target if config.mode is mode and config.epilogue is epilogue)
        if not of_mode:
            return (
                f"the build holds no kernel of mode {mode} that reads this weight's layout: `w4a16gen list --built` "
                "shows its kernels"
            )
        return f"no built kernel can run {problem}: {why_cannot_run(of_mode[-1], problem)}"


def _choose_cutlass(found: Sequence[KernelConfig], problem: Problem) -> KernelConfig:
    """Return one of CUTLASS's kernels by a rule of thumb.

    The token tile is the smallest that covers m, or the largest in the build: padded tokens cost tensor-core time, and
    more token tiles read the weights more often. Then comes stream-K, which keeps all SMs busy when tiles are few. Then
    comes the larger cluster if several token tiles can share activations, then the listing order.
    """
    largest = max(config.cta.tokens for config in found)

    def preference(config: KernelConfig) -> tuple[object, ...]:
        tokens = config.cta.tokens if config.cta.tokens >= problem.m else 2 * largest - config.cta.tokens
        cluster = config.cluster.channels * config.cluster.tokens
        wide = problem.m > config.cta.tokens
        return (tokens, config.scheduler is not Scheduler.STREAM_K, -cluster if wide else cluster, config)

    return min(found, key=preference)
