"""Layers of experts on a Hopper GPU, against float64: with every option, in graphs, and bit for bit again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.arrangement import MAX_UNSORTED_ROUTES, UNSORTED_TOKENS
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS, MoeOptions
from w4a16gen.runtime.expert_plan import Pair, moe_sizes
from w4a16gen.verify.expert_inputs import draw_ids
from w4a16gen.verify.guards import GUARD_BYTES, POISON, GuardedGpu, Window, unguarded
from w4a16gen.verify.numeric import NumericProof, judge_error
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.moe_reference import MoeExpectation
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import random_weight

LAYER = "layer"
"""A kind of checks."""
LAYER_EXPERTS = 40
"""Experts of a layer: more than a warp has lanes, and few tokens may choose all of them."""
LAYER_TOKENS = (1, 5, 40, 300)
FEW_TOKENS = (1, 3, UNSORTED_TOKENS)
"""Tokens of layers whose routes are not sorted, for each pair of kernels."""
FEW_SLOTS = MAX_UNSORTED_ROUTES // UNSORTED_TOKENS
"""Slots of these tokens: a warp then has two routes in each lane."""


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


def prove_layers(
    gpu: GuardedGpu,
    mode: QuantMode,
    sizes: tuple[int, int, int],
    proofs: Mapping[KernelConfig, NumericProof],
    rng: np.random.Generator,
) -> None:
    """Run layers of experts, whose weights are packed for kernels that apply the gate, and without it."""
    able = {config.epilogue for config in proofs if config.mode is mode}
    if Epilogue.NONE not in able:
        return
    hidden, inner, group = sizes
    count, slots, library = LAYER_EXPERTS, 3, gpu.library
    gate, up, down = (
        [random_weight(rng, n, k, group if mode.is_grouped else k, mode, size=0.05) for _ in range(count)]
        for n, k in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    w2 = library.to_device(pack_experts(down), gpu.device)
    for gated in (False, True):
        applied = Epilogue.GATED if gated and Epilogue.GATED in able else Epilogue.NONE
        w13 = library.to_device(pack_experts(gate, up, gated=gated), gpu.device)
        cases: list[tuple[_Case, Pair | None]] = [(case, None) for case in _cases()]
        cases += _few_token_cases(proofs, mode, applied)
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
                judge_error(proof, LAYER, what, error_over_bound, results)


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
        self._left_over = np.random.default_rng(case.tokens)  # what workspaces hold: random bits, many NaN among them
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
        workspace = gpu.guarded(needed, self._left_over.integers(0, 256, needed, np.uint8))

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
