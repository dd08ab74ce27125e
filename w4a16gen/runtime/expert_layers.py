"""The launches of a layer of experts, whose arrays are checked: routing, both products, the gates and the sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.epilogue import SIDE_BY_SIDE, Activation
from w4a16gen.runtime.bindings import Bindings
from w4a16gen.runtime.expert_arrays import NO_IDS, ExpertChoice
from w4a16gen.runtime.expert_calls import MoeScalars
from w4a16gen.runtime.expert_plan import (
    ACTIVATION,
    COMBINING,
    DOWN,
    GATE_UP,
    INT_BYTES,
    ROUTING,
    MoePlan,
    MoeSizes,
    launched_parts,
)
from w4a16gen.weights.experts import PackedExperts


class PlacedExperts(NamedTuple):
    """The packed experts of a product, and where they are."""

    experts: PackedExperts
    pointer: int


class ExpertLayer(NamedTuple):
    """What the launches of a call of `moe` read and write, checked. Arrays are addresses."""

    sizes: MoeSizes
    plan: MoePlan
    scalars: MoeScalars
    gate_up: PlacedExperts
    down: PlacedExperts
    choice: ExpertChoice
    hidden: int
    weights: int
    """Of the routes."""
    output: int
    workspace: int
    stream: int
    device: int
    out: Any
    """What the call returns."""
    room: Any
    """The workspace. It must not be freed before all is launched."""

    @property
    def routes(self) -> int:
        """The rows that there may be: tokens * slots."""
        return self.sizes.tokens * self.sizes.slots

    @property
    def is_sorted(self) -> bool:
        """Whether a launch sorts the routes and gathers their rows: weights on the input need rows of their own."""
        return not self.plan.can_leave_unsorted or self.scalars.weight_on_input

    @property
    def token_tiles(self) -> tuple[int, int]:
        """The list of token tiles, and its bytes."""
        return (self.workspace + self.plan.token_tiles, self.plan.token_tiles_bytes) if self.is_sorted else (0, 0)

    @property
    def behind(self) -> tuple[int, int, int]:
        """The last arguments of launches behind the first one, on which they are dependent."""
        return self.stream, int(True), self.device


class LayerLauncher:
    """Launches of layers with one build. Several threads may launch at once, for several GPUs."""

    def __init__(self, bindings: Bindings, indices: Mapping[KernelConfig, int]) -> None:
        """Launch with this build.

        Args:
            bindings: the opened build.
            indices: the numbers by which its library knows the grouped kernels.
        """
        self._bindings = bindings
        self._indices = indices

    def launch(self, layer: ExpertLayer, parts: Collection[str]) -> None:
        """Launch a layer.

        Args:
            layer: what the launches read and write.
            parts: those to launch.
        """
        if layer.routes > 0:
            for part, step in (
                (ROUTING, self._route),
                (GATE_UP, self._multiply_gate_up),
                (ACTIVATION, self._activate),
                (DOWN, self._multiply_down),
                (COMBINING, self._combine),
            ):
                if part in parts and part in launched_parts(gated=layer.plan.applies_gate, is_sorted=layer.is_sorted):
                    step(layer)

    def _route(self, layer: ExpertLayer) -> None:
        """Launch the sorting of the routes by expert, and the gathering of their rows."""
        sizes, plan, base = layer.sizes, layer.plan, layer.workspace
        outcome = self._bindings.library.route(
            *(*layer.choice.arguments, sizes.experts, sizes.tokens, sizes.slots, plan.gate_up.cta.tokens),
            *(base + plan.offsets, base + plan.routes_of_rows, base + plan.rows_of_routes, *layer.token_tiles),
            *(layer.hidden, layer.weights if layer.scalars.weight_on_input else 0, base + plan.rows, sizes.down.n),
            *(layer.stream, layer.scalars.launch, layer.device),
        )
        self._bindings.result_of(outcome)

    def _multiply_gate_up(self, layer: ExpertLayer) -> None:
        """Launch the first product, with the gate if its kernels apply it."""
        plan, base = layer.plan, layer.workspace
        products, applied = (plan.gated, layer.scalars.gate) if plan.applies_gate else (plan.products, Activation.NONE)
        read = base + plan.rows if layer.is_sorted else layer.hidden
        self._multiply(layer, plan.gate_up, layer.gate_up, (read, base + products), applied, is_first=True)

    def _multiply_down(self, layer: ExpertLayer) -> None:
        """Launch the second product."""
        plan, base = layer.plan, layer.workspace
        places = base + plan.gated, base + plan.rows
        self._multiply(layer, plan.down, layer.down, places, Activation.NONE, is_first=False)

    def _multiply(
        self,
        layer: ExpertLayer,
        kernel: KernelConfig,
        weights: PlacedExperts,
        places: tuple[int, int],
        applied: Activation,
        *,
        is_first: bool,
    ) -> None:
        """Launch a product from one address to another."""
        w, (read, written) = weights.experts, places
        rows, ids, slots = layer.routes, NO_IDS, 0
        if not layer.is_sorted:
            rows, ids, slots = layer.sizes.tokens, layer.choice.arguments, layer.sizes.slots
        launch = (
            (layer.stream, layer.scalars.launch, layer.device) if (is_first and not layer.is_sorted) else layer.behind
        )
        # The list, or the ids, were there before the first product began, so the second one may fetch weights while
        # that one ends.
        outcome = self._bindings.library.grouped_gemm(
            *(self._indices[kernel], rows, w.n, w.k, w.group_size),
            *(read, weights.pointer, w.nbytes_of_expert, 0, written, 1.0, applied.number, 0),
            *(w.experts, w.stride, *layer.token_tiles, kernel.cta.tokens, not is_first),
            *(*ids, slots, is_first and not layer.is_sorted, *launch),
        )
        self._bindings.result_of(outcome)

    def _activate(self, layer: ExpertLayer) -> None:
        """Launch the gates behind a first product whose kernels do not apply them."""
        plan, base, columns = layer.plan, layer.workspace, layer.sizes.down.k
        rows, row_count = layer.routes, base + plan.offsets + INT_BYTES * layer.sizes.experts
        if not layer.is_sorted:  # rows of no expert hold anything, and nobody reads what becomes of them
            rows, row_count = layer.sizes.unsorted_rows, 0
        if layer.sizes.gated:  # each 8 gates and their 8 factors are a row, so that the count of rows does not hold
            rows, row_count, columns = rows * columns // SIDE_BY_SIDE, 0, SIDE_BY_SIDE
        outcome = self._bindings.library.activate_rows(
            *(base + plan.products, row_count, base + plan.gated, rows, columns),
            *(layer.scalars.gate.number, *layer.behind),
        )
        self._bindings.result_of(outcome)

    def _combine(self, layer: ExpertLayer) -> None:
        """Launch the sums over the slots of each token."""
        sizes, plan, base = layer.sizes, layer.plan, layer.workspace
        weights = 0 if layer.scalars.weight_on_input else layer.weights
        by_route, ids = (base + plan.rows_of_routes, NO_IDS) if layer.is_sorted else (0, layer.choice.arguments)
        outcome = self._bindings.library.combine_rows(
            *(base + plan.rows, by_route, weights, layer.output),
            *(sizes.tokens, sizes.slots, sizes.down.n, *ids, sizes.experts, *layer.behind),
        )
        self._bindings.result_of(outcome)
