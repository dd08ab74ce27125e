"""Values of every kind that a caller may pass by mistake."""

from __future__ import annotations

import decimal
import fractions
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fakes.arrays import GpuArray
from w4a16gen import ClusterShape, KernelConfig, PackedWeight, Problem, QuantMode, Target, pack, quantize

NAME = "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_persistent"


class Raising:
    """An object whose every conversion raises."""

    def __array__(self, *_: object, **__: object) -> object:
        raise RuntimeError("no array")

    def __index__(self) -> int:
        raise OSError("no integer")

    def __float__(self) -> float:
        raise KeyError("no float")

    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("no device")

    def __fspath__(self) -> str:
        return "/nowhere/at/all"

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class StrangeInterface:
    """An object whose array interface holds nothing of use."""

    __cuda_array_interface__ = 5


class StrangeStream:
    """A stream whose address is none."""

    cuda_stream = "seven"


def of_any_array(array: npt.NDArray[Any], choice: int) -> Any:
    """Return an array in another form: order, strides, type, mask, library."""
    doubled = np.repeat(array, 2, axis=-1)
    forms: list[Callable[[], Any]] = [
        lambda: array,
        lambda: np.asfortranarray(array),
        lambda: doubled[..., ::2],
        lambda: array[..., ::-1],
        lambda: np.ma.masked_equal(array, array.flat[0]) if array.size else np.ma.masked_array(array),
        lambda: array.astype(object),
        lambda: array.astype(np.float64),
        lambda: array.astype(np.int64),
        lambda: array.astype(np.complex64),
        lambda: array.astype(bool),
        lambda: array.astype(array.dtype.newbyteorder()),
        array.tolist,
        lambda: array.T,
        lambda: array[..., :0],
        lambda: array[None],
        lambda: array.reshape(-1),
        lambda: array.astype("U"),
        lambda: array.view(np.matrix) if array.ndim <= 2 else array,
        lambda: memoryview(array.tobytes()),
        lambda: read_only(array),
        lambda: GpuArray(array.shape, array.dtype.str),
        lambda: array[:1],
        lambda: array.view(np.int8) if array.dtype == np.uint8 else -array,
    ]
    with np.errstate(all="ignore"):
        return forms[choice % len(forms)]()


FORMS = 23


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy that cannot be written."""
    result = array.copy()
    result.flags.writeable = False
    return result


def odd_values() -> list[Any]:
    """Return values of every kind, none of which fits everywhere."""
    quantized = quantize(np.eye(8, 64), group_size=32)
    packed: PackedWeight = pack(quantized.q, quantized.scales, target=Target.CUTLASS)
    return [
        *(None, True, False, 0, 1, -1, 3, 8, 2**31, 2**63, 2**70, -(2**70), 10**400),
        *(0.0, 0.5, -1.0, 1e300, 1e-300, float("nan"), float("inf"), -float("inf"), 1j, complex("nan")),
        *(np.int8(64), np.uint8(200), np.int64(32), np.float16(2), np.float32("nan"), np.float64(1e300), np.bool_(1)),
        *(np.longdouble(2), np.complex64(1), np.array(3), np.array(2.0), np.str_("native"), np.datetime64("now")),
        *(decimal.Decimal(2), fractions.Fraction(1, 2), fractions.Fraction(10**400)),
        *("", "native", "cutlass", "fgs", "cs", "64", "1x1x1", "64x8x128", "fast", NAME, NAME + "x", "\0", "ü" * 3000),
        *("/dev/null", "/dev/full", "/", ".", "/nowhere/at/all", "/proc/self/mem", Path("/dev/null"), Path()),
        *(b"", b"/dev/null", bytearray(8), memoryview(b"12345678"), range(8), slice(1), ..., NotImplemented),
        *([], [1], [[1, 2], [3]], [["a"]], (), (1, 2), {}, {"data": 1}, {1, 2}, frozenset(), iter([1]), object(), int),
        *(np.zeros((0,)), np.zeros((0, 64)), np.zeros((8, 0)), np.zeros((2, 3, 4)), np.zeros(1, "V4")),
        *(np.zeros(3, "M8[s]"), np.zeros(2, [("a", "i4")]), np.array([{}]), np.array("text")),
        *(quantized, packed, quantized.q, quantized.scales, packed.data, packed.geometry),
        *(KernelConfig.parse(NAME), QuantMode.FINEGRAINED_SCALE_ONLY, Target.NATIVE, ClusterShape(1, 1, 1)),
        *(Problem(1, 8, 64, 32), Problem(1, 8, 64, 0), Problem(-1, 8, 64, 32), Problem(2**62, 8, 64, 32)),
        *(GpuArray((4, 64)), GpuArray((4,), "|u1"), GpuArray((4, 64), "nonsense"), StrangeInterface(), StrangeStream()),
        *(Raising(), lambda: None, KernelConfig, np, TypeError("an error")),
    ]
