"""The kernels that a user sets for calls without `config=`: by `use_kernels`, or by an environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import KernelConfig

KERNELS_VARIABLE = "W4A16GEN_KERNELS"
"""Names of kernels, separated by commas: the default kernels of calls without `config=`."""
_used: ContextVar[tuple[KernelConfig, ...] | None] = ContextVar("kernels of use_kernels", default=None)


@contextmanager
def use_kernels(*kernels: KernelConfig | str) -> Iterator[None]:
    """Set the default kernels for calls of `gemm` without `config=`.

    Each kernel applies to weights of its mode and target, and to calls that need its epilogue; of several for one mode,
    target and epilogue, the first counts. Other calls get a chosen kernel. A problem that the kernel cannot run is an
    error.

    The block applies to the thread, or the asynchronous task, that enters it. It takes precedence over the environment
    variable W4A16GEN_KERNELS, which does the same for a whole process and is read once, at the first call. A block
    without kernels switches both off.

    Args:
        kernels: configurations or their names.

    Raises:
        InvalidValueError: if a value is neither a configuration nor a kernel's name, or a grouped kernel.

    Example:
        >>> with use_kernels("w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent"):
        ...     c = gemm(a, w)
    """
    token = _used.set(tuple(of_gemm(KernelConfig.of(kernel)) for kernel in kernels))
    try:
        yield
    finally:
        _used.reset(token)


def kernels_in_use() -> tuple[KernelConfig, ...]:
    """Return the kernels that `use_kernels`, or else the environment, sets for calls without `config=`.

    Raises:
        InvalidValueError: if the environment variable is needed and holds anything but names of kernels.
    """
    used = _used.get()
    return kernels_of_environment() if used is None else used


def is_in_block() -> bool:
    """Return whether the caller is in a block of `use_kernels`."""
    return _used.get() is not None


@cache
def kernels_of_environment() -> tuple[KernelConfig, ...]:
    """Return the kernels that the environment sets.

    The variable is read once per process, because `os.environ` takes longer than a launch.

    Raises:
        InvalidValueError: if the variable holds anything but names of kernels.
    """
    text = os.environ.get(KERNELS_VARIABLE, "")
    try:
        return tuple(of_gemm(KernelConfig.parse(name.strip())) for name in text.split(",") if name.strip())
    except InvalidValueError as error:
        raise InvalidValueError(f"{KERNELS_VARIABLE}: {error}") from None


def of_gemm(kernel: KernelConfig) -> KernelConfig:
    """Return a kernel of `gemm`.

    Raises:
        InvalidValueError: if it is a grouped one.
    """
    if kernel.is_grouped:
        raise InvalidValueError(f"{kernel.name} computes grouped products: name it in the call of grouped_gemm")
    return kernel
