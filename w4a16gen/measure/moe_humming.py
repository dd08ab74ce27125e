"""Layers of 4-bit experts with humming's kernels, as an entrant of `bench --moe`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.moe_entrants import OWN_ERROR, Drawn, Entrant, Launch, Routing, Work, copies_of
from w4a16gen.measure.rival_products import (
    gptq_tensors,
    gptq_weight_config,
    humming_kernel,
    humming_table,
    humming_tuning,
)
from w4a16gen.measure.rivals import HUMMING
from w4a16gen.measure.torch_weight import TorchWeight

NAME = "humming_sorted"
"""Its rows are sorted before the layer begins, by the host, which takes no time of it."""
INDEXED = {"gemm_type": "indexed"}
"""The form of product that reads rows of the hidden states, and writes a row for each route."""
BYTES_OF_WEIGHT = 0.5

Compiled = Callable[..., Callable[..., None]]
"""Compiles a function; `takes_part=True` lets it take part in dependent launches."""


@dataclass(frozen=True)
class Sorted:
    """The routes in the order of their experts, in blocks that belong to one expert each."""

    routes: Any
    """int32 [blocks * rows]: numbers of routes; that of all routes in places without one."""
    experts: Any
    """int32 [blocks]: the expert here of each block."""
    rows: Any
    """int32 [1]: places in all blocks."""


def sort_routes(torch: Any, routing: Routing, expert_map: Any, experts: int, block_rows: int) -> Sorted:
    """Sort the routes of a layer stably by expert.

    Args:
        torch: the module.
        routing: the ids of the experts, of all GPUs.
        expert_map: int32 [all experts], the expert here or -1; None if ids are those.
        experts: experts here. Routes to others are left out.
        block_rows: places of a block.
    """
    ids = routing.ids.flatten().long()
    ids = ids if expert_map is None else expert_map[ids].long()
    order = torch.argsort(torch.where(ids < 0, experts, ids), stable=True)[: int((ids >= 0).sum())]
    counts = torch.bincount(ids[order], minlength=experts)
    blocks = (counts + block_rows - 1) // block_rows
    places = torch.full((int(blocks.sum()) * block_rows,), ids.numel(), dtype=torch.int32, device=ids.device)
    first_places = (blocks.cumsum(0) - blocks) * block_rows
    first_rows = counts.cumsum(0) - counts
    rows = torch.arange(len(order), device=ids.device)
    places[(first_places - first_rows)[ids[order]] + rows] = order.to(torch.int32)
    names = torch.repeat_interleave(torch.arange(experts, device=ids.device), blocks)
    return Sorted(places, names.to(torch.int32), places.new_tensor([len(places)]))


@dataclass(frozen=True)
class _Tuned:
    """How humming computes a product."""

    block_rows: int
    """Rows of a block. Each product has its own: its routes are sorted into blocks of this size."""
    tuning: str
    """humming's `tuning_config`."""


class HummingLayers:
    """humming's indexed kernels, with a compiled gate and a compiled combination behind them."""

    def __init__(self, drawn: Drawn, compiled: Compiled, tokens: Sequence[int]) -> None:
        """Take the layer; its weights are prepared when they are first needed.

        Args:
            drawn: the layer.
            compiled: compiles the functions behind the products.
            tokens: numbers of tokens of all GPUs. humming compiles the kernels for all of them at once, in parallel.
        """
        self._drawn, self._compiled, self._tokens = drawn, compiled, tokens
        self._copies: list[tuple[Any, Any]] = []

    def _gate(self, rows: Any, out: Any) -> None:
        """Write silu(gate) * up of rows that hold both."""
        gate, up = rows.chunk(2, 1)
        out.copy_(self._drawn.torch.nn.functional.silu(gate.float()) * up.float())

    def _combine(self, rows: Any, weights: Any, is_here: Any, out: Any) -> None:
        """Write the sums of each token's rows; those of experts elsewhere hold anything."""
        by_slot = rows.view(*weights.shape, -1).float() * weights[..., None]
        out.copy_(self._drawn.torch.where(is_here[..., None], by_slot, 0).sum(1))

    def _new_layer(self) -> tuple[Any, Any]:
        """Return humming's modules of the gate and up projections, and of the down projections."""
        if self._copies:
            return deepcopy(self._copies[0])
        drawn = self._drawn
        experts = [drawn.weights(expert) for expert in range(drawn.mixture.experts)]
        first, second = zip(*experts, strict=True)
        return self._module(drawn.gate_up, first), self._module(drawn.down, second)

    def _module(self, problem: Problem, weights: Sequence[TorchWeight]) -> Any:
        torch = self._drawn.torch
        layer = (
            importlib.import_module("humming.layer")
            .HummingLayer(
                shape_n=problem.n,
                shape_k=problem.k,
                weight_config=gptq_weight_config(weights[0]),
                num_experts=len(weights),
                torch_dtype=torch.float16,
            )
            .to(self._drawn.device)
        )
        tensors = [gptq_tensors(weight) for weight in weights]
        layer.load_from_tensors({name: torch.stack([expert[name] for expert in tensors]) for name in tensors[0]})
        layer.transform()
        return layer

    def _rows(self, tokens: int) -> int:
        """Return how many rows the experts here get on average, by which humming's users let it choose."""
        mixture = self._drawn.mixture
        return math.ceil(tokens * mixture.num_experts_per_tok * mixture.experts / mixture.num_experts)

    def _tuned(self, rows: int) -> list[_Tuned]:
        """Return how each product runs with a number of rows."""
        tables = [humming_table(layer, self._drawn.device, **INDEXED) for layer in self._copies[0]]
        counts = {rows, *map(self._rows, self._tokens)}
        return [
            _Tuned(humming_kernel(table, rows)["block_shape"][0], humming_tuning(table, counts)) for table in tables
        ]

    def prepare(self, work: Work) -> list[Launch]:
        """Return a launch per layer.

        Raises:
            ImportError: if humming is not installed.
            UnsupportedProblemError: if the weights have zeros.
        """
        drawn, mixture, torch = self._drawn, self._drawn.mixture, self._drawn.torch
        slots, expert_map = mixture.num_experts_per_tok, drawn.expert_map
        routes = work.tokens * slots
        bytes_of_expert = int(BYTES_OF_WEIGHT * sum(at.n * at.k for at in (drawn.gate_up, drawn.down)))
        wanted = copies_of(mixture, work.tokens, bytes_of_expert)
        while len(self._copies) < wanted:
            self._copies.append(self._new_layer())
        rows = self._rows(work.tokens)
        tuned = self._tuned(rows)
        ordered = [
            [sort_routes(torch, routing, expert_map, mixture.experts, product.block_rows) for product in tuned]
            for routing in work.routings
        ]
        here = [(routing.ids if expert_map is None else expert_map[routing.ids]) >= 0 for routing in work.routings]
        products, inner, results = (
            torch.empty((routes, width), dtype=torch.float16, device=drawn.device)
            for width in (drawn.gate_up.n, drawn.down.k, drawn.down.n)
        )
        out = torch.empty_like(work.hidden)
        gate, combine = (self._compiled(function, takes_part=False) for function in (self._gate, self._combine))

        def compute(turn: int) -> Any:
            number = turn % len(ordered)
            gate_up, down = self._copies[turn % wanted]
            for_gate_up, for_down = (
                {
                    "sorted_ids": blocks.routes,
                    "expert_ids": blocks.experts,
                    "num_tokens_padded": blocks.rows,
                    "valid_shape_m": rows,
                    "compute_config": json.dumps(INDEXED),
                    "tuning_config": product.tuning,
                }
                for blocks, product in zip(ordered[number], tuned, strict=True)
            )
            gate_up(work.hidden, outputs=products, top_k=slots, **for_gate_up)
            gate(products, inner)
            down(inner, outputs=results, top_k=1, **for_down)
            combine(results, work.routings[number].weights, here[number], out)
            return out

        return [partial(compute, turn) for turn in range(work.launches)]


def humming_entrant(drawn: Drawn, compiled: Compiled, tokens: Sequence[int]) -> Entrant:
    """Return the entrant of humming's kernels; see `HummingLayers`."""
    return Entrant(NAME, OWN_ERROR, HummingLayers(drawn, compiled, tokens).prepare, HUMMING.package)


def is_installed() -> bool:
    """Return whether humming can be imported."""
    return importlib.util.find_spec(HUMMING.module) is not None
