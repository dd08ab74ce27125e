"""Calls of grouped kernels: products of many experts, and whole layers. No call waits for the GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any

from w4a16gen.choose import experts as choosing
from w4a16gen.choose.cards import Card
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import MAX_DIMENSION, Problem
from w4a16gen.runtime.arrays import check, check_activations_shape, view
from w4a16gen.runtime.bindings import Bindings, numbers_of
from w4a16gen.runtime.calls import GemmOptions
from w4a16gen.runtime.expert_arrays import NO_IDS, ExpertArrays
from w4a16gen.runtime.expert_calls import MoeOptions, check_activation, check_packed, check_pair, positive
from w4a16gen.runtime.expert_layers import ExpertLayer, LayerLauncher, PlacedExperts
from w4a16gen.runtime.expert_plan import MOE_PARTS, MoePlan, MoeSizes, Pair, chosen_pair, moe_sizes, planned
from w4a16gen.runtime.expert_rows import ExpertRows
from w4a16gen.runtime.streams import stream_pointer
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import checked_flag


class ExpertLauncher:
    """Launches of the grouped kernels of one build. Several threads may launch at once, for several GPUs."""

    def __init__(self, bindings: Bindings, card_of: Any) -> None:
        """Launch with this build.

        Args:
            bindings: the opened build.
            card_of: returns the card of a CUDA device number.
        """
        self._bindings = bindings
        self._indices = {info.config: index for index, info in enumerate(bindings.kernels) if info.config.is_grouped}
        self._card_of = card_of
        self._arrays = ExpertArrays(bindings.module)
        self._layers = LayerLauncher(bindings, self._indices)
        self._planned = lru_cache(maxsize=1 << 14)(self._plan)

    @property
    def configs(self) -> list[KernelConfig]:
        """The grouped kernels that are built, sorted."""
        return sorted(self._indices)

    def grouped_gemm(self, a: Any, w: PackedExperts, rows: ExpertRows, options: GemmOptions) -> Any:
        """Launch the product of each row with its expert; see `Library.grouped_gemm`."""
        factor, named, launch = options.scalars()
        packed = self._arrays.packed("w", w)
        if not isinstance(rows, ExpertRows):
            raise InvalidValueError(
                f"rows of type {type(rows).__name__} must be ExpertRows: see route_tokens and list_rows"
            )
        if rows.experts != w.experts:
            raise InvalidValueError(f"rows of {rows.experts} experts must be of {w.experts}, as w is")
        device = packed.device or 0
        applied = Activation.of(options.activation)
        check_activation(applied, w)
        activations = view("activations", a, self._bindings.module)
        check_activations_shape(activations.shape, w.k)
        m = rows.rows
        check("activations", activations, dtype="<f2", shape=(m, w.k), device=device)
        bias = None if options.bias is None else view("bias", options.bias, self._bindings.module)
        if bias is not None:
            check("bias", bias, dtype="<f2", shape=(w.experts, w.n), device=device)
        problem = Problem(m, w.n, w.k, w.group_size)
        kernel = self._kernel(named, w, problem, rows, device)
        stream = stream_pointer(options.stream, a)
        shape = m, w.n // 2 if w.gated else w.n
        out = self._arrays.empty(a, shape, "<f2", device, stream) if options.out is None else options.out
        output = view("output", out, self._bindings.module)
        check("output", output, dtype="<f2", shape=shape, device=device, written=True)
        tiles = view("rows", rows.token_tiles, self._bindings.module)
        check("rows", tiles, dtype="|u1", shape=tiles.shape, device=device)
        outcome = self._bindings.library.grouped_gemm(
            *(self._indices[kernel], *numbers_of(problem)),
            *(activations.pointer, packed.pointer, w.nbytes_of_expert),
            *(0 if bias is None else bias.pointer, output.pointer, factor, applied.number, 0),
            *(w.experts, w.stride, tiles.pointer, tiles.nbytes, rows.tile_tokens, False),
            *(*NO_IDS, 0, False, stream, launch, device),
        )
        self._bindings.result_of(outcome)
        return out

    def _kernel(
        self, named: KernelConfig | None, w: PackedExperts, problem: Problem, rows: ExpertRows, device: int
    ) -> KernelConfig:
        epilogue = Epilogue.GATED if w.gated else Epilogue.NONE
        if named is None:
            routing = choosing.Routing(rows.rows, 1, w.experts, w.experts)
            return choosing.choose_kernel(
                self._indices, w.mode, replace(problem, m=1), epilogue, routing, self._card_of(device), rows.tile_tokens
            )
        if named not in self._indices:
            kind = "is not built" if named.is_grouped else "computes one product: call gemm"
            raise InvalidValueError(f"{named.name} {kind}")
        if (named.mode, named.epilogue) != (w.mode, epilogue):
            raise InvalidValueError(
                f"{named.name} is of mode {named.mode} and epilogue {named.epilogue}, but the experts need "
                f"{w.mode} and {epilogue}"
            )
        return named

    def moe(
        self,
        hidden: Any,
        w13: PackedExperts,
        w2: PackedExperts,
        topk_ids: Any,
        topk_weights: Any,
        options: MoeOptions,
        *,
        parts: Collection[str] = MOE_PARTS,
        pair: Pair | None = None,
    ) -> Any:
        """Launch a layer of experts; see `Library.moe`.

        Args:
            hidden: as there, and the following ones.
            w13: the gate and up projections.
            w2: the down projections.
            topk_ids: the experts of each token.
            topk_weights: their weights.
            options: the options.
            parts: those to launch. What they read is in the workspace of an earlier, whole call.
            pair: the kernels of both products; None chooses them.
        """
        layer = self._checked_layer(hidden, w13, w2, topk_ids, topk_weights, options, pair)
        self._layers.launch(layer, parts)
        return layer.out

    def _checked_layer(
        self,
        hidden: Any,
        w13: PackedExperts,
        w2: PackedExperts,
        topk_ids: Any,
        topk_weights: Any,
        options: MoeOptions,
        pair: Pair | None,
    ) -> ExpertLayer:
        """Return what the launches of a call read and write, checked.

        Raises:
            InvalidValueError: if an argument is not what it must be, or the arrays do not fit together.
        """
        module, scalars = self._bindings.module, options.scalars()
        packed13 = self._arrays.packed("w13", w13)
        device = packed13.device or 0
        packed2 = self._arrays.packed("w2", w2, device)
        check_pair(w13, w2)
        states = view("hidden", hidden, module)
        check_activations_shape(states.shape, w2.n, hidden=True)
        check("hidden", states, dtype="<f2", shape=states.shape, device=device)
        tokens = states.shape[0]
        choice = self._arrays.choice(topk_ids, options.expert_map, device, tokens)
        slots = choice.ids.shape[1]
        weights = view("topk_weights", topk_weights, module)
        check("topk_weights", weights, dtype="<f4", shape=(tokens, slots), device=device)
        sizes = moe_sizes(tokens, slots, w13, w2, choice.global_experts)
        plan = self.plan(sizes, device, invariant=scalars.invariant, pair=pair)
        stream = stream_pointer(options.stream, hidden)
        out = self._arrays.empty(hidden, states.shape, "<f2", device, stream) if options.out is None else options.out
        output = view("output", out, module)
        check("output", output, dtype="<f2", shape=states.shape, device=device, written=True)
        given = options.workspace
        room = self._arrays.empty(hidden, (plan.nbytes,), "|u1", device, stream) if given is None else given
        base = self._arrays.workspace(room, plan.nbytes, device)
        first, second = PlacedExperts(w13, packed13.pointer), PlacedExperts(w2, packed2.pointer)
        arrays = states.pointer, weights.pointer, output.pointer, base
        return ExpertLayer(sizes, plan, scalars, first, second, choice, *arrays, stream, device, out, room)

    def workspace_bytes(
        self,
        tokens: int,
        slots: int,
        w13: PackedExperts,
        w2: PackedExperts,
        *,
        global_experts: int | None,
        invariant: bool,
        device: int,
    ) -> int:
        """Return the workspace of a layer of experts; see `Library.moe_workspace_bytes`."""
        for name, w in (("w13", w13), ("w2", w2)):
            check_packed(name, w)
        check_pair(w13, w2)
        rows = integer("tokens", tokens)
        if rows < 0:
            raise InvalidValueError(f"tokens of {rows} must be 0 or more")
        every = None if global_experts is None else positive("global_experts", global_experts)
        sizes = moe_sizes(rows, positive("slots", slots), w13, w2, every)
        return self.plan(sizes, integer("device", device), invariant=checked_flag("invariant", invariant)).nbytes

    def plan(self, sizes: MoeSizes, device: int, *, invariant: bool = False, pair: Pair | None = None) -> MoePlan:
        """Return how a layer of experts runs on a GPU.

        Args:
            sizes: the sizes of the call.
            device: the CUDA device number.
            invariant: whether the kernels must not depend on the number of tokens.
            pair: the kernels of both products, of equal CTA tokens; None chooses them.

        Raises:
            InvalidValueError: if there are more routes than kernels count.
            NotBuiltError: if the build has not the kernels.
            UnsupportedProblemError: if none can run a product.
        """
        if sizes.routes > MAX_DIMENSION:
            raise InvalidValueError(
                f"tokens * slots of {sizes.routes} must be at most {MAX_DIMENSION}: split the tokens"
            )
        return self._planned(sizes, self._card_of(device), invariant, pair)

    def _plan(self, sizes: MoeSizes, card: Card, invariant: bool, pair: Pair | None) -> MoePlan:
        if pair is None:
            pair = chosen_pair(self._indices, sizes, card, invariant=invariant)
        return planned(sizes, pair, self._bindings.token_tiles_bytes(sizes.routes, sizes.experts, pair[0].cta.tokens))
