"""Packing on a GPU: a canonical weight that is there already, with the checks of packing on the host."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError, NotBuiltError
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import ArrayView, DeviceArray, check, view
from w4a16gen.runtime.bindings import Bindings, numbers_of
from w4a16gen.runtime.streams import empty_like_library, stream_pointer
from w4a16gen.weights.layouts.fragments import TOO_WIDE_RANGE
from w4a16gen.weights.packed import PackedWeight, checked_flag, given_zeros, layout_for
from w4a16gen.weights.quantized import MAX_Q, check_factors, mode_and_group_size, why_not_half


class GpuPacker:
    """Packs weights on the GPU with the kernels of one build."""

    def __init__(self, bindings: Bindings) -> None:
        """Pack with this build."""
        self._bindings = bindings
        self._faults = _FaultFlags()

    @property
    def _module(self) -> Any:
        return self._bindings.module

    def pack(
        self,
        q: Any,
        scales: Any,
        zeros: Any,
        zero_points: Any,
        group_size: int | None,
        stream: Any,
        *,
        gated: bool = False,
    ) -> PackedWeight:
        """Pack for the native kernels; return when it is done. See `Library.pack`.

        The scales and zeros, a small part of the weight, are copied to the host to be checked there before the launch.
        """
        values = view("q", q, self._module)
        if len(values.shape) != 2 or 0 in values.shape:  # noqa: PLR2004
            raise InvalidValueError(f"q of shape {list(values.shape)} must be [n, k] with at least one value")
        n, k = values.shape
        device = values.device or 0
        check("q", values, dtype="|u1", shape=(n, k), device=device)
        address = stream_pointer(stream, q)
        if self._module.is_capturing(address, device):
            raise InvalidValueError("packing waits for its checks, which a graph cannot: pack before the capture")
        factors = view("scales", scales, self._module)
        if factors.dtype != "<f2":
            raise InvalidValueError(why_not_half("scales", _name(factors.dtype)))
        host_scales = self._download("scales", factors, device, address)
        added = None if zeros is None else view("zeros", zeros, self._module)
        points = None if zero_points is None else view("zero_points", zero_points, self._module)
        host_zeros = given_zeros(
            None if added is None else self._download("zeros", added, device, address),
            None if points is None else self._download("zero_points", points, device, address),
            host_scales,
        )
        mode, size = mode_and_group_size(n, k, factors.shape, group_size, zeros=host_zeros is not None)
        check_factors(host_scales, host_zeros, n=n, groups=k // size, mode=mode)
        weight = PackedWeight(None, layout_for(Target.NATIVE, gated=checked_flag("gated", gated)), n, k, size, mode)
        if points is not None:
            owner = DeviceArray.from_host(self._module, host_zeros, device)
            added = view("zeros", owner, self._module)
        return self._launch(values, factors, added, weight, q, address)

    def pack_checked(
        self, q: Any, scales: Any, zeros: Any, group_size: int, mode: QuantMode, *, gated: bool = False
    ) -> PackedWeight:
        """Pack for the native kernels, on the current stream, without reading scales and zeros back to the host.

        The caller has made sure that the factors are finite. The kernel checks q and the range of the factors.

        Args:
            q: uint8 [n, k], values 0 to 15, contiguous.
            scales: fp16 [k / group_size, n], or [n] in per-column mode.
            zeros: fp16 [k / group_size, n], or None.
            group_size: values of K per scale.
            mode: the quantisation mode.
            gated: whether it is for gated activations.

        Raises:
            InvalidValueError: if an array does not fit, a value of q is above 15, or a channel's factors span too wide
                a range for the layout.
            UnsupportedProblemError: if no kernel can run n and k.
            NotBuiltError: if the build holds no native kernel of the mode.
        """
        values = view("q", q, self._module)
        n, k = values.shape
        check("q", values, dtype="|u1", shape=(n, k), device=values.device)
        shape = (k // group_size, n) if mode.is_grouped else (n,)
        factors = view("scales", scales, self._module)
        added = None if zeros is None else view("zeros", zeros, self._module)
        for name, part in (("scales", factors), ("zeros", added)):
            if part is not None:
                check(name, part, dtype="<f2", shape=shape, device=values.device)
        address = stream_pointer(None, q)
        weight = PackedWeight(None, layout_for(Target.NATIVE, gated=gated), n, k, group_size, mode)
        return self._launch(values, factors, added, weight, q, address)

    def _download(self, name: str, array: ArrayView, device: int, stream: int) -> npt.NDArray[Any]:
        """Copy an array to the host, after the work of a stream."""
        check(name, array, dtype=array.dtype, shape=array.shape, device=device)
        try:
            host = np.empty(array.shape, np.dtype(array.dtype))
        except TypeError:  # such as bfloat16
            must_be = f"integers of 0 to {MAX_Q}" if name == "zero_points" else "float16"
            raise InvalidValueError(f"{name} of dtype {array.dtype} must be {must_be}") from None
        if array.pointer:
            self._bindings.result_of(self._module.copy_to_host(array.pointer, host, stream, device))
        return host

    def _launch(
        self,
        q: ArrayView,
        scales: ArrayView,
        zeros: ArrayView | None,
        weight: PackedWeight,
        like: Any,
        stream: int,
    ) -> PackedWeight:
        """Launch the packing kernel, wait for it, and return the weight with its packed bytes.

        Raises:
            InvalidValueError: if the kernel found values that cannot be packed.
        """
        index = self._native_kernel(weight.mode)
        problem = Problem(0, weight.n, weight.k, weight.group_size)
        device = q.device or 0
        count = self._bindings.packed_bytes(index, problem)
        data = empty_like_library(like, self._module, (count,), "|u1", device, stream=stream)
        target = view("packed weight", data, self._module)
        faults = self._faults.take(self._module, device)
        outcome = self._bindings.library.pack(
            index,
            *numbers_of(problem)[1:],
            *(q.pointer, scales.pointer, 0 if zeros is None else zeros.pointer),
            *(target.pointer, target.nbytes, faults.buffer.pointer, stream, weight.gated, device),
        )
        self._bindings.result_of(outcome)
        found = int(faults.to_host()[0])
        if found == 0:
            self._faults.put_back(faults)
        if found & self._module.FAULT_VALUE:
            raise InvalidValueError(f"q holds values above {MAX_Q}; it must hold 0 to {MAX_Q}")
        if found & self._module.FAULT_RANGE:
            raise InvalidValueError(f"scales or zeros {TOO_WIDE_RANGE}")
        return replace(weight, data=data)

    def _native_kernel(self, mode: QuantMode) -> int:
        """Return the number of a native kernel of a mode: all read the same layout."""
        for index, info in enumerate(self._bindings.kernels):
            config: KernelConfig = info.config
            if config.target is Target.NATIVE and config.mode is mode:
                return index
        raise NotBuiltError(f"the build holds no native kernel of mode {mode}: run `w4a16gen build`")


class _FaultFlags(threading.local):
    """The word in which the packing kernel reports faults, one for each thread and GPU.

    To allocate and free it for each weight takes longer than to pack a small one: freeing waits for the whole GPU. A
    word that was set is not put back, so that the next weight gets a new one.
    """

    def __init__(self) -> None:
        self._by_device: dict[int, DeviceArray] = {}

    def take(self, module: Any, device: int) -> DeviceArray:
        """Return a word of a GPU that holds 0."""
        return self._by_device.pop(device, None) or DeviceArray.from_host(module, np.zeros(1, np.uint32), device)

    def put_back(self, word: DeviceArray) -> None:
        """Keep a word that still holds 0 for this thread's next weight."""
        self._by_device[word.device] = word


def _name(typestr: str) -> str:
    try:
        return str(np.dtype(typestr))
    except TypeError:
        return typestr
