"""Grouped kernels and layers of experts on a Hopper GPU, against float64: random routings, and bit for bit again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS, MoeOptions
from w4a16gen.runtime.expert_plan import MAX_UNSORTED_ROUTES, UNSORTED_TOKENS, Pair, moe_sizes
from w4a16gen.runtime.library import Library
from w4a16gen.verify.guards import CANARY, GUARD_BYTES, POISON, GuardedGpu, Window
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.moe_reference import MoeExpectation, route_reference
from w4a16gen.weights.quantized import Half, QuantizedWeight
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

ROUTING, PRODUCT, LAYER = "routing", "grouped", "layer"
"""Kinds of checks."""
SHAPES = ((272, 768, 128), (208, 352, 32), (592, 192, 64))
"""Channels, K and group size of an expert."""
EXPERTS = (1, 7, 64)
NOBODY = (-1, 1 << 20)
"""Ids that no expert has."""
RANDOM_SHAPE = (80, 96, 32)
"""Channels, K and group size of random routings."""
RANDOM_EXPERTS = (4, 32, 128, 512)
"""The most experts of a random routing; one of these is drawn."""
MOST_RANDOM_EXPERTS = max(RANDOM_EXPERTS)
REPORTED = 50
"""Random routings from one report of progress to the next."""
_ALPHAS = (1.0, -0.75)
LAYER_SIZES = ((256, 192, 64), (512, 352, 32))
"""Hidden size, intermediate size and group size of layers."""
LAYER_TOKENS = (1, 5, 40, 300)
FEW_TOKENS = (1, 3, UNSORTED_TOKENS)
"""Tokens of layers whose routes are not sorted, for each pair of kernels."""
FEW_SLOTS = MAX_UNSORTED_ROUTES // UNSORTED_TOKENS
"""Slots of these tokens: a warp then has two routes in each lane."""
_ACTIVATIONS = {False: (Activation.NONE,), True: tuple(GATED_ACTIVATIONS.values())}


def draw_ids(rng: np.random.Generator, tokens: int, slots: int, experts: int) -> npt.NDArray[Any]:
    """Draw the ids of a routing, int32 or int64 [tokens, slots]: of all experts, of some, of one, or of nobody."""
    hit = rng.choice(experts, int(rng.integers(1, experts + 1)), replace=False)
    if rng.random() < 0.2:  # noqa: PLR2004  (a fifth of the routings: all rows to one expert)
        hit = hit[:1]
    ids = rng.choice(hit, (tokens, slots)).astype("i4" if rng.random() < 0.5 else "i8")  # noqa: PLR2004
    ids[rng.random(ids.shape) < rng.choice([0, 0.2, 1], p=[0.6, 0.3, 0.1])] = rng.choice(NOBODY)
    return ids


@dataclass(frozen=True)
class _Weights:
    """The weights of all experts of one product, on the host and on the GPU."""

    weights: Sequence[QuantizedWeight]
    packed: Mapping[bool, PackedExperts]
    """By whether they are packed for gated activations."""

    @classmethod
    def draw(
        cls, library: Library, rng: np.random.Generator, mode: QuantMode, shape: tuple[int, int, int], experts: int
    ) -> _Weights:
        n, k, group = shape
        size = group if mode.is_grouped else k
        weights = [random_weight(rng, n, k, size, mode) for _ in range(experts)]
        return cls(
            weights,
            {
                gated: library.to_device(pack_experts(weights, gate_up=True, gated=gated))
                for gated in ((False, True) if n % 16 == 0 else (False,))
            },
        )

    def first(self, count: int) -> _Weights:
        """Return the weights of the first experts, which share the memory."""
        packed = {
            gated: replace(every, data=Window(every.data, (count, every.stride), "|u1", 0))
            for gated, every in self.packed.items()
        }
        return _Weights(self.weights[:count], packed)


def prove_experts(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    *,
    device: int = 0,
    seed: int = 0,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    experts: Sequence[int] = EXPERTS,
    progress: Progress = no_progress,
) -> None:
    """Run grouped kernels on random routings, and layers of experts, and add the outcomes to the kernels' proofs.

    Args:
        library: the loaded build.
        proofs: the grouped kernels to run, with the proofs to add to.
        device: the GPU.
        seed: of the random numbers.
        shapes: channels, K and group size of the products.
        experts: numbers of experts.
        progress: called after the kernels of a mode have run a problem.
    """
    gpu = GuardedGpu(library, device)
    modes = sorted({config.mode for config in proofs})
    todo = list(itertools.product(modes, shapes, experts))
    layers = list(itertools.product(modes, LAYER_SIZES))
    for done, (mode, shape, count) in enumerate(todo, 1):
        rng = np.random.default_rng((seed, done))
        weights = _Weights.draw(library, rng, mode, shape, count)
        for config in sorted(config for config in proofs if config.mode is mode):
            _prove_products(gpu, config, proofs[config], weights, rng)
        progress(done, len(todo) + len(layers), f"{mode} {PRODUCT} n={shape[0]} k={shape[1]} experts={count}")
    for done, (mode, sizes) in enumerate(layers, len(todo) + 1):
        _prove_layers(gpu, mode, sizes, proofs, np.random.default_rng((seed, done)))
        progress(done, len(todo) + len(layers), f"{mode} {LAYER} hidden={sizes[0]} intermediate={sizes[1]}")


def _prove_products(
    gpu: GuardedGpu, config: KernelConfig, proof: NumericProof, given: _Weights, rng: np.random.Generator
) -> None:
    """Run one kernel on two routings, each of them twice and then in a graph."""
    gated = config.epilogue is Epilogue.GATED
    first, count = given.weights[0], len(given.weights)
    if gated not in given.packed or why_cannot_run(config, Problem(1, first.n, first.k, first.group_size)) is not None:
        return
    for turn in range(2):
        tokens = int(rng.integers(1, 2 * config.cta.tokens + 2)) if turn else int(rng.integers(1, 60))
        ids = draw_ids(rng, tokens, int(rng.integers(1, 9)), count)
        _prove_routing(gpu, config, proof, given, ids, rng, in_graph=(False, False, True))


def _prove_routing(
    gpu: GuardedGpu,
    config: KernelConfig,
    proof: NumericProof,
    given: _Weights,
    ids: npt.NDArray[Any],
    rng: np.random.Generator,
    *,
    in_graph: Sequence[bool],
) -> None:
    """Run one kernel on one routing, once for each entry of `in_graph`, and judge the results."""
    gated = config.epilogue is Epilogue.GATED
    first, count = given.weights[0], len(given.weights)
    a = rng.standard_normal((ids.size, first.k)).astype(np.float16)
    bias = rng.standard_normal((count, first.n)).astype(np.float16) if rng.integers(2) else None
    alpha = float(rng.choice(_ALPHAS))
    activation = _ACTIVATIONS[gated][int(rng.integers(len(_ACTIVATIONS[gated])))]
    what = f"n={first.n} k={first.k} group={first.group_size} experts={count} ids {list(ids.shape)} {activation}"
    try:
        routed = _Product(gpu, config, given.packed[gated], ids, a, bias, alpha, activation)
        results = [routed.run(in_graph=one) for one in in_graph]
    except (W4A16Error, RuntimeError) as error:
        proof.failures.append(f"{PRODUCT} {what}: {error}")
        return
    offsets, rows = route_reference(ids, count)
    proof.record(ROUTING, f"{ROUTING} {what}", _routing_fault(routed.offsets, routed.rows, offsets, rows))
    worst = 0.0
    for expert in map(int, np.flatnonzero(np.diff(offsets))):
        own = slice(offsets[expert], offsets[expert + 1])
        added = None if bias is None else bias[expert]
        expected = Expectation(a[own], given.weights[expert])
        worst = max(worst, error_over_bound(results[0][own], expected, alpha, added, Extra(activation)))
    _judge(proof, f"{PRODUCT} {what}", worst, results)
    if not np.isnan(results[0][offsets[-1] :]).all():
        proof.failures.append(f"{PRODUCT} {what}: rows of no expert were written")


def prove_random_routings(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    count: int,
    *,
    device: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Run random grouped kernels on random routings of 1 to 512 experts, and add the outcomes to the kernels' proofs.

    Args:
        library: the loaded build.
        proofs: the grouped kernels to run, with the proofs to add to.
        count: routings.
        device: the GPU.
        seed: of the random numbers.
        progress: called after some routings.
    """
    gpu, rng, kernels = GuardedGpu(library, device), np.random.default_rng(seed), sorted(proofs)
    if not kernels:
        return
    modes = sorted({config.mode for config in kernels})
    weights = {mode: _Weights.draw(library, rng, mode, RANDOM_SHAPE, MOST_RANDOM_EXPERTS) for mode in modes}
    for done in range(1, count + 1):
        config = kernels[int(rng.integers(len(kernels)))]
        experts = int(rng.integers(1, int(rng.choice(RANDOM_EXPERTS)) + 1))
        ids = draw_ids(rng, int(rng.integers(1, 41)), int(rng.integers(1, 9)), experts)
        given = weights[config.mode].first(experts)
        _prove_routing(gpu, config, proofs[config], given, ids, rng, in_graph=(bool(rng.integers(2)),))
        if done % REPORTED == 0 or done == count:
            progress(done, count, f"random routings of {config.mode}")


def _routing_fault(
    offsets: npt.NDArray[Any], rows: npt.NDArray[Any], wanted: npt.NDArray[Any], wanted_rows: npt.NDArray[Any]
) -> str | None:
    if not np.array_equal(offsets, wanted):
        return "offsets are wrong"
    return None if np.array_equal(rows[: wanted[-1]], wanted_rows) else "rows are not in the order of their routes"


def _judge(proof: NumericProof, label: str, ratio: float, results: Sequence[Half]) -> None:
    """Record the largest error, and whether all results have the same bits."""
    proof.worst_error_over_bound = max(proof.worst_error_over_bound, ratio)
    fault = f"error is {ratio:.3g} times the bound" if ratio > 1 else None
    if fault is None and any(not _same_bits(result, results[0]) for result in results[1:]):
        fault = "the bits differ when it runs again"
    proof.record(label.split(" ", maxsplit=1)[0], label, fault)


def _same_bits(one: Half, other: Half) -> bool:
    return np.array_equal(one.view(np.uint16), other.view(np.uint16))


class _Product:
    """One grouped product with its routing, ready to be launched."""

    def __init__(
        self,
        gpu: GuardedGpu,
        config: KernelConfig,
        packed: PackedExperts,
        ids: npt.NDArray[Any],
        a: Half,
        bias: Half | None,
        alpha: float,
        activation: Activation,
    ) -> None:
        """Move the operands to the GPU and route."""
        self._gpu, self._config, self._packed = gpu, config, packed
        self._a, self._bias = gpu.upload(a), None if bias is None else gpu.upload(bias)
        self._alpha, self._activation = alpha, activation
        self._shape = len(a), packed.n // 2 if packed.gated else packed.n
        on = {"stream": gpu.stream}
        self._rows = gpu.library.route_tokens(gpu.upload(ids), packed.experts, config.cta.tokens, **on)
        gpu.stream.synchronize()
        self.offsets, self.rows = self._rows.offsets.to_host(), self._rows.routes_of_rows.to_host()

    def run(self, *, in_graph: bool) -> Half:
        """Launch on a poisoned output between canaries, and return the output."""
        gpu, poison = self._gpu, np.full(self._shape, POISON, np.float16)
        output = gpu.guarded(poison.nbytes, poison.reshape(-1).view(np.uint8))

        def launch() -> None:
            gpu.library.grouped_gemm(
                self._a,
                self._packed,
                self._rows,
                bias=self._bias,
                alpha=self._alpha,
                config=self._config,
                activation=self._activation,
                out=Window(output, self._shape, "<f2", GUARD_BYTES),
                stream=gpu.stream,
                dependent_launch=in_graph,
            )

        gpu.launch(launch, in_graph=in_graph)
        return unguarded(output.to_host(), "output").view(np.float16).reshape(self._shape)


def unguarded(host: npt.NDArray[np.uint8], what: str) -> npt.NDArray[np.uint8]:
    """Return what lies between the guards.

    Raises:
        W4A16Error: if a canary was overwritten.
    """
    if (host[:GUARD_BYTES] != CANARY).any() or (host[-GUARD_BYTES:] != CANARY).any():
        raise W4A16Error(f"wrote beyond the {what}")
    return host[GUARD_BYTES:-GUARD_BYTES]


@dataclass(frozen=True)
class _Case:
    """One call of a layer."""

    tokens: int
    activation: str
    weight_on_input: bool
    mapped: bool
    invariant: bool

    def __str__(self) -> str:
        options = ("weight_on_input", "mapped", "invariant")
        return " ".join([f"tokens={self.tokens}", self.activation, *(name for name in options if getattr(self, name))])


def _cases() -> Iterator[_Case]:
    for turn, tokens in enumerate(LAYER_TOKENS):
        for number, activation in enumerate(GATED_ACTIVATIONS):
            yield _Case(tokens, activation, turn % 2 == 1, (turn + number) % 2 == 1, number == 2)  # noqa: PLR2004


def _prove_layers(
    gpu: GuardedGpu,
    mode: QuantMode,
    sizes: tuple[int, int, int],
    proofs: Mapping[KernelConfig, NumericProof],
    rng: np.random.Generator,
) -> None:
    """Run layers of eight experts, with and without kernels that apply the gate."""
    hidden, inner, group = sizes
    count, slots, library = 8, 3, gpu.library
    gate, up, down = (
        [random_weight(rng, n, k, group if mode.is_grouped else k, mode, size=0.05) for _ in range(count)]
        for n, k in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    w2 = library.to_device(pack_experts(down), gpu.device)
    able = {config.epilogue for config in proofs if config.mode is mode}
    for gated in (False, True):
        if not {Epilogue.NONE, Epilogue.GATED if gated else Epilogue.NONE} <= able:
            continue
        w13 = library.to_device(pack_experts(gate, up, gated=gated), gpu.device)
        cases: list[tuple[_Case, Pair | None]] = [(case, None) for case in _cases()]
        cases += _few_token_cases(proofs, mode, Epilogue.GATED if gated else Epilogue.NONE)
        for case, pair in cases:
            layer = _Layer(gpu, (w13, w2), case, slots if pair is None else FEW_SLOTS, rng, pair)
            tested = [proofs[kernel] for kernel in dict.fromkeys(layer.plan[:2]) if kernel in proofs]
            if not tested:
                continue
            what = f"{LAYER} hidden={hidden} intermediate={inner} gated={gated} {case}"
            try:
                results = [layer.run(), layer.run(), layer.replayed_after_another(rng)]
            except (W4A16Error, RuntimeError) as error:
                tested[0].failures.append(f"{what}: {error}")
                continue
            expected = MoeExpectation(
                layer.hidden,
                gate,
                up,
                down,
                layer.ids,
                layer.weights,
                expert_map=layer.expert_map,
                activation=case.activation,
                weight_on_input=case.weight_on_input,
            )
            error_over_bound = expected.error_over_bound(results[0])
            for proof in tested if pair else tested[:1]:
                _judge(proof, what, error_over_bound, results)


def _few_token_cases(
    proofs: Mapping[KernelConfig, NumericProof], mode: QuantMode, epilogue: Epilogue
) -> Iterator[tuple[_Case, Pair]]:
    """Return layers whose products find their experts in the ids: each kernel is in one pair at least."""
    able = [config for config in sorted(proofs) if (config.mode, config.cta.tokens) == (mode, UNSORTED_TOKENS)]
    first, second = ([config for config in able if config.epilogue is kind] for kind in (epilogue, Epilogue.NONE))
    if not first or not second:
        return
    for turn in range(max(len(first), len(second))):
        pair = first[turn % len(first)], second[turn % len(second)]
        for number, tokens in enumerate(FEW_TOKENS):
            activation = tuple(GATED_ACTIVATIONS)[(turn + number) % len(GATED_ACTIVATIONS)]
            yield _Case(tokens, activation, weight_on_input=False, mapped=number % 2 == 1, invariant=False), pair


class _Layer:
    """A layer with its inputs."""

    def __init__(
        self,
        gpu: GuardedGpu,
        weights: tuple[PackedExperts, PackedExperts],
        case: _Case,
        slots: int,
        rng: np.random.Generator,
        pair: Pair | None = None,
    ) -> None:
        """Draw the inputs and move them to the GPU."""
        self._gpu, self._case, self._packed, self._pair = gpu, case, weights, pair
        count = weights[0].experts
        self.expert_map: npt.NDArray[np.int32] | None = None
        if case.mapped:
            self.expert_map = np.full(2 * count, -1, np.int32)
            self.expert_map[rng.choice(2 * count, count, replace=False)] = rng.permutation(count)
        self.global_experts = None if self.expert_map is None else self.expert_map.size
        self._slots, self._count = slots, self.global_experts or count
        self.hidden, self.ids, self.weights = self._drawn(rng)
        self._on_gpu = [gpu.upload(array) for array in (self.hidden, self.ids, self.weights)]
        self._map = None if self.expert_map is None else gpu.upload(self.expert_map)
        self._shape = self.hidden.shape
        sizes = moe_sizes(case.tokens, slots, *weights, self.global_experts)
        self.plan = gpu.library.experts.plan(sizes, gpu.device, invariant=case.invariant, pair=pair)

    def _drawn(self, rng: np.random.Generator) -> tuple[Half, npt.NDArray[Any], npt.NDArray[np.float32]]:
        tokens, size = self._case.tokens, self._packed[1].n
        ids = draw_ids(rng, tokens, self._slots, self._count).astype(np.int64)
        hidden = rng.standard_normal((tokens, size)).astype(np.float16)
        return hidden, ids, rng.random((tokens, self._slots)).astype(np.float32)

    def _launches(self) -> tuple[Callable[[], None], Callable[[], Half]]:
        """Return the launch, and what reads its output."""
        gpu, case, (w13, w2) = self._gpu, self._case, self._packed
        poison = np.full(self._shape, POISON, np.float16)
        output = gpu.guarded(poison.nbytes, poison.reshape(-1).view(np.uint8))
        needed = self.plan.nbytes
        if self._pair is None:
            needed = gpu.library.moe_workspace_bytes(
                case.tokens,
                self._slots,
                w13,
                w2,
                global_experts=self.global_experts,
                invariant=case.invariant,
                device=gpu.device,
            )
        workspace = gpu.guarded(needed)

        def launch() -> None:
            options: dict[str, Any] = {
                "expert_map": self._map,
                "activation": case.activation,
                "weight_on_input": case.weight_on_input,
                "invariant": case.invariant,
                "out": Window(output, self._shape, "<f2", GUARD_BYTES),
                "workspace": Window(workspace, (needed,), "|u1", GUARD_BYTES),
                "stream": gpu.stream,
            }
            hidden, ids, weights = self._on_gpu
            if self._pair is None:
                gpu.library.moe(hidden, w13, w2, ids, weights, **options)
            else:
                gpu.library.experts.moe(hidden, w13, w2, ids, weights, MoeOptions(**options), pair=self._pair)

        def read() -> Half:
            unguarded(workspace.to_host(), "workspace")
            return unguarded(output.to_host(), "output").view(np.float16).reshape(self._shape)

        return launch, read

    def run(self) -> Half:
        """Run the layer once."""
        launch, read = self._launches()
        self._gpu.launch(launch, in_graph=False)
        return read()

    def replayed_after_another(self, rng: np.random.Generator) -> Half:
        """Capture the layer, replay it with other inputs and then with its own."""
        launch, read = self._launches()
        stream = self._gpu.stream
        self._gpu.capture(launch)
        others = self._drawn(rng)
        for inputs in (others, (self.hidden, self.ids, self.weights)):
            for array, values in zip(self._on_gpu, inputs, strict=True):
                array.buffer.upload(np.ascontiguousarray(values))
            stream.replay()
            stream.synchronize()
        return read()
