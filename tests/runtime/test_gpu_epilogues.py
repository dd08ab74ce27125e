"""Epilogues on a Hopper GPU: every kernel's proofs, in place at the edges of tiles, chains, and the fast path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from w4a16gen import Epilogue, KernelConfig, Library, QuantMode, pack_weight
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.verify import epilogues
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

pytestmark = pytest.mark.gpu
WITH_EPILOGUES = with_epilogues(enumerate_space("default"), [Epilogue.ELEMENTWISE, Epilogue.GATED])
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
HIDDEN, INNER = 1024, 1536


@pytest.fixture
def library(gpu_library: Library) -> Library:
    """Return the build of every kernel."""
    return gpu_library


@pytest.fixture(scope="session")
def proofs(gpu_library: Library) -> dict[KernelConfig, NumericProof]:
    """Run the proofs of every kernel with an epilogue once."""
    able = [config for config in gpu_library.configs() if config.epilogue is not Epilogue.NONE]
    found = {config: NumericProof(config.name) for config in able}
    epilogues.prove_epilogues(gpu_library, found)
    return found


@pytest.mark.parametrize("config", WITH_EPILOGUES, ids=str)
def test_every_epilogue_of_every_kernel_is_right(
    proofs: dict[KernelConfig, NumericProof], config: KernelConfig
) -> None:
    if config not in proofs:
        pytest.skip("the build that W4A16GEN_BUILD_DIR names does not hold it")
    assert proofs[config].failures == []
    assert set(proofs[config].passed) == {epilogues.KIND}


def of_mode(library: Library, epilogue: Epilogue) -> list[KernelConfig]:
    return [config for config in library.configs() if config.epilogue is epilogue and config.mode is MODE]


def test_in_place_gives_the_same_bits_as_apart_at_the_edges_of_tiles(library: Library) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, 1096, 512, 128, MODE)
    packed = library.to_device(pack_weight(weight))
    for config in of_mode(library, Epilogue.ELEMENTWISE):
        tile = config.cta.tokens
        for m in sorted({1, tile - 1, tile, tile + 1, 2 * tile, 2 * tile + 3, 3 * tile - 1}):
            a = library.to_device(rng.standard_normal((m, 512)).astype(np.float16))
            residual: Half = rng.standard_normal((m, 1096)).astype(np.float16)
            apart = library.gemm(a, packed, config=config, residual=library.to_device(residual)).to_host()
            in_place = library.to_device(residual)
            library.gemm(a, packed, config=config, residual=in_place, out=in_place)
            assert np.array_equal(in_place.to_host().view(np.uint16), apart.view(np.uint16)), (config.name, m)


@pytest.mark.parametrize("m", [1, 5, 16, 70, 300])
def test_chains_of_dependent_launches_give_the_bits_of_launches_one_by_one(library: Library, m: int) -> None:
    """A gated product, and one that adds to its own output, several times: kernels of all kinds behind one another."""
    rng = np.random.default_rng(m)
    up = library.to_device(pack_weight(random_weight(rng, 2 * INNER, HIDDEN, 128, MODE, size=0.002), gated=True))
    down = library.to_device(pack_weight(random_weight(rng, HIDDEN, INNER, 128, MODE, size=0.002)))
    x = rng.standard_normal((m, HIDDEN)).astype(np.float16)
    gated, adding = (
        rng.permutation(np.array(of_mode(library, epilogue), dtype=object)).tolist()
        for epilogue in (Epilogue.GATED, Epilogue.ELEMENTWISE)
    )
    stream = library.module.Stream(0)

    def run(*, dependent: bool) -> Half:
        hidden = library.to_device(x)
        inner = library.to_device(np.full((m, INNER), np.nan, np.float16))
        workspace = library.to_device(np.zeros(1 << 26, np.uint8))
        common: dict[str, Any] = {"stream": stream, "workspace": workspace, "dependent_launch": dependent}
        if dependent:
            stream.begin_capture()
        try:
            for one, other in zip(gated[:25], adding[:25], strict=True):
                library.gemm(hidden, up, config=one, activation="swiglu", out=inner, **common)
                if not dependent:
                    stream.synchronize()
                library.gemm(inner, down, config=other, alpha=0.125, residual=hidden, out=hidden, **common)
                if not dependent:
                    stream.synchronize()
        finally:
            if dependent:
                stream.end_capture()
        if dependent:
            stream.replay()
        stream.synchronize()
        return hidden.to_host()

    wanted = run(dependent=False)
    assert np.isfinite(wanted).all()
    assert np.array_equal(run(dependent=True).view(np.uint16), wanted.view(np.uint16))


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_packing_on_the_gpu_interleaves_as_on_the_host(library: Library, mode: QuantMode) -> None:
    weight = random_weight(np.random.default_rng(3), 176, 384, 64 if mode.is_grouped else 384, mode)
    parts = [None if part is None else library.to_device(part) for part in (weight.q, weight.scales, weight.zeros)]
    packed = library.pack(*parts, group_size=weight.group_size, gated=True)
    assert packed.gated
    assert np.array_equal(packed.data.to_host(), pack_weight(weight, gated=True).data)


@pytest.mark.parametrize("activation", Activation, ids=str)
def test_torch_calls_take_the_fast_path(library: Library, activation: Activation) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    weight = random_weight(rng, 512, HIDDEN, 128, MODE)
    packed = library.to_device(pack_weight(weight, gated=activation.is_gated))
    a = torch.randn(16, HIDDEN, dtype=torch.float16, device="cuda")
    residual = torch.randn(16, packed.outputs, dtype=torch.float16, device="cuda")
    first = library.gemm(a, packed, activation=activation, residual=residual)
    extra = Extra(activation, residual.cpu().numpy())
    assert error_over_bound(first.cpu().numpy(), Expectation(a.cpu().numpy(), weight), 1.0, None, extra) <= 1
    again = library.calls.try_fast_path(a, packed, None, None, 1.0, False, str(activation), residual)
    if again is not None:  # torch offers the exchange API
        assert torch.equal(again, first)
    in_place = residual.clone()
    assert library.gemm(a, packed, activation=activation, residual=in_place, out=in_place) is in_place
    assert torch.equal(in_place, first)


def test_memory_that_overlaps_is_refused(library: Library) -> None:
    torch = pytest.importorskip("torch")
    packed = library.to_device(pack_weight(random_weight(np.random.default_rng(5), 512, HIDDEN, 128, MODE)))
    a = torch.randn(16, HIDDEN, dtype=torch.float16, device="cuda")
    both = torch.zeros(17, 512, dtype=torch.float16, device="cuda")
    with pytest.raises(InvalidValueError, match="output overlaps the residual"):
        library.gemm(a, packed, residual=both[:16], out=both[1:])
