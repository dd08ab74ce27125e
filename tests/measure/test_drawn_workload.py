"""Data drawn on the GPU by torch: what is packed is what rivals get, with host memory for the GPU's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from w4a16gen import PackedWeight, Problem, QuantMode, Target
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.measure.drawn_workload import DrawnWorkload
from w4a16gen.measure.timing import Contender
from w4a16gen.weights.packed import pack

torch: Any = pytest.importorskip("torch", reason="data are drawn by torch, which is not installed")


class OnHost:
    """Torch, whose GPU is the host's memory."""

    cuda = SimpleNamespace(synchronize=lambda _device: None)

    def device(self, *_: object) -> Any:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def packed_on_host(q: Any, scales: Any, zeros: Any, *, group_size: int, gated: bool) -> PackedWeight:
    given = q.numpy(), scales.numpy(), None if zeros is None else zeros.numpy()
    return pack(*given, group_size=group_size, gated=gated)


@pytest.fixture(params=list(QuantMode), ids=str)
def stage(request: pytest.FixtureRequest) -> DrawnWorkload:
    mode = request.param
    problem = Problem(9, 128, 512, 128 if mode.is_grouped else 512)
    library: Any = SimpleNamespace(pack=packed_on_host)
    return DrawnWorkload(OnHost(), library, 0, problem, mode, 5)


def test_what_is_packed_is_what_checks_and_rivals_see(stage: DrawnWorkload) -> None:
    copies = stage.copies(Target.NATIVE, brief=True)
    assert len(copies) == 1000
    assert copies[0].data is not copies[1].data, "each launch finds its own copy, not in L2"
    channels = np.array([0, 5, 127])
    exact = stage.channels(channels).dequantize()
    assert np.array_equal(copies[-1].unpack().channels(channels).dequantize(), exact)
    assert stage.torch_weight(torch).channels(channels).mode is stage.mode
    gated = stage.copies(Target.NATIVE, brief=True, gated=True)[0]
    assert gated.gated
    assert np.array_equal(gated.unpack().channels(channels).dequantize(), exact)
    with pytest.raises(UnsupportedProblemError, match="packed on the host only"):
        stage.copies(Target.CUTLASS)


def test_activations_are_the_same_for_kernels_checks_and_rivals(stage: DrawnWorkload) -> None:
    rows = np.array([0, 8])
    assert np.array_equal(stage.activations(rows), stage.a.numpy()[rows])
    assert stage.torch_activations(torch, "bfloat16").dtype is torch.bfloat16
    assert 0.9 < float(stage.a.float().std()) < 1.1


def test_what_a_kernel_leaves_out_is_no_number(stage: DrawnWorkload) -> None:
    def writes_one_row() -> float:
        stage.out[8] = 2.0
        return 1.0

    got = stage.run_once(Contender(lambda: None, writes_one_row, 1), np.array([0, 8]))
    assert np.isnan(got[0]).all()
    assert (got[1] == 2.0).all()
