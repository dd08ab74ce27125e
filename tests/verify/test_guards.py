"""The guarded launch, on a GPU made of host memory: it finds what is written beside, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.library import FakeLibrary
from fakes.memory import memory_at
from fakes.module import Launched

from w4a16gen import KernelConfig, pack_weight
from w4a16gen.verify.guards import GuardedGpu, Launch
from w4a16gen.verify.numeric import NumericProof, judge, launched
from w4a16gen.weights.reference import Expectation, random_weight

CONFIG = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x2_warpgroups4_persistent")


class WrongLibrary(FakeLibrary):
    """A library whose kernel computes the reference, and may do a wrong thing besides."""

    def __init__(self) -> None:
        super().__init__([CONFIG], compute=self.err)
        self.module.workspace = 256
        self.beside: str | None = None
        """The array behind which a byte is written."""
        self.leaves_out = 0
        """Values at the end that are not written."""
        self.factor = 1.0
        """Factor of the first value."""

    def err(self, launched: Launched) -> None:
        assert np.isnan(launched.out).all() or self.module.graphs, "the output must be poisoned"
        assert launched.workspace_bytes == self.module.workspace, "the workspace must be exact"
        result = launched.reference()
        result[0, 0] *= self.factor
        written = result.size - self.leaves_out
        launched.out.reshape(-1)[:written] = result.reshape(-1)[:written]
        ends = {
            "output": launched.output + launched.out.nbytes,
            "workspace": launched.workspace + launched.workspace_bytes,
        }
        if self.beside:
            memory_at(ends[self.beside], (1,), "|u1")[0] = 0


@pytest.fixture
def library() -> WrongLibrary:
    return WrongLibrary()


def run(library: WrongLibrary, *, in_graph: bool = False, with_bias: bool = True) -> NumericProof:
    """Run and judge one problem."""
    rng = np.random.default_rng(0)
    weight = random_weight(rng, 64, 128, 64, CONFIG.mode)
    a = rng.standard_normal((9, 128)).astype(np.float16)
    bias = rng.standard_normal(64).astype(np.float16) if with_bias else None
    gpu, proof = GuardedGpu(library, 0), NumericProof(CONFIG.name)
    launch = Launch(m=7, alpha=0.75, bias=bias, in_graph=in_graph, dependent=True)
    got = launched(gpu, proof, CONFIG, gpu.upload(a), library.to_device(pack_weight(weight)), launch, "case")
    if got is not None:
        judge(proof, "kind", f"case {launch}", got, Expectation(a, weight), launch)
    return proof


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_right_kernel_passes_as_it_was_asked_to_run(library: WrongLibrary, in_graph: bool, with_bias: bool) -> None:
    proof = run(library, in_graph=in_graph, with_bias=with_bias)
    assert proof.failures == []
    assert proof.passed == {"kind": 1}
    assert 0 < proof.worst_error_over_bound <= 1
    assert sum(stream.replays for stream in library.module.streams) == (2 if in_graph else 0)
    assert library.module.launches[0].dependent
    assert (library.module.launches[0].bias != 0) == with_bias


@pytest.mark.parametrize("name", ["output", "workspace"])
def test_a_byte_written_beside_is_found(library: WrongLibrary, name: str) -> None:
    library.beside = name
    proof = run(library)
    assert proof.failures == [
        f"case m=7 alpha=0.75 bias=True graph=False dependent launch=True: wrote beyond the {name}"
    ]
    assert proof.passed == {}


def test_a_value_that_was_not_written_is_found(library: WrongLibrary) -> None:
    library.leaves_out = 1
    assert "error is inf times the bound" in run(library).failures[0]


def test_a_value_off_by_a_tenth_is_found(library: WrongLibrary) -> None:
    library.factor = 1.1
    proof = run(library)
    assert 1 < proof.worst_error_over_bound < 100
    assert "times the bound" in proof.failures[0]


def test_a_refused_launch_is_recorded(library: WrongLibrary) -> None:
    library.module.refusal = (4, "refused")
    assert run(library).failures == ["case m=7 alpha=0.75 bias=True graph=False dependent launch=True: refused"]


def test_a_refused_launch_in_a_graph_ends_the_capture(library: WrongLibrary) -> None:
    library.module.refusal = (4, "refused")
    gpu, proof = GuardedGpu(library, 0), NumericProof(CONFIG.name)
    weight = random_weight(np.random.default_rng(0), 64, 128, 64, CONFIG.mode)
    a, packed = gpu.upload(np.ones((7, 128), np.float16)), library.to_device(pack_weight(weight))
    launch = Launch(m=7, alpha=1.0, bias=None, in_graph=True, dependent=False)
    assert launched(gpu, proof, CONFIG, a, packed, launch, "case") is None
    library.module.refusal = None
    assert launched(gpu, proof, CONFIG, a, packed, launch, "case") is not None
    assert len(proof.failures) == 1
