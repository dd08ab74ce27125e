"""The guarded launch, with host memory in the place of a GPU's: it finds what is written beside, or not at all."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from w4a16gen import KernelConfig, PackedWeight, pack_weight
from w4a16gen.errors import W4A16Error
from w4a16gen.verify.guards import GuardedGpu, Launch
from w4a16gen.verify.numeric import NumericProof, judge, launched
from w4a16gen.weights.reference import Expectation, gemm_reference, random_weight

CONFIG = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x2_warpgroups4_persistent")
WORKSPACE_BYTES = 256


class Buffer:
    """Host memory that looks like the module's device memory."""

    def __init__(self, size: int, device: int) -> None:
        self.memory, self.device = np.zeros(size, np.uint8), device
        self.pointer = self.memory.ctypes.data

    def upload(self, source: npt.NDArray[Any]) -> None:
        self.memory[:] = source.reshape(-1).view(np.uint8)

    def download(self, destination: npt.NDArray[Any]) -> None:
        destination.reshape(-1).view(np.uint8)[:] = self.memory


def host(array: Any) -> npt.NDArray[Any]:
    """See what an array interface points to."""
    interface = array.__cuda_array_interface__
    dtype = np.dtype(interface["typestr"])
    count = int(np.prod(interface["shape"]))
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(interface["data"][0])
    seen: npt.NDArray[Any] = np.frombuffer(memory, dtype).reshape(interface["shape"])
    return seen


class StandIn:
    """A library whose kernel computes the reference, after or before doing a wrong thing with its output."""

    def __init__(self) -> None:
        self.module = SimpleNamespace(DeviceBuffer=Buffer, Stream=self._stream)
        self.launches: list[dict[str, Any]] = []
        self.replays = 0
        self.beside: str | None = None
        self.leaves_out = 0
        self.factor = 1.0

    def _stream(self, _device: int) -> SimpleNamespace:
        def replay() -> None:
            self.replays += 1

        nothing = SimpleNamespace(begin_capture=lambda: None, end_capture=lambda: None, synchronize=lambda: None)
        return SimpleNamespace(replay=replay, **vars(nothing))

    @staticmethod
    def workspace_bytes(_config: KernelConfig, _problem: object, *, device: int) -> int:
        return WORKSPACE_BYTES + 0 * device

    def gemm(self, a: Any, weight: PackedWeight, **given: Any) -> None:
        self.launches.append(given)
        out = host(given["out"])
        assert np.isnan(out).all(), "the output must be poisoned"
        assert host(given["workspace"]).nbytes == WORKSPACE_BYTES
        bias = None if given["bias"] is None else host(given["bias"])
        result = gemm_reference(host(a), weight.unpack(), alpha=given["alpha"], bias=bias).astype(np.float16)
        result[0, 0] *= self.factor
        written = out.size - self.leaves_out
        out.reshape(-1)[:written] = result.reshape(-1)[:written]
        if self.beside:
            end = given[self.beside].__cuda_array_interface__["data"][0] + host(given[self.beside]).nbytes
            ctypes.memset(end, 0, 1)


@pytest.fixture
def library() -> StandIn:
    return StandIn()


def run(library: StandIn, *, in_graph: bool = False, with_bias: bool = True) -> NumericProof:
    """Run and judge one problem."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, 64, 128, 64, CONFIG.mode)
    a = rng.standard_normal((9, 128)).astype(np.float16)
    bias = rng.standard_normal(64).astype(np.float16) if with_bias else None
    gpu, proof = GuardedGpu(library, 0), NumericProof(CONFIG.name)  # type: ignore[arg-type]
    launch = Launch(m=7, alpha=0.75, bias=bias, in_graph=in_graph, dependent=True)
    got = launched(gpu, proof, CONFIG, gpu.upload(a), pack_weight(weight), launch, "case")
    if got is not None:
        judge(proof, "kind", f"case {launch}", got, Expectation(a, weight), launch)
    return proof


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_right_kernel_passes_as_it_was_asked_to_run(library: StandIn, in_graph: bool, with_bias: bool) -> None:
    proof = run(library, in_graph=in_graph, with_bias=with_bias)
    assert proof.failures == []
    assert proof.passed == {"kind": 1}
    assert 0 < proof.worst_error_over_bound <= 1
    assert library.replays == (2 if in_graph else 0)
    assert library.launches[0]["dependent_launch"] is True
    assert (library.launches[0]["bias"] is not None) == with_bias


@pytest.mark.parametrize("what", ["out", "workspace"])
def test_a_byte_written_beside_is_found(library: StandIn, what: str) -> None:
    library.beside = what
    name = {"out": "output", "workspace": "workspace"}[what]
    proof = run(library)
    assert proof.failures == [
        f"case m=7 alpha=0.75 bias=True graph=False dependent launch=True: wrote beyond the {name}"
    ]
    assert proof.passed == {}


def test_a_value_that_was_not_written_is_found(library: StandIn) -> None:
    library.leaves_out = 1
    assert "error is inf times the bound" in run(library).failures[0]


def test_a_value_off_by_a_tenth_is_found(library: StandIn) -> None:
    library.factor = 1.1
    proof = run(library)
    assert 1 < proof.worst_error_over_bound < 100
    assert "times the bound" in proof.failures[0]


def test_a_refused_launch_is_recorded(library: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise W4A16Error("refused")

    monkeypatch.setattr(library, "gemm", refuse)
    assert run(library).failures == ["case m=7 alpha=0.75 bias=True graph=False dependent launch=True: refused"]
