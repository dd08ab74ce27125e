"""Products of grouped kernels on a Hopper GPU: each row with its expert against float64, and bit for bit again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.config import Epilogue, KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS
from w4a16gen.verify.expert_inputs import ExpertWeights, draw_ids
from w4a16gen.verify.guards import GUARD_BYTES, POISON, GuardedGpu, Window, unguarded
from w4a16gen.verify.numeric import NumericProof, judge_error
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.moe_reference import route_reference
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound

ROUTING, PRODUCT = "routing", "grouped"
"""Kinds of checks."""
_ALPHAS = (1.0, -0.75)
_ACTIVATIONS = {False: (Activation.NONE,), True: tuple(GATED_ACTIVATIONS.values())}


def prove_products(
    gpu: GuardedGpu, config: KernelConfig, proof: NumericProof, given: ExpertWeights, rng: np.random.Generator
) -> None:
    """Run one kernel on two routings, each of them twice and then in a graph."""
    gated = config.epilogue is Epilogue.GATED
    first, count = given.weights[0], len(given.weights)
    if gated not in given.packed or why_cannot_run(config, Problem(1, first.n, first.k, first.group_size)) is not None:
        return
    for turn in range(2):
        tokens = int(rng.integers(1, 2 * config.cta.tokens + 2)) if turn else int(rng.integers(1, 60))
        ids = draw_ids(rng, tokens, int(rng.integers(1, 9)), count)
        prove_routing(gpu, config, proof, given, ids, rng, in_graph=(False, False, True))


def prove_routing(
    gpu: GuardedGpu,
    config: KernelConfig,
    proof: NumericProof,
    given: ExpertWeights,
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
    judge_error(proof, PRODUCT, f"{PRODUCT} {what}", worst, results)
    if not np.isnan(results[0][offsets[-1] :]).all():
        proof.failures.append(f"{PRODUCT} {what}: rows of no expert were written")


def _routing_fault(
    offsets: npt.NDArray[Any], rows: npt.NDArray[Any], wanted: npt.NDArray[Any], wanted_rows: npt.NDArray[Any]
) -> str | None:
    if not np.array_equal(offsets, wanted):
        return "offsets are wrong"
    return None if np.array_equal(rows[: wanted[-1]], wanted_rows) else "rows are not in the order of their routes"


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
