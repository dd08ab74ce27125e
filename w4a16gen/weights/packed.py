"""Packed weights: one block of bytes in the layout that a kernel reads, with the facts that identify it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode, Target, shown
from w4a16gen.kernels.epilogue import why_no_epilogue, why_not_gated
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import NATIVE_GROUP_MULTIPLE
from w4a16gen.weights import storage
from w4a16gen.weights.host import is_tensor
from w4a16gen.weights.layouts import fragments, kmajor
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.quantized import QuantizedWeight, canonical, check_group_size
from w4a16gen.weights.zero_points import zeros_of


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in one layout, as `pack`, `pack_weight` and `to_device` return it and `gemm` takes it.

    Two packed weights compare equal only if they are the same object.

    Attributes:
        data: uint8 [nbytes], a numpy array or any array on a GPU.
        layout: tag of the layout of `data`; kernels of another layout refuse it.
        n: output channels. Gated weights have gates and factors, both counted.
        k: reduction length.
        group_size: values of K that share a scale; k itself in per-column mode.
        mode: the quantisation mode.

    Raises:
        InvalidValueError: if the layout is unknown, or the sizes do not fit together.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> packed = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128))
        >>> packed.layout, packed.nbytes
        ('fragment_blocks_v2', 8704)
    """

    data: Any
    layout: str
    n: int
    k: int
    group_size: int
    mode: QuantMode

    def __post_init__(self) -> None:
        """Check everything but the data, which is checked where it is used."""
        if not isinstance(self.layout, str) or self.layout not in LAYOUTS:
            raise InvalidValueError(
                f"the weight is packed as {shown(self.layout)}, which is not one of {', '.join(LAYOUTS)}"
            )
        if not isinstance(self.mode, QuantMode):
            raise InvalidValueError(f"mode of type {type(self.mode).__name__} must be a QuantMode")
        for name in ("n", "k", "group_size"):
            value = integer(name, getattr(self, name))
            if value <= 0:
                raise InvalidValueError(f"{name} of {value} must be positive")
            object.__setattr__(self, name, value)
        check_layout_group_size(self.layout, self.k, self.group_size, self.mode)
        if self.gated and (reason := why_not_gated(self.n)) is not None:
            raise InvalidValueError(reason)

    @property
    def gated(self) -> bool:
        """Whether it is packed for gated activations; see `pack`. Only calls with one of those take it then."""
        return self.layout == GATED_LAYOUT

    @property
    def outputs(self) -> int:
        """Columns of an output: n, or half as many of a gated weight."""
        return self.n // 2 if self.gated else self.n

    @property
    def geometry(self) -> WeightGeometry:
        """The sizes and the mode."""
        return WeightGeometry(self.n, self.k, self.group_size, self.mode)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return LAYOUTS[self.layout].packed_bytes(self.geometry)

    def unpack(self) -> QuantizedWeight:
        """Return the canonical form, exactly. Needs the data in host memory.

        Raises:
            InvalidValueError: if the data is on a GPU, not uint8 [nbytes], or does not hold a packed weight.
        """
        return LAYOUTS[self.layout].unpack(self.host_data(), self.geometry)

    def host_data(self) -> npt.NDArray[np.uint8]:
        """Return the data as a checked, contiguous numpy array.

        Raises:
            InvalidValueError: if the data is on a GPU, or not uint8 [nbytes].
        """
        data = self.data.numpy() if is_tensor(self.data) and not self.data.is_cuda else self.data
        if not isinstance(data, np.ndarray):
            on_gpu = is_tensor(data) or hasattr(data, "__cuda_array_interface__") or hasattr(data, "__dlpack__")
            if on_gpu:
                raise InvalidValueError("the packed weight is on a GPU: take the host copy, or w.to_host()")
            raise InvalidValueError(f"packed data of type {type(data).__name__} must be an array: see w4a16gen.pack")
        if isinstance(data, np.ma.MaskedArray):
            raise InvalidValueError("packed data is a masked array, but every byte counts")
        if data.dtype != np.uint8:
            raise InvalidValueError(f"packed data of dtype {data.dtype} must be uint8")
        if data.nbytes != self.nbytes:
            raise InvalidValueError(f"packed data of {data.nbytes} bytes must be {self.nbytes} bytes")
        if data.ndim != 1:
            raise InvalidValueError(f"packed data of shape {list(data.shape)} must be [{self.nbytes}]")
        return np.ascontiguousarray(data)

    def to_host(self) -> PackedWeight:
        """Return this weight in host memory, copied from the GPU if it is there.

        Raises:
            InvalidValueError: if the data is an array of a library that offers no copy to the host.
        """
        if isinstance(self.data, np.ndarray):
            return self
        if is_tensor(self.data):
            return replace(self, data=self.data.cpu().numpy())
        for method in ("to_host", "get", "copy_to_host"):  # this package's arrays, CuPy's, numba's
            if hasattr(self.data, method):
                return replace(self, data=getattr(self.data, method)())
        raise InvalidValueError(f"packed data of type {type(self.data).__name__} offers no copy to the host")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this weight to a file in the format of safetensors: one uint8 tensor `packed`, and its facts.

        The file appears under its name only when it is complete. A weight on a GPU is copied to the host first.

        Args:
            path: the file to write.

        Raises:
            InvalidValueError: if the path is not one, or the data is not what the facts say.
            OSError: if the file cannot be written.

        Example:
            >>> import tempfile, pathlib
            >>> import numpy as np
            >>> import w4a16gen
            >>> packed = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     packed.save(pathlib.Path(folder) / "layer.safetensors")
            ...     loaded = w4a16gen.PackedWeight.load(pathlib.Path(folder) / "layer.safetensors")
            >>> bool((loaded.data == packed.data).all())
            True
        """
        facts = {"layout": self.layout, "n": self.n, "k": self.k, "group_size": self.group_size, "mode": str(self.mode)}
        storage.write(path, self.to_host().host_data(), {name: str(value) for name, value in facts.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedWeight:
        """Read a weight that `save` has written, into host memory; `to_device` moves it to a GPU.

        Args:
            path: the file to read.

        Raises:
            InvalidValueError: if the file is not such a file, is damaged, or holds a layout that this version does not
                know.
            OSError: if the file cannot be read.
        """

        def described(facts: dict[str, str], size: int) -> PackedWeight:
            """Return the weight that the facts describe, without its data."""
            try:
                n, k, group_size = (int(facts[name]) for name in ("n", "k", "group_size"))
                weight = cls(None, facts["layout"], n, k, group_size, QuantMode.parse(facts["mode"]))
            except KeyError as error:
                raise InvalidValueError(f"{path} does not hold a packed weight: {error} is missing") from None
            except ValueError as error:
                raise InvalidValueError(f"{path} does not hold a packed weight: {error}") from None
            if weight.nbytes != size:
                raise InvalidValueError(
                    f"{path} does not hold a packed weight: {size} bytes must be {weight.nbytes} bytes"
                )
            return weight

        data, facts = storage.read(path, described)
        weight = replace(described(facts, len(data)), data=data)
        weight.host_data()
        return weight


class Layout(NamedTuple):
    """The functions that write, read and measure one layout."""

    pack: Callable[[QuantizedWeight], npt.NDArray[np.uint8]]
    unpack: Callable[[npt.NDArray[np.uint8], WeightGeometry], QuantizedWeight]
    packed_bytes: Callable[[WeightGeometry], int]
    group_multiple: int
    """Group sizes are multiples of this, or k."""


LAYOUTS: dict[str, Layout] = {
    "kmajor_s4_v1": Layout(kmajor.pack, kmajor.unpack, kmajor.packed_bytes, 1),
    "fragment_blocks_v2": Layout(fragments.pack, fragments.unpack, fragments.packed_bytes, NATIVE_GROUP_MULTIPLE),
    "fragment_blocks_v2_gated": Layout(
        fragments.pack_gated, fragments.unpack_gated, fragments.packed_bytes, NATIVE_GROUP_MULTIPLE
    ),
}
"""Every layout by its tag; the tag ends in a version that changes with the bytes."""
TARGET_LAYOUTS: dict[Target, str] = {Target.CUTLASS: "kmajor_s4_v1", Target.NATIVE: "fragment_blocks_v2"}
"""The layout that each target's kernels read."""
GATED_LAYOUT = "fragment_blocks_v2_gated"
"""The layout that kernels of target native read for gated activations: the same, of interleaved gates and factors."""
LAYOUT_TARGETS: dict[str, Target] = {
    **{layout: target for target, layout in TARGET_LAYOUTS.items()},
    GATED_LAYOUT: Target.NATIVE,
}
"""The kernel family that reads each layout."""


def layout_for(target: Target, *, gated: bool) -> str:
    """Return the layout of weights for a target.

    Raises:
        InvalidValueError: if the target has no gated activations.
    """
    if not gated:
        return TARGET_LAYOUTS[target]
    if LAYOUT_TARGETS[GATED_LAYOUT] is not target:
        raise InvalidValueError(why_no_epilogue(target))
    return GATED_LAYOUT


def check_layout_group_size(layout: str, k: int, group_size: int, mode: QuantMode) -> None:
    """Raise unless a layout holds weights of this group size.

    Raises:
        InvalidValueError: naming the group size and what it must be.
    """
    check_group_size(k, group_size)
    if group_size == k:
        return
    if not mode.is_grouped:
        raise InvalidValueError(f"group size {group_size} must be {k} (= k) in per-column mode")
    multiple = LAYOUTS[layout].group_multiple
    if group_size % multiple != 0:
        raise InvalidValueError(
            f"group size {group_size} must be {k} (= k) or a multiple of {multiple} for target {LAYOUT_TARGETS[layout]}"
        )


def pack(
    q: Any,
    scales: Any,
    zeros: Any = None,
    *,
    zero_points: Any = None,
    group_size: int | None = None,
    target: Target | str = Target.NATIVE,
    gated: bool = False,
) -> PackedWeight:
    """Pack a weight in host memory; see `w4a16gen.pack`."""
    zeros = given_zeros(zeros, zero_points, scales)
    return pack_weight(canonical(q, scales, zeros, group_size=group_size), target=target, gated=gated)


def checked_flag(name: str, value: Any) -> bool:
    """Return a truth value.

    Raises:
        InvalidValueError: if it is anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidValueError(f"{name} of type {type(value).__name__} must be True or False")
    return bool(value)


def given_zeros(zeros: Any, zero_points: Any, scales: Any) -> Any:
    """Return the zeros, or those that zero points stand for.

    Raises:
        InvalidValueError: if both are given, or the zero points are off.
    """
    if zero_points is None:
        return zeros
    if zeros is not None:
        raise InvalidValueError("zeros and zero_points are the same thing: pass one of them")
    return zeros_of(zero_points, scales)


def pack_weight(weight: QuantizedWeight, *, target: Target | str = Target.NATIVE, gated: bool = False) -> PackedWeight:
    """Pack a weight that `quantize` returned, for the kernels of a target.

    Args:
        weight: the weight in canonical form.
        target: the kernel family that will read it, `native` or `cutlass`.
        gated: whether it is for gated activations: the first half of its channels gates the second. Only for target
            native.

    Returns:
        The packed weight in host memory; `to_device` moves it to a GPU.

    Raises:
        InvalidValueError: if the weight is no QuantizedWeight, the group size is none of the target's, the channels of
            a gated weight are no multiple of 16, or, for target native, a channel's scales or zeros span too wide a
            range.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> packed = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128))
        >>> w4a16gen.gemm(np.ones((1, 256), np.float16), packed).shape
        (1, 64)
    """
    if not isinstance(weight, QuantizedWeight):
        raise InvalidValueError(
            f"weight of type {type(weight).__name__} must be what quantize returns, or quantized() of a checkpoint's "
            "layer: w4a16gen.pack takes arrays"
        )
    layout = layout_for(Target.parse(target), gated=checked_flag("gated", gated))
    weight.check()
    check_layout_group_size(layout, weight.k, weight.group_size, weight.mode)
    data = LAYOUTS[layout].pack(weight)
    return PackedWeight(data, layout, weight.n, weight.k, weight.group_size, weight.mode)
