"""Layers of experts for `bench --moe` without a GPU: a build that computes on the host, and a host that times."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fakes.devices import H100
from w4a16gen import Epilogue, QuantMode, pack_weight
from w4a16gen.choose.cards import H100 as CARD
from w4a16gen.choose.experts import Routing, choose_pair
from w4a16gen.cli.services import Services
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import models, moe, stage
from w4a16gen.measure.models import Mixture
from w4a16gen.measure.moe import MoeBench, run_moe_bench
from w4a16gen.measure.step import Machine
from w4a16gen.measure.timing import Contender
from w4a16gen.runtime.expert_calls import MoeOptions
from w4a16gen.runtime.expert_plan import MoePlan
from w4a16gen.weights.quantized import QuantizedWeight

torch = pytest.importorskip("torch")
facts_of = pytest.importorskip("w4a16gen.integrations.torch.ops").facts_of
pytest.importorskip("w4a16gen.integrations.torch.experts_op")

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
WITH_ZEROS = QuantMode.FINEGRAINED_SCALE_AND_ZEROS
TINY = Mixture(256, 128, 6, 2)
DIVIDED = replace(TINY, num_experts=8, gpus=2)
PLAIN = enumerate_space("experts")
WORKSPACE = 1 << 20


def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tiny` be a model, and graphs hold a few of its layers."""
    monkeypatch.setitem(models.MIXTURES, "tiny", TINY)
    monkeypatch.setattr(moe, "LAUNCHES", 4)
    monkeypatch.setattr(stage, "COLD_BYTES", 3e5)


class HostLibrary:
    """Stands in for a build: it computes on the host, and can be wrong or fail."""

    def __init__(self, configs: Sequence[KernelConfig] = PLAIN) -> None:
        self.configs = configs
        self.factor = 1.0
        self.failure: Exception | None = None
        self.parts: list[Collection[str]] = []
        self.gated: set[bool] = set()
        self.experts = SimpleNamespace(plan=self._plan, moe=self._moe)

    def hopper_device(self) -> Any:
        return H100

    def grouped_configs(self) -> list[KernelConfig]:
        return sorted(self.configs)

    def pack(self, q: Any, scales: Any, zeros: Any, *, group_size: int, gated: bool) -> Any:
        mode = MODE if zeros is None else WITH_ZEROS
        added = None if zeros is None else zeros.numpy()
        packed = pack_weight(QuantizedWeight(q.numpy(), scales.numpy(), added, group_size, mode), gated=gated)
        return replace(packed, data=torch.from_numpy(packed.data))

    def _plan(self, sizes: Any, _device: int) -> MoePlan:
        routing = Routing(sizes.tokens, sizes.slots, sizes.experts, sizes.global_experts)
        epilogue = Epilogue.GATED if sizes.gated else Epilogue.NONE
        pair = choose_pair(self.configs, sizes.mode, (sizes.gate_up, epilogue), sizes.down, routing, CARD)
        return MoePlan(*pair, 0, 0, 0, 0, 0, 0, 0, 0, WORKSPACE)

    def _moe(
        self, hidden: Any, w13: Any, w2: Any, ids: Any, weights: Any, options: MoeOptions, parts: Collection[str]
    ) -> Any:
        if self.failure is not None:
            raise self.failure
        assert options.workspace.nbytes == WORKSPACE
        self.parts.append(parts)
        self.gated.add(w13.gated)
        if options.expert_map is not None:
            ids = options.expert_map[ids]
        experts = range(w13.experts)
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in experts:
            factors = (weights * (ids == expert)).sum(1, keepdim=True)
            first, second = w13.expert(expert), w2.expert(expert)
            if w13.gated:
                inner = torch.ops.w4a16gen.gemm(hidden, first.data, None, *facts_of(first), 1.0, "swiglu")
            else:
                gate, up = torch.ops.w4a16gen.gemm(hidden, first.data, None, *facts_of(first), 1.0).chunk(2, 1)
                inner = torch.nn.functional.silu(gate) * up
            out += factors * torch.ops.w4a16gen.gemm(inner.contiguous(), second.data, None, *facts_of(second), 1.0)
        options.out.copy_(out * self.factor)
        return options.out


def host_machine() -> Machine:
    """Return a CPU, on which a replay takes 2 ms."""

    def record(run: Callable[[], None]) -> Contender:
        def timed() -> float:
            run()
            return 2.0

        return Contender(lambda: None, timed, 1)

    return Machine(torch, torch.device("cpu"), lambda function, **_: function, record, lambda _: None)


def measured(library: Any, mixture: Mixture = TINY, tokens: Sequence[int] = (3,), **options: Any) -> MoeBench:
    options.setdefault("machine", host_machine())
    options.setdefault("tell", lambda _: None)
    mode = options.pop("mode", MODE)
    return run_moe_bench(library, ("tiny", mixture), tokens, mode, 2, show_progress=Services().show_progress, **options)
