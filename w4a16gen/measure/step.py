"""Steps of a whole decoder, timed in turns: this package's kernels, cuBLAS FP16 and other 4-bit kernels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from w4a16gen.errors import MissingToolError
from w4a16gen.kernels.config import Epilogue, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.epilogue import Activation, CallEpilogue
from w4a16gen.measure.compare import attempt
from w4a16gen.measure.compile_ahead import compile_ahead
from w4a16gen.measure.decoder import Decoder, Parts, Step
from w4a16gen.measure.kernel_kinds import Shares, shares_of
from w4a16gen.measure.probes import cold_read_microseconds
from w4a16gen.measure.results import Timing
from w4a16gen.measure.rival_products import Product, cublas_products
from w4a16gen.measure.rivals import CUBLAS, Rival, find_torch
from w4a16gen.measure.stage import copies_for
from w4a16gen.measure.timing import Contender
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.progress import Progress
from w4a16gen.runtime.calls import AUTO
from w4a16gen.runtime.library import Library
from w4a16gen.runtime.typing import DependentLaunch
from w4a16gen.weights.packed import PackedWeight

OWN, OWN_DEPENDENT, OWN_AUTO = "w4a16gen", "w4a16gen_dependent", "w4a16gen_auto"
"""This package's products: with ordinary launches, with dependent ones, and as the operators of torch launch them."""
OWN_PDL, OWN_DEPENDENT_PDL, OWN_AUTO_PDL = "w4a16gen_pdl", "w4a16gen_dependent_pdl", "w4a16gen_auto_pdl"
"""The same between parts that take part in dependent launches (Inductor's `triton.enable_pdl`)."""
OWN_FUSED, OWN_FUSED_AUTO = "w4a16gen_fused", "w4a16gen_fused_auto"
OWN_FUSED_DEPENDENT_PDL, OWN_FUSED_AUTO_PDL = "w4a16gen_fused_dependent_pdl", "w4a16gen_fused_auto_pdl"
"""Products that compute SwiGLU and add to the residual themselves."""
FUSED_BUILD = "w4a16gen build --epilogue none --epilogue elementwise --epilogue gated"
"""The command that builds their kernels."""
LARGEST_DIFFERENCE = 0.1
"""Of the last hidden state from that of the dense FP16 model, as Euclidean norms. Each product rounds, and every layer
adds to it; a wrong layer differs by 1."""
SIZE = 0.2
"""Of weights' scales, times the root of k. Products are then about as large as what they read, and no sum of many
layers leaves fp16."""
LONG_STEP = 20e3
"""Microseconds. A longer step is at the power limit, and is timed in blocks."""
Prepare = Callable[..., Sequence[Product]]
"""Takes activations [m, k] as an example, a weight and a number of copies; of fused entrants also an epilogue."""


@dataclass(frozen=True)
class Entrant:
    """One way to run a step."""

    name: str
    prepare: Prepare
    dtype: str = "float16"
    package: str = "torch"
    """What to install for it."""
    parts_take_part: bool = False
    """Whether the parts between products are compiled to take part in dependent launches."""
    is_fused: bool = False
    """Whether products compute SwiGLU and residual sums."""

    def products(self, decoder: Decoder, weights: Mapping[str, TorchWeight]) -> dict[str, Sequence[Product]]:
        """Return the products of all layers by name."""
        into: Mapping[str, Any] = {}
        if self.is_fused:
            residual = {"out": decoder.residual, "residual": decoder.residual}
            into = {"o": residual, "down": residual, "gate_up": {"activation": Activation.SWIGLU}}
        return {
            name: self.prepare(decoder.examples[name], weight, decoder.step.depth, **into.get(name, {}))
            for name, weight in weights.items()
        }


@dataclass(frozen=True)
class StepTiming:
    """The time of one entrant."""

    name: str
    microseconds: Timing
    difference: float
    """Of its result from the dense one, as Euclidean norms."""
    shares: Shares | None
    """Where the time goes; None if the profiler cannot tell."""

    @property
    def median(self) -> float:
        """Microseconds of a step."""
        return self.microseconds.median


@dataclass(frozen=True)
class StepBench:
    """The results of one step."""

    step: Step
    gpu: Device
    mode: QuantMode
    timings: Sequence[StepTiming]
    """The fastest first."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Why entrants were not timed."""
    floor: float | None = None
    """Microseconds that reading the 4-bit weights once takes."""

    @property
    def wrong(self) -> Mapping[str, str]:
        """This package's entrants that were left out for a wrong result or a failure, with the reason."""
        names = OWN, OWN_DEPENDENT, OWN_AUTO, OWN_FUSED, OWN_FUSED_AUTO
        return {name: self.left_out[name] for name in names if name in self.left_out}

    def timing(self, name: str) -> StepTiming | None:
        """Return the timing of an entrant, or None."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        dense = self.timing(CUBLAS)
        return {
            "step": asdict(self.step) | {"layers": self.step.depth},
            "gpu": self.gpu.as_json(),
            "mode": self.mode.value,
            "floor_us": self.floor,
            "timings": [
                {
                    "name": timing.name,
                    "microseconds": list(timing.microseconds.isolated),
                    "median_us": timing.median,
                    "tokens_per_second": self.step.tokens / timing.median * 1e6,
                    "speedup_over_fp16": None if dense is None else dense.median / timing.median,
                    "share_of_floor": None if self.floor is None else self.floor / timing.median,
                    "difference": timing.difference,
                    "shares_us": None if timing.shares is None else asdict(timing.shares),
                }
                for timing in self.timings
            ],
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class Machine:
    """What a step runs on."""

    torch: Any
    device: Any
    """torch's device."""
    compiled: Callable[..., Callable[..., Any]]
    """Compiles a part; `takes_part=True` lets it take part in dependent launches."""
    record: Callable[[Callable[[], None]], Contender]
    """Records a step, which is then replayed."""
    profile: Callable[[Contender], Shares | None]
    """Says where the time of a replay goes."""


def gpu_machine(torch: Any, index: int) -> Machine:
    """Return a GPU, on which steps are CUDA graphs."""
    torch.compiler.reset()  # torch refuses to compile one function for more than a few shapes
    return Machine(
        torch,
        torch.device("cuda", index),
        partial(_compiled, torch),
        partial(_record, torch),
        partial(shares_of, torch),
    )


def run_step_bench(
    library: Library,
    step: Step,
    mode: QuantMode,
    rivals: Sequence[Rival],
    rounds: int,
    *,
    tell: Callable[[str], None],
    show_progress: Callable[..., AbstractContextManager[Progress]],
    machine: Machine | None = None,
) -> StepBench:
    """Time a step of a decoder with each entrant, in turns, in one process.

    Weights are drawn. All layers have the same values in memory of their own, so that every step reads all of them.

    Args:
        library: the loaded build.
        step: the step.
        mode: the quantisation mode.
        rivals: other 4-bit kernels; those that are not installed are left out.
        rounds: timed replays of each entrant.
        tell: called with a sentence about each entrant.
        show_progress: shows a bar with a title.
        machine: where to run; None takes the first Hopper GPU.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
        MissingToolError: if torch is not installed.
        InvalidValueError: if a layer cannot be divided.
    """
    gpu = library.hopper_device()
    if machine is None:
        torch = find_torch()
        if torch is None:
            raise MissingToolError("bench --step runs the rest of the model with torch: pip install torch")
        machine = gpu_machine(torch, gpu.index)
        problems = list(step.problems().values())
        compile_ahead(problems, mode, rivals, gpu.index, tell=tell, show_progress=show_progress)
    entrants = entrants_of(library, rivals, mode)
    if not any(entrant.is_fused for entrant in entrants):
        tell(f"Products with SwiGLU and residual are not timed: `{FUSED_BUILD}` builds their kernels")
    weights = {
        name: TorchWeight.drawn(machine.torch, problem, mode, place, machine.device, SIZE / math.sqrt(problem.k))
        for place, (name, problem) in enumerate(step.problems().items())
    }
    stage = _Stage(machine, step, weights)
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    with show_progress("Preparing a step", len(entrants)) as progress:
        for done, entrant in enumerate(entrants, 1):
            recorded = attempt(partial(stage.record, entrant), entrant.package)
            if isinstance(recorded, str):
                left_out[entrant.name] = recorded
                tell(f"{entrant.name} is left out: {recorded}")
            else:
                contenders[entrant.name] = recorded[0]
            progress(done, len(entrants), entrant.name)
    take_turns(contenders, rounds, random.Random(str(step)))  # noqa: S311  (nothing secret)
    timings = [
        StepTiming(name, Timing(name, contender.microseconds), stage.differences[name], machine.profile(contender))
        for name, contender in contenders.items()
    ]
    floor = _floor(library, machine, step, weights) if machine.device.type == "cuda" else None
    return StepBench(step, gpu, mode, sorted(timings, key=lambda timing: timing.median), left_out, floor)


def entrants_of(library: Library, rivals: Sequence[Rival], mode: QuantMode) -> list[Entrant]:
    """Return the entrants: the dense model, with which the others are compared, first.

    Fused ones need a build with kernels of the mode that have epilogues.
    """
    own = OwnProducts(library)
    dependent, auto = (partial(own.prepare, dependent=kind) for kind in (True, AUTO))
    fused = [
        Entrant(OWN_FUSED, own.prepare, is_fused=True),
        Entrant(OWN_FUSED_AUTO, auto, is_fused=True),
        Entrant(OWN_FUSED_DEPENDENT_PDL, dependent, parts_take_part=True, is_fused=True),
        Entrant(OWN_FUSED_AUTO_PDL, auto, parts_take_part=True, is_fused=True),
    ]
    can_fuse = all(library.has_epilogue(mode, epilogue) for epilogue in (Epilogue.ELEMENTWISE, Epilogue.GATED))
    return [
        Entrant(CUBLAS, cublas_products),
        Entrant(OWN, own.prepare),
        Entrant(OWN_DEPENDENT, dependent),
        Entrant(OWN_AUTO, auto),
        Entrant(OWN_PDL, own.prepare, parts_take_part=True),
        Entrant(OWN_DEPENDENT_PDL, dependent, parts_take_part=True),
        Entrant(OWN_AUTO_PDL, auto, parts_take_part=True),
        *(fused if can_fuse else []),
        *(Entrant(rival.name, rival.prepare, rival.dtype, rival.package) for rival in rivals),
    ]


class OwnProducts:
    """This package's products. Entrants share the copies of a weight."""

    def __init__(self, library: Library) -> None:
        """Multiply with the kernels of a build."""
        self._library = library
        self._copies: dict[tuple[int, bool], list[PackedWeight]] = {}

    def prepare(
        self,
        a: Any,
        weight: TorchWeight,
        copies: int,
        *,
        dependent: DependentLaunch = False,
        out: Any = None,
        activation: Activation = Activation.NONE,
        residual: Any = None,
    ) -> Sequence[Product]:
        """Multiply by copies of the packed weight.

        Args:
            a: activations of the shape that calls have, fp16 [m, k] on the weight's device.
            weight: the weight.
            copies: how many products.
            dependent: the kind of launches.
            out: where they write; None allocates one tensor for all.
            activation: the activation.
            residual: what they add, possibly `out` itself.
        """
        key = id(weight), activation.is_gated
        if key not in self._copies:
            packed = weight.packed(self._library, gated=activation.is_gated)
            self._copies[key] = [packed, *(replace(packed, data=packed.data.clone()) for _ in range(1, copies))]
        if out is None:
            columns = CallEpilogue(activation).outputs(weight.n)
            out = weight.torch.empty((a.shape[0], columns), dtype=a.dtype, device=a.device)

        def product(copy: PackedWeight) -> Product:
            def multiply(given: Any) -> Any:
                self._library.gemm(
                    given, copy, out=out, dependent_launch=dependent, activation=activation, residual=residual
                )
                return out

            return multiply

        return [product(copy) for copy in self._copies[key]]


class _Stage:
    """Records steps on one set of tensors per dtype, and compares their results with the first one's."""

    def __init__(self, machine: Machine, step: Step, weights: Mapping[str, TorchWeight]) -> None:
        self._machine, self._step, self._weights = machine, step, weights
        self._decoders: dict[str, Decoder] = {}
        self._parts: dict[tuple[str, bool], Parts] = {}
        self._expected: Any = None
        self.differences: dict[str, float] = {}

    def record(self, entrant: Entrant) -> tuple[Contender, float]:
        """Record an entrant's step, and return it with its difference as a share of the allowed one."""
        machine, step, weights = self._machine, self._step, self._weights
        if entrant.dtype not in self._decoders:
            dtype = getattr(machine.torch, entrant.dtype)
            self._decoders[entrant.dtype] = Decoder(machine.torch, step, dtype, machine.device)
        decoder = self._decoders[entrant.dtype]
        key = entrant.dtype, entrant.parts_take_part
        if key not in self._parts:
            compiled = partial(machine.compiled, takes_part=entrant.parts_take_part)
            self._parts[key] = Parts(machine.torch, step, compiled)
        parts = self._parts[key]
        products = entrant.products(decoder, weights)
        run = decoder.run_fused if entrant.is_fused else decoder.run
        contender = machine.record(partial(run, parts, products))
        contender.kept = (parts, products, contender.kept)
        decoder.residual.zero_()
        contender.timed_replay()  # which waits
        result = decoder.residual.double()
        self._expected = result if self._expected is None else self._expected
        difference = float((result - self._expected).norm() / self._expected.norm())
        self.differences[entrant.name] = difference
        return contender, difference / LARGEST_DIFFERENCE


def _compiled(torch: Any, function: Callable[..., Any], *, takes_part: bool) -> Callable[..., Any]:
    # Without combo kernels, queries, keys and values are rotated and written by a kernel each.
    options = {"combo_kernels": True} | ({"triton.enable_pdl": True} if takes_part else {})
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    return compiled


def _record(torch: Any, run: Callable[[], None]) -> Contender:
    """Record a step in a CUDA graph, after one that compiles and allocates."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed_replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return Contender(graph.replay, timed_replay, 1)


def take_turns(contenders: Mapping[str, Contender], rounds: int, order: random.Random) -> None:
    """Time contenders in turn, in a new order each round."""
    names = list(contenders)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            contender = contenders[name]
            if contender.microseconds and contender.microseconds[0] > LONG_STEP:
                contender.time_block()
            else:
                contender.time()


def _floor(library: Library, machine: Machine, step: Step, weights: Mapping[str, TorchWeight]) -> float:
    """Return the microseconds that reading the packed weights of a step once takes."""
    torch, total = machine.torch, 0.0
    for weight in weights.values():
        packed = weight.packed(library)
        copies = [packed.data.clone() for _ in range(copies_for(packed.nbytes))]
        total += step.depth * cold_read_microseconds(library, copies, machine.device.index)
        del copies
        torch.cuda.empty_cache()
    return total
