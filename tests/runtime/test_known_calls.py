"""Calls made again through DLPack's C exchange API, with tensors that are only described and a library that records."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from paths import CPP

from w4a16gen import Library
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.kernels.epilogue import Activation, activation_numbers

N, K, GROUP, BYTES, DEVICE, STREAM = 512, 1024, 128, 4096, 3, 77
HALF, BYTE = (2, 16), (1, 8)
NUMBERS = activation_numbers(gated_weight=False)
NO_MORE = (None, None)
"""No activation and no residual."""


class DlTensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DESCRIBE = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DlTensor))
CURRENT_STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class ExchangeApi(ctypes.Structure):
    """DLPack's DLPackExchangeAPI."""

    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("unused", ctypes.c_void_p * 3),
        ("describe", DESCRIBE),
        ("current_stream", CURRENT_STREAM),
    ]


def describe(tensor: Any, out: Any) -> int:
    values = ctypes.c_int64 * len(tensor.shape)
    tensor.kept.append((values(*tensor.shape), values(*tensor.strides)))
    shape, strides = tensor.kept[-1]
    device_type, device_id = tensor.device
    code, bits = tensor.dtype
    pointer = ctypes.POINTER(ctypes.c_int64)
    out[0] = DlTensor(
        tensor.address, device_type, device_id, len(shape), code, bits, 1,
        ctypes.cast(shape, pointer), ctypes.cast(strides, pointer), tensor.offset,
    )  # fmt: skip
    return 0


def current_stream(device_type: int, device_id: int, out: Any) -> int:
    assert (device_type, device_id) == (2, DEVICE)
    out[0] = STREAM
    return 0


API = ExchangeApi(1, 3, None, (ctypes.c_void_p * 3)(), DESCRIBE(describe), CURRENT_STREAM(current_stream))
NEWER = ExchangeApi(
    2, 0, ctypes.addressof(API), (ctypes.c_void_p * 3)(), DESCRIBE(describe), CURRENT_STREAM(current_stream)
)
STRANGE = ExchangeApi(2, 0, None, (ctypes.c_void_p * 3)(), DESCRIBE(describe), CURRENT_STREAM(current_stream))


def capsule(api: ExchangeApi) -> object:
    """Return the capsule in which a type offers its table."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    result: object = new(ctypes.addressof(api), b"dlpack_exchange_api", None)
    return result


@dataclass(eq=False)
class Tensor:
    """What the module asks of a tensor."""

    shape: tuple[int, ...]
    dtype: tuple[int, int] = HALF
    address: int = 1 << 20
    device: tuple[int, int] = (2, DEVICE)
    given_strides: tuple[int, ...] | None = None
    offset: int = 0
    requires_grad: bool = False

    def __post_init__(self) -> None:
        self.kept: list[Any] = []

    @property
    def strides(self) -> tuple[int, ...]:
        if self.given_strides is not None:
            return self.given_strides
        result = [1]
        for size in reversed(self.shape[1:]):
            result.insert(0, result[0] * size)
        return tuple(result)

    def new_empty(self, *shape: int) -> Tensor:
        return replace(self, shape=shape, address=1 << 22, offset=0)


class Offering(Tensor):
    """A tensor of a library that offers the table."""

    __dlpack_c_exchange_api__ = capsule(API)


class OfferingNewer(Tensor):
    """One whose library offers a newer table too."""

    __dlpack_c_exchange_api__ = capsule(NEWER)


class OfferingStrange(Tensor):
    """One whose library offers only a table that is not known."""

    __dlpack_c_exchange_api__ = capsule(STRANGE)


class Problem(ctypes.Structure):
    """w4a16_problem."""

    _fields_: ClassVar = [(name, ctypes.c_int64) for name in ("m", "n", "k", "group_size")]


class Recorded(ctypes.Structure):
    """What the stub keeps."""

    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in ("launches", "kernel")],
        ("problem", Problem),
        *[(name, ctypes.c_uint64) for name in ("activations", "packed", "packed_bytes", "bias", "output")],
        *[(name, ctypes.c_uint64) for name in ("workspace", "workspace_bytes", "stream")],
        ("alpha", ctypes.c_float),
        ("dependent_launch", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("residual", ctypes.c_uint64),
    ]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stub") / "libstub.so"
    source = CPP / "stub_library.cpp"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{CUDA_FOLDER}", str(source), "-o", str(path)]
    subprocess.run(command, check=True)  # noqa: S603
    return path


@pytest.fixture
def recorded(stub: Path) -> Recorded:
    return Recorded.in_dll(ctypes.CDLL(str(stub)), "stub_recorded")


@pytest.fixture
def calls(fake_library: Library, stub: Path) -> Any:
    """Return calls that are known for 16 tokens: plain ones by kernel 1, those with an epilogue by kernel 2."""
    module = fake_library.module
    calls = module.CallCache(module.KernelLibrary(str(stub)), N, K, GROUP, BYTES, DEVICE, 0, N, NUMBERS)
    calls.add(16, 1, 0)
    calls.add(16, 2, 1)
    return calls


WEIGHT = Offering((BYTES,), BYTE, address=1 << 21)


@pytest.mark.parametrize("kind", [Offering, OfferingNewer])
def test_a_known_call_is_launched_with_what_the_tensors_say(kind: type[Tensor], calls: Any, recorded: Recorded) -> None:
    before = recorded.launches
    a = kind((16, K), offset=256)
    bias = kind((N,), address=1 << 23)
    out = calls.try_launch(a, WEIGHT, bias, None, 0.5, True, *NO_MORE)
    assert (type(out), out.shape, out.address) == (kind, (16, N), 1 << 22)
    assert (recorded.launches, recorded.kernel) == (before + 1, 1)
    problem = recorded.problem
    assert (problem.m, problem.n, problem.k, problem.group_size) == (16, N, K, GROUP)
    assert (recorded.activations, recorded.packed, recorded.packed_bytes) == ((1 << 20) + 256, 1 << 21, BYTES)
    assert (recorded.bias, recorded.output, recorded.stream) == (1 << 23, 1 << 22, STREAM)
    assert (recorded.workspace, recorded.workspace_bytes) == (0, 0)
    assert (recorded.alpha, recorded.dependent_launch) == (0.5, 1)
    mine = kind((16, N), address=1 << 24)
    assert calls.try_launch(a, WEIGHT, None, mine, 1.0, False, *NO_MORE) is mine
    assert (recorded.bias, recorded.output, recorded.dependent_launch) == (0, 1 << 24, 0)


def test_a_weight_that_cannot_move_is_not_asked_for_its_address(
    fake_library: Library, stub: Path, recorded: Recorded
) -> None:
    module = fake_library.module
    calls = module.CallCache(module.KernelLibrary(str(stub)), N, K, GROUP, BYTES, DEVICE, 1 << 25, N, NUMBERS)
    calls.add(16, 1, 0)
    assert calls.try_launch(Offering((16, K)), object(), None, None, 1.0, False, *NO_MORE).shape == (16, N)
    assert (recorded.packed, recorded.packed_bytes) == (1 << 25, BYTES)


RIGHT: dict[str, Any] = {
    "a": Offering((16, K)),
    "w": WEIGHT,
    "bias": None,
    "out": None,
    "alpha": 1.0,
    "activation": None,
    "residual": None,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": Offering((17, K))},
        {"a": Offering((16, K + 8))},
        {"a": Offering((K,))},
        {"a": Offering((16, K), (2, 32))},
        {"a": Offering((16, K), (4, 16))},
        {"a": Offering((16, K), device=(2, DEVICE + 1))},
        {"a": Offering((16, K), device=(1, DEVICE))},
        {"a": Offering((16, K), given_strides=(2 * K, 1))},
        {"a": Offering((16, K), requires_grad=True)},
        {"a": Tensor((16, K))},
        {"a": OfferingStrange((16, K))},
        {"a": None},
        {"w": Offering((BYTES + 128,), BYTE)},
        {"w": Offering((BYTES,), (0, 8))},
        {"w": Offering((BYTES, 1), BYTE)},
        {"w": Offering((BYTES,), BYTE, device=(2, 0))},
        {"bias": Offering((N + 8,))},
        {"bias": Offering((1, N))},
        {"bias": Offering((N,), (2, 32))},
        {"bias": Offering((N,), requires_grad=True)},
        {"out": Offering((17, N))},
        {"out": Offering((16, N + 8))},
        {"out": Offering((16, N), given_strides=(1, 16))},
        {"out": Offering((16, N), requires_grad=True)},
        {"out": "out"},
        {"activation": "mish"},
        {"activation": "swiglu"},
        {"activation": 1},
        {"activation": ["silu"]},
        {"residual": Offering((16, N + 8))},
        {"residual": Offering((17, N))},
        {"residual": Offering((16, N), (2, 32))},
        {"residual": Offering((16, N), given_strides=(2 * N, 1))},
        {"residual": Offering((16, N), requires_grad=True)},
        {"residual": "residual"},
    ],
    ids=str,
)
def test_a_call_that_is_not_as_known_is_left_alone(wrong: dict[str, Any], calls: Any, recorded: Recorded) -> None:
    before = recorded.launches
    given = RIGHT | wrong
    more = given["activation"], given["residual"]
    assert calls.try_launch(given["a"], given["w"], given["bias"], given["out"], given["alpha"], False, *more) is None
    assert recorded.launches == before


@pytest.mark.parametrize(
    "alpha", [None, "1", True, 1j, [1.0], np.ones(2), np.float32(1), float("nan"), 1e300, 10**400], ids=repr
)
def test_an_alpha_that_is_no_plain_number_is_left_to_the_slow_path(alpha: Any, calls: Any, recorded: Recorded) -> None:
    before = recorded.launches
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, alpha, False, *NO_MORE) is None
    assert recorded.launches == before


@pytest.mark.parametrize("alpha", [2, 0.1, -0.0, float("inf"), -float("inf"), np.float64(0.5), 1e-300])
def test_finite_and_infinite_numbers_are_alpha(alpha: Any, calls: Any, recorded: Recorded) -> None:
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, alpha, False, *NO_MORE) is not None
    assert recorded.alpha == np.float32(alpha)


@pytest.mark.parametrize(("given", "number"), [(False, 0), (True, 1), ("auto", 2)])
def test_the_kind_of_launch_is_passed_on(given: Any, number: int, calls: Any, recorded: Recorded) -> None:
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, 1.0, given, *NO_MORE) is not None
    assert recorded.dependent_launch == number


@pytest.mark.parametrize("dependent", [None, 1, 0, 2, "no", np.bool_(1)])
def test_another_kind_of_launch_is_left_to_the_slow_path(dependent: Any, calls: Any, recorded: Recorded) -> None:
    before = recorded.launches
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, 1.0, dependent, *NO_MORE) is None
    assert recorded.launches == before


def test_a_launch_that_fails_gives_no_output(calls: Any) -> None:
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, 13.0, False, *NO_MORE) is None


def test_a_strange_stride_of_a_single_row_does_not_matter(calls: Any, recorded: Recorded) -> None:
    calls.add(1, 0, 0)
    assert calls.try_launch(Offering((1, K), given_strides=(7, 1)), WEIGHT, None, None, 1.0, False, *NO_MORE).shape == (
        1,
        N,
    )
    assert (recorded.kernel, recorded.problem.m) == (0, 1)


@pytest.mark.parametrize(("activation", "number"), [(None, 0), ("silu", 1), ("relu2", 4), (Activation.GELU, 3)])
def test_an_activation_and_a_residual_are_passed_on(
    activation: Any, number: int, calls: Any, recorded: Recorded
) -> None:
    residual = Offering((16, N), address=1 << 26, offset=512)
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, 1.0, False, activation, residual).shape == (16, N)
    assert (recorded.kernel, recorded.activation, recorded.residual) == (2, number, (1 << 26) + 512)
    calls.try_launch(RIGHT["a"], WEIGHT, None, None, 1.0, False, *NO_MORE)
    assert (recorded.kernel, recorded.activation, recorded.residual) == (1, 0, 0)


def test_a_call_that_needs_another_epilogue_is_left_alone(calls: Any, recorded: Recorded) -> None:
    calls.add(1, 3, 0)
    before, row = recorded.launches, Offering((1, K))
    assert calls.try_launch(row, WEIGHT, None, None, 1.0, False, "silu", None) is None
    assert calls.try_launch(row, WEIGHT, None, None, 1.0, False, None, Offering((1, N))) is None
    assert recorded.launches == before
    assert calls.try_launch(row, WEIGHT, None, None, 1.0, False, "none", None) is not None


def test_gated_calls_have_half_as_many_columns(fake_library: Library, stub: Path, recorded: Recorded) -> None:
    module = fake_library.module
    numbers = activation_numbers(gated_weight=True)
    calls = module.CallCache(module.KernelLibrary(str(stub)), N, K, GROUP, BYTES, DEVICE, 0, N // 2, numbers)
    calls.add(16, 1, 2)
    residual, bias = Offering((16, N // 2), address=1 << 26), Offering((N,), address=1 << 23)
    out = calls.try_launch(RIGHT["a"], WEIGHT, bias, None, 1.0, False, "swiglu", residual)
    assert out.shape == (16, N // 2)
    assert (recorded.problem.n, recorded.activation, recorded.residual) == (N, 5, 1 << 26)
    for activation, added in ((None, None), ("silu", None), ("swiglu", Offering((16, N)))):
        assert calls.try_launch(RIGHT["a"], WEIGHT, None, None, 1.0, False, activation, added) is None
    assert calls.try_launch(RIGHT["a"], WEIGHT, None, Offering((16, N)), 1.0, False, "swiglu", None) is None
