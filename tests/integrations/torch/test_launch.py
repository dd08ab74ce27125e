"""The operator's way to a GPU, with tensors that claim to be there and a library that computes in host memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.library import FakeLibrary

import w4a16gen
from w4a16gen import Activation, Epilogue, InvalidValueError, NotBuiltError, QuantMode
from w4a16gen.kernels.epilogue import CallEpilogue
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime.calls import checked_launch
from w4a16gen.weights.activations import activation_error
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

torch = pytest.importorskip("torch")
ops = pytest.importorskip("w4a16gen.integrations.torch.ops")
device_weights = pytest.importorskip("w4a16gen.integrations.torch.device_weights")
nibbles = pytest.importorskip("w4a16gen.integrations.torch.nibbles")
N, K, GROUP = 64, 256, 128


class OnGpu(torch.Tensor):  # type: ignore[misc, name-defined]
    """A tensor in host memory that claims to be on GPU 0."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


def on_gpu(array: Any) -> Any:
    return torch.as_tensor(array).as_subclass(OnGpu)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Return the library that the operator uses, on a machine with an H100."""
    library = FakeLibrary(enumerate_space("default"))
    for module in (ops, device_weights):
        monkeypatch.setattr(module, "library_in_use", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=0))
    return library


def launch(x: Any, weight: Any, bias: Any = None, alpha: float = 1.0) -> Any:
    """Call what the dispatcher calls for tensors on a GPU."""
    return ops._on_gpu(x, weight.data, bias, *ops.facts_of(weight), alpha)  # noqa: SLF001


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("workspace", [0, 4096])
def test_a_kernel_computes_what_the_reference_computes(
    mode: QuantMode, workspace: int, library: FakeLibrary, rng: np.random.Generator
) -> None:
    library.module.workspace = workspace
    weight = random_weight(rng, N, K, GROUP if mode.is_grouped else K, mode)
    packed = w4a16gen.pack_weight(weight)
    packed = replace(packed, data=on_gpu(packed.data))
    bias = rng.standard_normal(N).astype(np.float16)
    for m, shape in ((3, (3, K)), (6, (2, 3, K)), (1, (K,)), (0, (2, 0, K))):
        x = rng.standard_normal(shape).astype(np.float16)
        with torch.no_grad():
            y = launch(on_gpu(x).requires_grad_(), packed, on_gpu(bias).requires_grad_(), 0.5)
        assert y.shape == (*shape[:-1], N)
        expected = Expectation(x.reshape(-1, K), weight)
        assert error_over_bound(y.detach().numpy().reshape(-1, N), expected, 0.5, bias) <= 1
        assert library.module.launches[-1].problem.m == m
        assert library.module.launches[-1].workspace_bytes == (workspace if m else 0)
        assert library.module.launches[-1].dependent == checked_launch("auto")


def test_layers_of_one_shape_share_the_fast_path(library: FakeLibrary, rng: np.random.Generator) -> None:
    made = [w4a16gen.pack_weight(random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY)) for _ in range(2)]
    weights = [replace(packed, data=on_gpu(packed.data)) for packed in made]
    x = on_gpu(rng.standard_normal((5, K)).astype(np.float16))
    launch(x, weights[0])
    assert launch(x, weights[1], alpha=0.25) == "repeated"
    a, data, *rest = library.module.repeated[-1]
    assert (a.data_ptr(), data.data_ptr()) == (x.data_ptr(), weights[1].data.data_ptr())
    assert rest == [None, None, 0.25, "auto", "none", None]
    shifted = on_gpu(torch.zeros(5 * K + 1, dtype=torch.float16))[1:].view(5, K)
    launch(shifted, weights[0])
    assert library.module.repeated[-1][0].data_ptr() % 16 == 0


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_weights_are_packed_where_they_are(mode: QuantMode, library: FakeLibrary, rng: np.random.Generator) -> None:
    weight = random_weight(rng, N, K, GROUP if mode.is_grouped else K, mode)
    order = rng.permutation(K)
    decoded = nibbles.Decoded(
        on_gpu(weight.q),
        on_gpu(np.atleast_2d(weight.scales).astype(np.float64)),
        None if weight.zeros is None else on_gpu(weight.zeros.astype(np.float64)),
    )
    found = device_weights.pack_decoded(decoded, on_gpu(order))
    expected = w4a16gen.pack_weight(replace(weight, q=weight.q[:, order]))
    assert found.packed.data.is_cuda
    np.testing.assert_array_equal(found.packed.data.numpy(), expected.data)
    assert found.packed.geometry == expected.geometry
    assert library.kernels


@pytest.mark.usefixtures("library")
def test_checked_packing_still_refuses_arrays_that_do_not_fit(library: FakeLibrary) -> None:
    q, scales = on_gpu(torch.zeros(N, K, dtype=torch.uint8)), on_gpu(torch.ones(2, N, dtype=torch.float16))
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    for wrong, message in (
        ((q.t(), scales, None, GROUP, mode), r"q must be contiguous|scales of shape"),
        ((q, scales.float(), None, GROUP, mode), "scales of dtype float32 must be float16"),
        ((q, scales[:1], None, GROUP, mode), r"scales of shape \[1, 64\] must be \[2, 64\]"),
        ((q, scales, scales[:1], GROUP, mode), r"zeros of shape \[1, 64\] must be \[2, 64\]"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            library.packer.pack_checked(*wrong)


ACTIVATIONS = [activation for activation in Activation if activation is not Activation.NONE]
DEFAULT = enumerate_space("default")


def finish(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, *arguments: Any, apart: bool = True) -> Any:
    """Call what the dispatcher calls for tensors on a GPU, with an activation and a residual."""
    monkeypatch.setattr(ops, "library_in_use", lambda: library)
    x, weight, bias, activation, residual = arguments
    return ops._on_gpu(x, weight.data, bias, *ops.facts_of(weight), 0.5, str(activation), residual, apart)  # noqa: SLF001


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", Activation, ids=str)
def test_without_its_kernels_an_epilogue_follows_the_product(
    activation: Activation,
    with_residual: bool,
    mode: QuantMode,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(rng, N, K, GROUP if mode.is_grouped else K, mode)
    packed = w4a16gen.pack_weight(weight, gated=activation.is_gated)
    packed = replace(packed, data=on_gpu(packed.data))
    x, bias = rng.standard_normal((2, 3, K)).astype(np.float16), rng.standard_normal(N).astype(np.float16)
    added = rng.standard_normal((2, 3, packed.outputs)).astype(np.float16) if with_residual else None
    given = on_gpu(x), packed, on_gpu(bias), activation, None if added is None else on_gpu(added)
    call = CallEpilogue(activation, has_residual=with_residual)
    expected = Expectation(x.reshape(-1, K), weight)
    extra = Extra(activation, None if added is None else added.reshape(-1, packed.outputs))

    every = FakeLibrary(with_epilogues(DEFAULT, list(Epilogue)))
    fused = finish(every, monkeypatch, *given).numpy().reshape(-1, packed.outputs)
    assert every.module.launches[-1].config.epilogue is call.kernels
    assert error_over_bound(fused, expected, 0.5, bias, extra) <= 1

    lacking = FakeLibrary([config for config in every.configs() if config.epilogue is Epilogue.NONE])
    got = finish(lacking, monkeypatch, *given).numpy().reshape(-1, packed.outputs).astype(np.float64)
    assert [one.config.epilogue for one in lacking.module.launches] == [Epilogue.NONE]
    wanted = expected.result(0.5, bias, extra)
    # The product, rounded to fp16, is the argument of the function, whose value is rounded once more.
    of_function = activation_error(activation, expected.result(0.5, bias), expected.bound(0.5, bias))
    assert (np.abs(got - wanted) <= of_function + 2.0**-10 * np.abs(wanted) + 2.0**-20).all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_without_its_kernels_a_layer_is_refused(
    activation: Activation, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = w4a16gen.pack_weight(
        random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY), gated=activation.is_gated
    )
    packed = replace(packed, data=on_gpu(packed.data))
    x = on_gpu(rng.standard_normal((3, K)).astype(np.float16))
    library = FakeLibrary(DEFAULT)
    needed = CallEpilogue(activation).kernels
    with pytest.raises(NotBuiltError, match=f"run `w4a16gen build --epilogue none --epilogue {needed}`"):
        finish(library, monkeypatch, x, packed, None, activation, None, apart=False)
    assert library.module.launches == []


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("gated", "activation", "residual", "message"),
    [
        (False, Activation.SWIGLU, None, "swiglu needs a weight whose gates and factors are interleaved"),
        (True, Activation.SILU, None, "silu does not fit a weight that was packed with gated=True"),
        (False, Activation.SILU, torch.zeros(N).half(), r"residual of shape \[64\] must be \[3, 64\]"),
        (True, Activation.SWIGLU, torch.zeros(3, N).half(), r"residual of shape \[3, 64\] must be \[3, 32\]"),
        (False, Activation.NONE, torch.zeros(3, N), "residual of dtype float32 must be float16"),
    ],
)
def test_an_epilogue_that_does_not_fit_is_refused_without_its_kernels_too(
    gated: bool,
    activation: Activation,
    residual: Any,
    message: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY)
    packed = w4a16gen.pack_weight(weight, gated=gated)
    packed = replace(packed, data=on_gpu(packed.data))
    x = on_gpu(rng.standard_normal((3, K)).astype(np.float16))
    added = None if residual is None else on_gpu(residual)
    for library in (FakeLibrary(DEFAULT), FakeLibrary(with_epilogues(DEFAULT, list(Epilogue)))):
        with pytest.raises(InvalidValueError, match=message):
            finish(library, monkeypatch, x, packed, None, activation, added)
        assert library.module.launches == []
