"""Which kernels the user named for calls that name none: a block of `use_kernels`, or an environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import KernelConfig

KERNELS_VARIABLE = "W4A16GEN_KERNELS"
"""Names of kernels, separated by commas, that calls use which name none."""
_used: ContextVar[tuple[KernelConfig, ...] | None] = ContextVar("kernels of use_kernels", default=None)


@contextmanager
def use_kernels(*kernels: KernelConfig | str) -> Iterator[None]:
    """Make calls of `gemm` use these kernels unless they name one, each for weights of its mode and target.

    Holds in the thread, or the asynchronous task, that enters it, and takes precedence over the environment variable
    W4A16GEN_KERNELS, which does the same for a whole process and is read once, when it is first needed. Without
    arguments, calls choose as if neither was there.
    Weights that none of them reads get a chosen kernel as ever; a problem that the named kernel cannot run is an error.

    Args:
        kernels: configurations or their names; of several for one mode and target, the first counts.

    Raises:
        InvalidValueError: if a text is no kernel's name.
    """
    token = _used.set(tuple(KernelConfig.parse(kernel) if isinstance(kernel, str) else kernel for kernel in kernels))
    try:
        yield
    finally:
        _used.reset(token)


def kernels_in_use() -> tuple[KernelConfig, ...]:
    """Give the kernels that `use_kernels`, or else the environment, names for calls that name none.

    Raises:
        InvalidValueError: if the environment variable holds anything but kernels' names.
    """
    used = _used.get()
    return kernels_of_environment() if used is None else used


def is_in_block() -> bool:
    """Whether `use_kernels` holds here."""
    return _used.get() is not None


@cache
def kernels_of_environment() -> tuple[KernelConfig, ...]:
    """Give the kernels that the environment named when this was first asked: `os.environ` takes longer than a launch.

    Raises:
        InvalidValueError: if the variable holds anything but kernels' names.
    """
    text = os.environ.get(KERNELS_VARIABLE, "")
    try:
        return tuple(KernelConfig.parse(name.strip()) for name in text.split(",") if name.strip())
    except InvalidValueError as error:
        raise InvalidValueError(f"{KERNELS_VARIABLE}: {error}") from None
