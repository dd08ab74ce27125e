"""Layers of experts, timed in turns with other ways to compute them, and the parts of this package's layers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.errors import MissingToolError
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.compare import attempt
from w4a16gen.measure.models import Mixture
from w4a16gen.measure.moe_entrants import (
    OWN,
    ROUTING_BYTES,
    Drawn,
    Entrant,
    Launch,
    OwnLayers,
    Work,
    check_built,
    entrants_of,
)
from w4a16gen.measure.moe_humming import humming_entrant, is_installed
from w4a16gen.measure.probes import cold_read_microseconds
from w4a16gen.measure.results import Timing
from w4a16gen.measure.rivals import find_torch
from w4a16gen.measure.step import Machine, gpu_machine
from w4a16gen.measure.timing import BRIEF_LAUNCHES, LAUNCHES, Contender
from w4a16gen.measure.turns import SECONDS_OF_BLOCK, take_turns
from w4a16gen.progress import Progress
from w4a16gen.runtime.library import Library

READ_MULTIPLE = 16
"""The kernel that only reads takes bytes in multiples of this."""


@dataclass(frozen=True)
class MoeTiming:
    """The time of one entrant."""

    name: str
    microseconds: Timing
    """Of a layer."""
    error: float
    """Of its result, relative to the exact one, as Euclidean norms."""

    @property
    def median(self) -> float:
        """Microseconds of a layer."""
        return self.microseconds.median


@dataclass(frozen=True)
class MoePoint:
    """The results of a layer with one number of tokens."""

    tokens: int
    """Of each GPU."""
    rows: float
    """Tokens that the experts here compute, each once per expert; on average."""
    experts_hit: float
    """Experts here that have a token, on average."""
    weight_bytes: int
    """Bytes of their packed weights."""
    flops: float
    """Multiplications and additions of both products."""
    kernels: tuple[KernelConfig, KernelConfig]
    """Of gate_up and of down."""
    timings: Sequence[MoeTiming]
    """The fastest first."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Microseconds of each part of this package's layer, by itself."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why entrants were not timed."""
    floor: float | None = None
    """Microseconds that reading the packed weights takes."""

    def timing(self, name: str) -> MoeTiming | None:
        """Return the timing of an entrant, or None."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def share_of_floor(self, timing: MoeTiming) -> float | None:
        """Return the floor over an entrant's time, or None."""
        return None if self.floor is None else self.floor / timing.median

    def tflops(self, timing: MoeTiming) -> float:
        """Return an entrant's TFLOP/s."""
        return self.flops / timing.median / 1e6

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return {
            "tokens": self.tokens,
            "rows": self.rows,
            "experts_hit": self.experts_hit,
            "weight_bytes": self.weight_bytes,
            "floor_us": self.floor,
            "kernels": {"gate_up": self.kernels[0].name, "down": self.kernels[1].name},
            "timings": [
                {
                    "name": timing.name,
                    "microseconds": list(timing.microseconds.isolated),
                    "median_us": timing.median,
                    "least_us": min(timing.microseconds.isolated),
                    "most_us": max(timing.microseconds.isolated),
                    "share_of_floor": self.share_of_floor(timing),
                    "tflops": self.tflops(timing),
                    "error": timing.error,
                }
                for timing in self.timings
            ],
            "parts_us": dict(self.parts),
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class MoeBench:
    """The results of one model's layer."""

    name: str
    mixture: Mixture
    gpu: Device
    mode: QuantMode
    points: Sequence[MoePoint]

    @property
    def wrong(self) -> Mapping[int, str]:
        """Why this package's layers were left out, by number of tokens: a wrong result or a failure."""
        return {point.tokens: point.left_out[OWN] for point in self.points if OWN in point.left_out}

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return {
            "model": {"name": self.name} | asdict(self.mixture),
            "gpu": self.gpu.as_json(),
            "mode": self.mode.value,
            "points": [point.as_json() for point in self.points],
        }


def run_moe_bench(
    library: Library,
    model: tuple[str, Mixture],
    tokens: Sequence[int],
    mode: QuantMode,
    rounds: int,
    *,
    tell: Callable[[str], None],
    show_progress: Callable[..., AbstractContextManager[Progress]],
    machine: Machine | None = None,
    humming: bool | None = False,
) -> MoeBench:
    """Time a layer of experts with each entrant, in turns, in one process.

    Weights and routings are drawn. A graph holds several layers, each with another routing, and with weights that
    are not in L2.

    Args:
        library: the loaded build.
        model: the name and the sizes of the layer.
        tokens: numbers of tokens of each GPU.
        mode: the quantisation mode.
        rounds: timed replays of each entrant.
        tell: called with a sentence about each number of tokens that was timed, and each entrant that is left out.
        show_progress: shows a bar with a title.
        machine: where to run; None takes the first Hopper GPU.
        humming: whether humming's kernels take part; None where they are installed.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
        NotBuiltError: if the build has no grouped kernels of the mode.
        MissingToolError: if torch is not installed.
    """
    name, mixture = model
    gpu = library.hopper_device()
    check_built(library, mode)
    if machine is None:
        torch = find_torch()
        if torch is None:
            raise MissingToolError("bench --moe runs layers in torch's graphs: pip install torch")
        machine = gpu_machine(torch, gpu.index)
    drawn = Drawn(machine.torch, mixture, mode, machine.device)
    points = []
    with show_progress(f"Timing {name}", len(tokens)) as progress, machine.torch.inference_mode():
        own = OwnLayers(library, drawn)
        takes_part = is_installed() if humming is None else humming
        entrants = entrants_of(own, drawn)
        if takes_part:
            everyones = [count * mixture.gpus for count in tokens]
            entrants.append(humming_entrant(drawn, machine.compiled, everyones))
        stage = _Stage(library, machine, drawn, own, entrants)
        for done, count in enumerate(tokens, 1):
            point = stage.measure(count, rounds)
            points.append(point)
            for entrant, reason in point.left_out.items():
                tell(f"{name}, {count} tokens: {entrant} is left out: {reason}")
            if point.timings:
                times = ", ".join(f"{timing.name} {timing.median:.1f} us" for timing in point.timings)
                tell(f"{name}, {count} tokens: {times}")
            progress(done, len(tokens), f"{count} tokens")
    return MoeBench(name, mixture, gpu, mode, points)


class _Stage:
    """Records and times graphs of one model's layers."""

    def __init__(
        self, library: Library, machine: Machine, drawn: Drawn, own: OwnLayers, entrants: Sequence[Entrant]
    ) -> None:
        self._library, self._machine, self._drawn, self._own = library, machine, drawn, own
        self._entrants = entrants

    def measure(self, tokens: int, rounds: int) -> MoePoint:
        """Time all entrants, and the parts of this package's layer, with a number of tokens of each GPU."""
        mixture, own = self._drawn.mixture, self._own
        everyones = tokens * mixture.gpus
        plan = own.plan(everyones)
        mean = tokens * mixture.num_experts_per_tok  # the rows of each GPU
        as_one = Problem(mean, 3 * mixture.intermediate_size, mixture.hidden_size, mixture.group_size)
        is_long = default_cost_model().is_long(as_one)
        launches = BRIEF_LAUNCHES if is_long else max(LAUNCHES, own.copies(everyones))
        routings = max(1, min(launches, int(ROUTING_BYTES / plan.nbytes)))
        work = Work(self._drawn, everyones, launches, routings)
        timings, left_out = self._time_entrants(work, rounds, is_long=is_long)
        self._free()
        parts = {} if OWN in left_out else self._time_parts(work, rounds, is_long=is_long)
        self._free()
        hit, rows = work.experts_hit(), work.rows()
        nbytes = int(hit * own.bytes_of_expert)
        floor = None
        if self._machine.device.type == "cuda":
            readable = max(READ_MULTIPLE, nbytes // READ_MULTIPLE * READ_MULTIPLE)
            memory = own.parts_of_memory(readable, everyones)
            floor = cold_read_microseconds(self._library, memory, self._machine.device.index)
        return MoePoint(
            tokens,
            rows,
            hit,
            nbytes,
            rows * as_one.flops / as_one.m,
            (plan.gate_up, plan.down),
            timings,
            parts,
            left_out,
            floor,
        )

    def _free(self) -> None:
        """Return the memory of graphs that are gone, and drop what was compiled for them."""
        if self._machine.device.type == "cuda":
            self._machine.torch.cuda.empty_cache()
            self._machine.torch.compiler.reset()  # it refuses to compile one function for more than a few shapes

    def _time_entrants(
        self, work: Work, rounds: int, *, is_long: bool
    ) -> tuple[Sequence[MoeTiming], Mapping[str, str]]:
        """Return the times, the fastest first, and why entrants have none."""
        contenders: dict[str, Contender] = {}
        left_out: dict[str, str] = {}
        errors: dict[str, float] = {}
        for entrant in self._entrants:
            recorded = attempt(partial(self._record_and_check, entrant, work, errors), entrant.package)
            if isinstance(recorded, str):
                left_out[entrant.name] = recorded
            else:
                contenders[entrant.name] = recorded[0]
        order = random.Random(f"{self._drawn.mixture} {work.tokens}")  # noqa: S311  (nothing secret)
        if contenders:
            left_out |= take_turns(contenders, frozenset({OWN}), OWN, rounds, order, is_long=is_long)
        timings = [
            MoeTiming(name, Timing(name, contender.microseconds), errors[name])
            for name, contender in contenders.items()
        ]
        return sorted(timings, key=lambda timing: timing.median), left_out

    def _record_and_check(self, entrant: Entrant, work: Work, errors: dict[str, float]) -> tuple[Contender, float]:
        """Record an entrant's layers, and return them with their error as a share of the allowed one."""
        contender, results = self._record(entrant.prepare(work))
        contender.timed_replay()  # which waits
        errors[entrant.name] = work.error_of(results[0])
        return contender, errors[entrant.name] / entrant.largest_error

    def _record(self, launches: Sequence[Launch]) -> tuple[Contender, list[Any]]:
        """Record launches, and return them with a list of the last one's result."""
        last: list[Any] = [None]

        def run() -> None:
            for launch in launches:
                last[0] = launch()

        contender = self._machine.record(run)
        contender.launches, contender.kept = len(launches), (launches, contender.kept)
        return contender, last

    def _time_parts(self, work: Work, rounds: int, *, is_long: bool) -> dict[str, float]:
        """Return the microseconds of each part.

        They are timed in the order of a layer, so that each finds what the one before it has written.
        """
        prepared = self._own.prepare_parts(work)
        contenders = {name: self._record(launches)[0] for name, launches in prepared.items()}
        for _ in range(1 if is_long else rounds):
            for contender in contenders.values():
                if is_long:
                    contender.time_block(SECONDS_OF_BLOCK)
                else:
                    contender.time()
        return {name: statistics.median(contender.microseconds) for name, contender in contenders.items()}
