"""The times that come with the package: they choose kernels for layers that nobody tuned, and correct estimates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from w4a16gen.choose.cards import H100, Card, card_of
from w4a16gen.choose.cost_model import CostModel, default_cost_model, in_preference
from w4a16gen.choose.timing_table import Measured, TuningTable
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem

DATA_FOLDER = Path(__file__).resolve().parent / "data"
TIMES_PATH = DATA_FOLDER / "h100_times.json"
"""The file that `tools/merge_times.py` writes: times of the kernels of space `default` on an H100."""
NEIGHBOURS_PATH = DATA_FOLDER / "h100_neighbours.json"
TIMES_SCHEMA = "w4a16gen.packaged_times/1"
NEIGHBOURS_SCHEMA = "w4a16gen.neighbours/1"
MEASURED_MODE = QuantMode.FINEGRAINED_SCALE_ONLY
MEASURED_GROUP_SIZE = 128


def read_times(path: Path) -> TuningTable:
    """Read packaged times; their content hashes are empty.

    Raises:
        InvalidValueError: if the file holds anything else.
        OSError: if it cannot be read.
    """
    try:
        value = json.loads(path.read_text())
        if value["schema"] != TIMES_SCHEMA:
            raise InvalidValueError(f"schema {value['schema']!r} must be {TIMES_SCHEMA!r}")
        kernels = [KernelConfig.parse(name) for name in value["kernels"]]
        times = {
            (MEASURED_MODE, Problem(m, n, k, MEASURED_GROUP_SIZE)): {
                kernel: Measured(float(microseconds), "")
                for kernel, microseconds in zip(kernels, row, strict=True)
                if microseconds is not None
            }
            for n, k, m, row in value["times"]
        }
        return TuningTable(str(value["gpu"]), int(value["sm_count"]), times)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidValueError(
            f"{path} is not a table of packaged times ({error}): install the package again"
        ) from None


def times_as_text(table: TuningTable, source: str) -> str:
    """Return the file of packaged times for a table: JSON with one problem per line, in a fixed order.

    Args:
        table: times of `MEASURED_MODE` and `MEASURED_GROUP_SIZE`; others are left out.
        source: where the times come from, in a sentence.
    """
    of_mode = {
        problem: times
        for (mode, problem), times in table.times.items()
        if (mode, problem.group_size) == (MEASURED_MODE, MEASURED_GROUP_SIZE)
    }
    kernels = sorted({kernel for times in of_mode.values() for kernel in times})
    head = {"schema": TIMES_SCHEMA, "gpu": table.gpu, "sm_count": table.sm_count, "source": source}
    lines = []
    for problem in sorted(of_mode, key=lambda problem: (problem.n, problem.k, problem.m)):
        times = of_mode[problem]
        row = [times[kernel].microseconds if kernel in times else None for kernel in kernels]
        lines.append(json.dumps([problem.n, problem.k, problem.m, row]))
    names = ",\n".join(json.dumps(kernel.name) for kernel in kernels)
    return f'{json.dumps(head)[:-1]}, "kernels": [\n{names}\n], "times": [\n' + ",\n".join(lines) + "\n]}\n"


@cache
def table() -> TuningTable:
    """Return the packaged times."""
    return read_times(TIMES_PATH)


def is_for(device: Device | None) -> bool:
    """Return whether the times are good for a GPU: see `Card.shares_times_with`. None counts as an H100."""
    return card_of(device).shares_times_with(H100)


def fastest(
    configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, device: Device | None
) -> tuple[KernelConfig, float] | None:
    """Return the kernel that was fastest in this problem, and its time.

    The times are of mode fgs and group size 128. Other modes and groups take up to 4 % more or less in geometric mean
    (docs/performance.md). We assume, but have not measured, that the ranking is the same. Kernels are known by name
    only, so the table stays valid as long as machine code does not get slower.

    Args:
        configs: the kernels to choose among.
        mode: the quantisation mode.
        problem: the problem.
        device: the GPU; None on a machine without one.

    Returns:
        The kernel and its microseconds; None if the table has no such problem, or is not for this GPU.
    """
    if not is_for(device):
        return None
    as_measured = {
        replace(config, mode=MEASURED_MODE): config
        for config in configs
        if config.target is Target.NATIVE and config.mode is mode
    }
    asked = replace(problem, group_size=MEASURED_GROUP_SIZE)
    found = table().fastest(MEASURED_MODE, asked, dict.fromkeys(as_measured, ""))
    return None if found is None else (as_measured[found[0]], found[1])


@dataclass(frozen=True)
class Reach:
    """The distance up to which a problem's times correct the estimates of other problems."""

    layer_octaves: float
    """Standard deviation of a normal distribution, in octaves of n and of k."""
    token_octaves: float
    """The same in octaves of m."""
    prior_weight: float
    """Weight of the plain estimate. A neighbour weighs 1 at most."""
    least_weight: float
    """Neighbours below this weight do not count."""

    @classmethod
    def read(cls, path: Path) -> Reach:
        """Read the constants.

        Raises:
            InvalidValueError: if the file holds anything else.
            OSError: if it cannot be read.
        """
        try:
            value = json.loads(path.read_text())
            if value["schema"] != NEIGHBOURS_SCHEMA:
                raise InvalidValueError(f"schema {value['schema']!r} must be {NEIGHBOURS_SCHEMA!r}")
            reach = cls(**{name: float(number) for name, number in value["constants"].items()})
            if not all(0 < number < math.inf for number in vars(reach).values()):
                raise InvalidValueError("a constant is not positive")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidValueError(f"{path} does not hold the reach of times ({error}): install again") from None
        return reach

    def weight(self, problem: Problem, other: Problem) -> float:
        """Return what a time of another problem counts here: 1 for the same problem, 0 far away."""
        tokens = math.log2(problem.m / other.m) / self.token_octaves
        channels = math.log2(problem.n / other.n) / self.layer_octaves
        k = math.log2(problem.k / other.k) / self.layer_octaves
        weight = math.exp(-0.5 * (tokens * tokens + channels * channels + k * k))
        return weight if weight >= self.least_weight else 0.0


class Neighbours:
    """Estimates that are corrected by how far they are off for the same kernel in similar problems."""

    def __init__(self, measured: TuningTable, model: CostModel | None = None, reach: Reach | None = None) -> None:
        """Correct estimates by a table.

        Args:
            measured: times, of which those of `MEASURED_MODE` count.
            model: the estimates to correct; None takes the packaged ones.
            reach: how far times reach; None takes the packaged constants.
        """
        of_mode = {problem: times for (mode, problem), times in measured.times.items() if mode is MEASURED_MODE}
        self._times = dict(sorted(of_mode.items(), key=lambda item: (item[0].n, item[0].k, item[0].m)))
        self._model = model or default_cost_model()
        self._reach = reach or default_reach()
        self._residuals: dict[Problem, Mapping[KernelConfig, float]] = {}

    def estimate(
        self, configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, card: Card = H100
    ) -> list[tuple[KernelConfig, float]]:
        """Return the native kernels that can run a problem with their estimated microseconds; see `in_preference`.

        The model's estimate is multiplied by the weighted geometric mean of measured over estimated time. Cards with
        another number of SMs get the plain estimate: their waves break elsewhere.
        """
        estimated = self._model.estimate(configs, mode, problem, card)
        if problem.m == 0 or card.sm_count != H100.sm_count:
            return estimated
        near = [(self._reach.weight(problem, other), other) for other in self._times]
        near = [(weight, other) for weight, other in near if weight > 0]

        def correction(config: KernelConfig) -> float:
            as_measured = replace(config, mode=MEASURED_MODE)
            total, weights = 0.0, self._reach.prior_weight
            for weight, other in near:
                residual = self._residuals_of(other).get(as_measured)
                if residual is not None:
                    total += weight * residual
                    weights += weight
            return math.exp(total / weights)

        corrected = [(config, microseconds * correction(config)) for config, microseconds in estimated]
        return in_preference(corrected, problem)

    def _residuals_of(self, problem: Problem) -> Mapping[KernelConfig, float]:
        """Return the logarithm of measured over estimated time for each kernel that was measured."""
        if problem not in self._residuals:
            times = self._times[problem]
            self._residuals[problem] = {
                config: math.log(times[config].microseconds / microseconds)
                for config, microseconds in self._model.estimate(times, MEASURED_MODE, problem)
            }
        return self._residuals[problem]


@cache
def default_reach() -> Reach:
    """Return the reach with the constants that come with the package."""
    return Reach.read(NEIGHBOURS_PATH)


@cache
def neighbours() -> Neighbours:
    """Return the estimates that come with the package, corrected by the packaged times."""
    return Neighbours(table())
