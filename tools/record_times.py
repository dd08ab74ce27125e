"""Time the kernels of a build on random layers and token counts, and append the times to a CSV file.

    python tools/record_times.py --build-dir build --output times.csv --seed 1 --layers 12 --tokens 8 --minutes 5

An interrupted run continues where it stopped: times that the file holds are not measured again. The same seed draws the
same problems, so that several GPUs can be compared. `tools/fit_cost_model.py --times times.csv` fits to the file. With
`--quick` thousands of times a minute are recorded; see `quick_measure.py`. Needs an NVIDIA Hopper GPU.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from quick_measure import QuickMeasure
from recorded import COLUMNS, Recorded, read

from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.kernels.spaces import SPACES, enumerate_space
from w4a16gen.measure.compare import measure as exact_measure
from w4a16gen.measure.compare import tiles_suit
from w4a16gen.runtime.default import load
from w4a16gen.runtime.library import Library

MEASURED_MODE = QuantMode.FINEGRAINED_SCALE_ONLY
MEASURED_GROUP_SIZE = 128
SMALLEST, LARGEST = 1024, 32768
"""Range of n and k."""
CHANNEL_MULTIPLE = 64
MAX_TOKENS = 8192
MAX_WEIGHT = 1 << 27
"""Largest n x k: larger weights take longer to draw and pack on the host than to measure."""


class Measure(Protocol):
    """Times kernels on one problem: `w4a16gen.measure.compare.measure`, or a stand-in. A kernel's last time counts."""

    def __call__(
        self, library: Library, problem: Problem, mode: QuantMode, configs: Sequence[KernelConfig], *, device: int
    ) -> Iterable[tuple[KernelConfig, float]]:
        """Yield each kernel with its microseconds."""


def draw_problems(layers: int, tokens: int, seed: int) -> list[Problem]:
    """Return random problems: n, k and m log-uniform, each layer with several token counts.

    Args:
        layers: how many layers to draw.
        tokens: how many token counts to draw for each.
        seed: the same seed returns the same problems.
    """
    rng = random.Random(seed)  # noqa: S311  (nothing secret)

    def log_uniform(low: int, high: int, multiple: int) -> int:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        return max(low, round(value / multiple) * multiple)

    problems = []
    for _ in range(layers):
        n = k = LARGEST
        while n * k > MAX_WEIGHT:
            n = log_uniform(SMALLEST, LARGEST, CHANNEL_MULTIPLE)
            k = log_uniform(SMALLEST, LARGEST, MEASURED_GROUP_SIZE)
        counts = sorted({log_uniform(1, MAX_TOKENS, 1) for _ in range(tokens)})
        problems += [Problem(m, n, k, MEASURED_GROUP_SIZE) for m in counts]
    return problems


@dataclass(frozen=True)
class Recording:
    """One run of the tool."""

    library: Library
    device: Device
    output: Path
    source: str
    measure: Measure
    clock: Callable[[], float]
    kernels_per_problem: int | None
    """Kernels drawn at random for each problem; None takes all."""
    seed: int

    def run(self, kernels: Sequence[KernelConfig], problems: Sequence[Problem], seconds: float) -> int:
        """Measure what the file does not hold yet, until all is there or the time is over.

        Returns:
            How many times were measured.
        """
        known = self._known()
        stop = self.clock() + seconds
        count = 0
        for problem in problems:
            if self.clock() >= stop:
                break
            missing = [kernel for kernel in self._drawn(kernels, problem) if (kernel, problem) not in known]
            if missing:
                count += self._record(problem, missing, stop)
        return count

    def _record(self, problem: Problem, kernels: Sequence[KernelConfig], stop: float) -> int:
        """Measure kernels and keep the last time of each, also those before an interruption; return how many."""
        last: dict[KernelConfig, float] = {}
        try:
            for kernel, microseconds in self.measure(
                self.library, problem, MEASURED_MODE, kernels, device=self.device.index
            ):
                last[kernel] = microseconds
                if self.clock() >= stop:
                    break
        finally:
            for kernel, microseconds in last.items():
                self._append(kernel, problem, microseconds)
        return len(last)

    def _drawn(self, kernels: Sequence[KernelConfig], problem: Problem) -> list[KernelConfig]:
        """Return the kernels to time: those whose tiles suit the problem, or a random part of them."""
        suited = [kernel for kernel in runnable(kernels, MEASURED_MODE, problem) if tiles_suit(kernel, problem)]
        if self.kernels_per_problem is None or self.kernels_per_problem >= len(suited):
            return suited
        return random.Random(f"{self.seed} {problem}").sample(suited, self.kernels_per_problem)  # noqa: S311

    def _known(self) -> set[tuple[KernelConfig | None, Problem]]:
        """Return what the file holds for this GPU; a line that was cut off is removed."""
        if not self.output.exists():
            return set()
        text = self.output.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            self.output.write_bytes(whole)
        same = (self.device.name, self.device.sm_count)
        return {(row.kernel, row.problem) for row in read([self.output]) if (row.gpu, row.sm_count) == same}

    def _append(self, kernel: KernelConfig, problem: Problem, microseconds: float) -> None:
        today = datetime.now(tz=timezone.utc).strftime("%Y-%m-%d")
        row = Recorded(
            kernel,
            problem,
            MEASURED_MODE,
            round(microseconds, 3),
            self.device.name,
            self.device.sm_count,
            today,
            self.source,
        )
        self.output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.output.exists() or self.output.stat().st_size == 0
        with self.output.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerow(row.as_row())


def main(
    arguments: Sequence[str] | None = None,
    *,
    open_build: Callable[[Path | None], Library] = load,
    measure: Measure = exact_measure,
) -> None:
    """Measure the built kernels of the spaces."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build-dir", type=Path, help="the build; by default the one that `w4a16gen run` takes")
    parser.add_argument("--output", type=Path, required=True, help="the CSV file")
    parser.add_argument("--space", choices=SPACES, action="append", help="kernels to time (repeatable); default: all")
    parser.add_argument("--kernels", type=int, help="kernels drawn for each problem; default: all that suit it")
    parser.add_argument("--layers", type=int, default=12, help="random layers")
    parser.add_argument("--tokens", type=int, default=8, help="random token counts for each layer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    parser.add_argument("--minutes", type=float, default=5.0, help="when to stop")
    parser.add_argument("--quick", action="store_true", help="short graphs over random bytes; needs torch")
    options = parser.parse_args(arguments)
    library = open_build(options.build_dir)
    device = library.hopper_device()
    wanted = {config for space in options.space or ["all"] for config in enumerate_space(space)}
    kernels = [config for config in library.configs() if config in wanted]
    source = f"record_times seed {options.seed}"
    if options.quick:
        measure, source = QuickMeasure(device.index), f"{source} quick"
    recording = Recording(
        library, device, options.output, source, measure, time.monotonic, options.kernels, options.seed
    )
    problems = draw_problems(options.layers, options.tokens, options.seed)
    count = recording.run(kernels, problems, options.minutes * 60)
    print(
        f"{options.output}: {count} times measured on {device.name}, {len(kernels)} kernels, {len(problems)} problems"
    )


if __name__ == "__main__":
    main()
