"""Random problems: what is drawn, on which kernels, and that a wrong kernel is found, with a stand-in for the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from w4a16gen import KernelConfig, PackedWeight, QuantMode
from w4a16gen.errors import CudaError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.verify import random_problems as drawn
from w4a16gen.verify.guards import Launch
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import gemm_reference

SPACES = sorted({*enumerate_space("default"), *enumerate_space("trtllm")})


class StandIn:
    """Computes what a kernel should, on the host, and counts; `wrong` kernels err in one value, `broken` ones fail."""

    wrong: KernelConfig | None = None
    broken: KernelConfig | None = None

    def __init__(self, _library: object, device: int) -> None:
        self.library = SimpleNamespace(to_device=lambda value, _device: value)
        self.device = device

    @staticmethod
    def upload(array: Half) -> Half:
        return array

    def run(self, config: KernelConfig, a: Half, weight: PackedWeight, asked: Launch) -> Half:
        if config == self.broken:
            raise CudaError("the launch failed")
        result: Half = gemm_reference(a[: asked.m], weight.unpack(), alpha=asked.alpha, bias=asked.bias).astype(
            np.float16
        )
        if config == self.wrong:
            result[asked.m // 2, weight.n // 2] = np.nan
        return result


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "GuardedGpu", StandIn)


def run(count: int, configs: list[KernelConfig] = SPACES) -> dict[KernelConfig, NumericProof]:
    """Draw problems for kernels."""
    proofs = {config: NumericProof(config.name) for config in configs}
    drawn.prove_random(None, proofs, count)  # type: ignore[arg-type]
    return proofs


def test_as_many_problems_run_as_asked_for_and_all_kernels_get_their_turn() -> None:
    proofs = run(700)
    counts = [proof.passed.get(drawn.KIND, 0) for proof in proofs.values()]
    assert sum(counts) == 700
    assert not any(proof.failures for proof in proofs.values())
    assert min(count for config, count in zip(proofs, counts, strict=True) if "native" in config.name) >= 1
    assert all(0 < proof.worst_error_over_bound <= 1 for proof in proofs.values() if proof.passed)


def test_a_wrong_kernel_and_a_failing_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config for config in SPACES if config.mode is QuantMode.PER_COLUMN_SCALE_ONLY][:6]
    monkeypatch.setattr(StandIn, "wrong", configs[0])
    monkeypatch.setattr(StandIn, "broken", configs[1])
    proofs = run(60, configs)
    assert sum(proof.passed.get(drawn.KIND, 0) + len(proof.failures) for proof in proofs.values()) == 60
    assert "error is inf times the bound" in proofs[configs[0]].failures[0]
    assert "the launch failed" in proofs[configs[1]].failures[0]
    assert drawn.KIND not in proofs[configs[0]].passed
    assert not any(proofs[config].failures for config in configs[2:])


def test_no_problems_and_no_kernels_end_at_once() -> None:
    assert not any(proof.passed for proof in run(0).values())
    assert run(10, []) == {}


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_drawn_weights_can_run_and_vary(mode: QuantMode) -> None:
    rng = np.random.default_rng(0)
    weights = [drawn.draw_weight(rng, mode) for _ in range(60)]
    assert all(weight.n % 8 == 0 and weight.k % 8 == 0 for weight in weights)
    assert all(weight.group_size == weight.k for weight in weights) or mode.is_grouped
    assert len({weight.group_size for weight in weights}) > 8
    assert max(weight.scales.max() for weight in weights) > 0.1
    assert min(weight.scales.min() for weight in weights) < 0.001
