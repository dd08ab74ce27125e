"""Layers of experts to be timed: drawn weights and routings, and the ways to compute such a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from w4a16gen.choose.experts import Routing as RoutingSizes
from w4a16gen.choose.experts import expected_load, why_not_built
from w4a16gen.errors import NotBuiltError, UnsupportedProblemError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.models import Mixture
from w4a16gen.measure.stage import copies_for, evenly
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.runtime.expert_calls import MoeOptions
from w4a16gen.runtime.expert_plan import MOE_PARTS, MoePlan, MoeSizes, launched_parts, moe_sizes
from w4a16gen.runtime.library import Library
from w4a16gen.weights.experts import GATE_FIRST, PackedExperts, expert_stride
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import layout_for

OWN, DENSE = "w4a16gen", "torch_bf16"
OWN_ERROR, DENSE_ERROR = 0.005, 0.03
"""Largest errors of right results. Two products, the activation and the sum are rounded to fp16 or bf16. A wrong
expert is off by 1."""
SIZE = 0.2
"""Of weights' scales, times the root of k: products are about as large as what they read."""
CHECKED_TOKENS = 8
"""Tokens whose results are compared before an entrant is timed."""
ROUTING_BYTES = 4e9
"""Bytes of the workspaces of all routings of a graph, at most; there is always one routing."""
DENSE_BYTES = 2
"""Of a weight in bf16."""
Launch = Callable[[], Any]
"""Launches a layer, or a part of it, and returns its output."""


@dataclass(frozen=True, eq=False)
class Routing:
    """The experts of some tokens, drawn at random, each of a token's experts once."""

    ids: Any
    """int32 [tokens, slots]."""
    weights: Any
    """fp32 [tokens, slots]; those of a token sum up to 1."""


class Drawn:
    """A layer of experts: weights that are drawn where they are needed."""

    def __init__(self, torch: Any, mixture: Mixture, mode: QuantMode, device: Any) -> None:
        """Draw on a device.

        Args:
            torch: the module.
            mixture: the sizes.
            mode: the quantisation mode.
            device: torch's device.
        """
        self.torch, self.mixture, self.mode, self.device = torch, mixture, mode, device
        self.gate_up, self.down = mixture.problems(mode)
        self.expert_map = None
        if mixture.gpus > 1:
            self.expert_map = torch.full((mixture.num_experts,), -1, dtype=torch.int32, device=device)
            self.expert_map[: mixture.experts] = torch.arange(mixture.experts, dtype=torch.int32, device=device)

    def weights(self, expert: int) -> tuple[TorchWeight, TorchWeight]:
        """Return an expert's gate and up projections, the rows of the gate first, and its down projection."""

        def weight(problem: Problem, seed: int) -> TorchWeight:
            return TorchWeight.drawn(self.torch, problem, self.mode, seed, self.device, SIZE / math.sqrt(problem.k))

        return weight(self.gate_up, 2 * expert), weight(self.down, 2 * expert + 1)

    def exact(self, hidden: Any, routing: Routing, rows: Sequence[int]) -> Any:
        """Return the results of some tokens, fp64 [rows, hidden], from unrounded products in fp32."""
        torch, functional = self.torch, self.torch.nn.functional
        results = torch.zeros((len(rows), hidden.shape[1]), dtype=torch.float64, device=self.device)
        for place, token in enumerate(rows):
            for expert, factor in zip(routing.ids[token].tolist(), routing.weights[token].tolist(), strict=True):
                if expert < self.mixture.experts:
                    gate_up, down = (weight.exact() for weight in self.weights(expert))
                    gate, up = (hidden[token].float() @ gate_up.T).chunk(2)
                    results[place] += factor * ((functional.silu(gate) * up) @ down.T).double()
        return results


class Work:
    """What a graph computes: layers with the same hidden states, and routings that take turns."""

    def __init__(self, drawn: Drawn, tokens: int, launches: int, routings: int, seed: int = 0) -> None:
        """Draw hidden states and routings.

        Args:
            drawn: the layer.
            tokens: tokens of all GPUs.
            launches: layers of the graph.
            routings: how many are drawn.
            seed: of the random values.
        """
        torch, mixture = drawn.torch, drawn.mixture
        self.drawn, self.tokens, self.launches = drawn, tokens, launches
        source = torch.Generator(drawn.device).manual_seed(seed)
        options = {"device": drawn.device, "generator": source}
        self.hidden = torch.randn((tokens, mixture.hidden_size), dtype=torch.float16, **options)
        self.routings = []
        for _ in range(routings):
            scores = torch.rand((tokens, mixture.num_experts), **options)
            ids = scores.topk(mixture.num_experts_per_tok, dim=1).indices.to(torch.int32)
            weights = torch.rand(ids.shape, **options)
            self.routings.append(Routing(ids, weights / weights.sum(1, keepdim=True)))

    def routing(self, launch: int) -> Routing:
        """Return the routing of a launch."""
        return self.routings[launch % len(self.routings)]

    def _mean(self, count: Callable[[Any], int]) -> float:
        """Return the mean over the launches of a number that depends on the ids of experts here."""
        counts = [count(routing.ids[routing.ids < self.drawn.mixture.experts]) for routing in self.routings]
        return sum(counts[launch % len(counts)] for launch in range(self.launches)) / self.launches

    def experts_hit(self) -> float:
        """Return how many experts here have a token, on average."""
        return self._mean(lambda ids: len(ids.unique()))

    def rows(self) -> float:
        """Return the rows of all experts here, on average."""
        return self._mean(len)

    def error_of(self, result: Any) -> float:
        """Return the error of the last launch's result, relative to the exact one, as Euclidean norms."""
        rows = [int(row) for row in evenly(self.tokens, CHECKED_TOKENS)]
        exact = self.drawn.exact(self.hidden, self.routing(self.launches - 1), rows)
        size = float(exact.norm())
        error = float((result[rows].double() - exact).norm())
        return error / size if size else error


@dataclass(frozen=True)
class Entrant:
    """One way to compute a layer of experts."""

    name: str
    largest_error: float
    """Largest error of a right result, relative to the exact one, as Euclidean norms."""
    prepare: Callable[[Work], Sequence[Launch]]
    """Returns a launch per layer of a graph. It may raise whatever keeps it from taking part."""
    package: str = "torch"
    """What to install for it."""


def check_built(library: Library, mode: QuantMode) -> None:
    """Raise unless a build can compute layers of experts.

    Raises:
        NotBuiltError: if it has no grouped kernel of the mode; the text names the command that builds some.
    """
    if not _has(library.grouped_configs(), mode, Epilogue.NONE):
        raise NotBuiltError(why_not_built(mode, Epilogue.NONE))


def _has(configs: Sequence[KernelConfig], mode: QuantMode, epilogue: Epilogue) -> bool:
    return any(config.mode is mode and config.epilogue is epilogue for config in configs)


@dataclass(frozen=True)
class _Layer:
    """The packed weights of one layer."""

    buffer: Any
    """uint8: both projections, one after the other."""
    halves: tuple[PackedExperts, PackedExperts]
    """Gate and up projections, and down projections, in the memory of the buffer."""


class OwnLayers:
    """This package's grouped kernels. If the build has some that apply the gate, they take part."""

    def __init__(self, library: Library, drawn: Drawn) -> None:
        """Pack the experts.

        Args:
            library: the loaded build.
            drawn: the layer.
        """
        self._library, self._drawn = library, drawn
        self._gated = _has(library.grouped_configs(), drawn.mode, Epilogue.GATED)
        self._copies = [self._new_layer()]
        for expert in range(drawn.mixture.experts):
            for half, weight in zip(self._copies[0].halves, drawn.weights(expert), strict=True):
                packed = weight.packed(library, gated=half.gated)
                half.data[expert, : packed.nbytes] = packed.data

    def _new_layer(self) -> _Layer:
        """Return a layer of zeros."""
        drawn, kinds = self._drawn, ((self._drawn.gate_up, self._gated), (self._drawn.down, False))
        layouts = [layout_for(Target.NATIVE, gated=gated) for _, gated in kinds]
        strides = [
            expert_stride(layout, WeightGeometry(problem.n, problem.k, problem.group_size, drawn.mode))
            for layout, (problem, _) in zip(layouts, kinds, strict=True)
        ]
        experts, torch = drawn.mixture.experts, drawn.torch
        buffer = torch.zeros((experts * sum(strides),), dtype=torch.uint8, device=drawn.device)
        parts = buffer.split([experts * stride for stride in strides])
        first, second = (
            PackedExperts(part.view(experts, -1), layout, problem.n, problem.k, problem.group_size, drawn.mode, order)
            for part, layout, (problem, _), order in zip(parts, layouts, kinds, (GATE_FIRST, None), strict=True)
        )
        return _Layer(buffer, (first, second))

    def _layers(self, count: int) -> list[_Layer]:
        """Return layers of equal values, each in memory of its own."""
        while len(self._copies) < count:
            layer = self._new_layer()
            layer.buffer.copy_(self._copies[0].buffer)
            self._copies.append(layer)
        return self._copies[:count]

    @property
    def bytes_of_expert(self) -> int:
        """Bytes of one expert's packed weights."""
        return sum(half.nbytes_of_expert for half in self._copies[0].halves)

    def copies(self, tokens: int) -> int:
        """Return how many layers of weights launches take in turn; see `copies_of`."""
        return copies_of(self._drawn.mixture, tokens, self.bytes_of_expert)

    def parts_of_memory(self, nbytes: int, tokens: int) -> list[Any]:
        """Return as many bytes of each layer's packed weights, for a kernel that only reads them."""
        return [layer.buffer[:nbytes] for layer in self._layers(self.copies(tokens))]

    def _sizes(self, tokens: int) -> MoeSizes:
        mixture = self._drawn.mixture
        everywhere = None if self._drawn.expert_map is None else mixture.num_experts
        return moe_sizes(tokens, mixture.num_experts_per_tok, *self._copies[0].halves, everywhere)

    def plan(self, tokens: int) -> MoePlan:
        """Return the kernels of the layer, and its workspace.

        Args:
            tokens: tokens of all GPUs.

        Raises:
            NotBuiltError: if the build has not the kernels.
            UnsupportedProblemError: if none can run a product.
        """
        return self._library.experts.plan(self._sizes(tokens), self._drawn.device.index or 0)

    def prepare(self, work: Work) -> list[Launch]:
        """Return a launch per layer. All have one workspace, as the layers of a model have."""
        return self._launches(work, MOE_PARTS, self._workspaces(work, 1))

    def prepare_parts(self, work: Work) -> dict[str, list[Launch]]:
        """Return the launches of each part. A routing has a workspace of its own, which a whole layer has filled."""
        workspaces = self._workspaces(work, len(work.routings))
        for launch in self._launches(work, MOE_PARTS, workspaces)[: len(workspaces)]:
            launch()
        is_sorted = not self.plan(work.tokens).can_leave_unsorted
        names = launched_parts(gated=self._gated, is_sorted=is_sorted)
        return {name: self._launches(work, [name], workspaces) for name in names}

    def _workspaces(self, work: Work, count: int) -> list[Any]:
        torch, nbytes = self._drawn.torch, self.plan(work.tokens).nbytes
        return [torch.empty((nbytes,), dtype=torch.uint8, device=self._drawn.device) for _ in range(count)]

    def _launches(self, work: Work, parts: Collection[str], workspaces: Sequence[Any]) -> list[Launch]:
        layers, out = self._layers(self.copies(work.tokens)), self._drawn.torch.empty_like(work.hidden)

        def launch(turn: int) -> Launch:
            routing, layer = work.routing(turn), layers[turn % len(layers)]
            return partial(
                self._library.experts.moe,
                *(work.hidden, *layer.halves, routing.ids, routing.weights),
                MoeOptions(self._drawn.expert_map, out=out, workspace=workspaces[turn % len(workspaces)]),
                parts=parts,
            )

        return [launch(turn) for turn in range(work.launches)]


class DenseLayers:
    """Dense experts in bf16 with torch's grouped_mm, and torch's sorting, gathering and combining around it."""

    def __init__(self, drawn: Drawn) -> None:
        """Take the layer; its weights are made when they are first needed."""
        self._drawn = drawn
        self._copies: list[tuple[Any, Any]] = []

    def _new_layer(self) -> tuple[Any, Any]:
        """Return the weights of a layer, bf16 [experts, n, k] each."""
        if self._copies:
            first, second = self._copies[0]
            return first.clone(), second.clone()
        drawn = self._drawn
        first, second = (
            drawn.torch.empty((drawn.mixture.experts, at.n, at.k), dtype=drawn.torch.bfloat16, device=drawn.device)
            for at in (drawn.gate_up, drawn.down)
        )
        for expert in range(drawn.mixture.experts):
            gate_up, down = drawn.weights(expert)
            first[expert], second[expert] = gate_up.exact(), down.exact()
        return first, second

    def prepare(self, work: Work) -> list[Launch]:
        """Return a launch per layer.

        Raises:
            UnsupportedProblemError: if torch has no grouped_mm.
        """
        torch, drawn = self._drawn.torch, self._drawn
        multiply = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if multiply is None:
            raise UnsupportedProblemError("torch has no grouped_mm: 2.8 and newer have it")
        experts, slots = drawn.mixture.experts, drawn.mixture.num_experts_per_tok
        bytes_of_expert = DENSE_BYTES * sum(problem.n * problem.k for problem in (drawn.gate_up, drawn.down))
        wanted = copies_of(drawn.mixture, work.tokens, bytes_of_expert)
        self._copies += [self._new_layer() for _ in range(wanted - len(self._copies))]
        hidden = work.hidden.bfloat16()
        numbers = torch.arange(work.tokens * slots, device=drawn.device)
        names = torch.arange(experts, dtype=torch.int32, device=drawn.device)

        def compute(routing: Routing, gate_up: Any, down: Any) -> Any:
            ids = routing.ids.flatten()
            ids = ids if drawn.expert_map is None else drawn.expert_map[ids]
            elsewhere = ids < 0
            ids, order = torch.sort(torch.where(elsewhere, experts, ids), stable=True)
            ends = torch.searchsorted(ids, names, right=True).to(torch.int32)
            gate, up = multiply(hidden[order // slots], gate_up.mT, offs=ends).chunk(2, dim=1)
            rows = multiply(torch.nn.functional.silu(gate) * up, down.mT, offs=ends)
            by_route = rows[torch.empty_like(order).scatter_(0, order, numbers)]
            by_route.masked_fill_(elsewhere[:, None], 0)  # grouped_mm does not write rows of no expert
            by_slot = by_route.view(work.tokens, slots, -1)
            return torch.bmm(routing.weights[:, None].to(by_slot.dtype), by_slot)[:, 0]

        return [partial(compute, work.routing(turn), *self._copies[turn % wanted]) for turn in range(work.launches)]


def entrants_of(own: OwnLayers, drawn: Drawn) -> list[Entrant]:
    """Return the entrants, this package's first."""
    return [
        Entrant(OWN, OWN_ERROR, own.prepare),
        Entrant(DENSE, DENSE_ERROR, DenseLayers(drawn).prepare),
    ]


def copies_of(mixture: Mixture, tokens: int, bytes_of_expert: int) -> int:
    """Return how many layers of weights launches take in turn, so that they find L2 cold.

    Args:
        mixture: the sizes.
        tokens: tokens of all GPUs. A layer reads the experts that have one.
        bytes_of_expert: bytes of one expert's weights.
    """
    sizes = RoutingSizes(tokens, mixture.num_experts_per_tok, mixture.experts, mixture.num_experts)
    return copies_for(int(bytes_of_expert * expected_load(sizes, 1).experts))
