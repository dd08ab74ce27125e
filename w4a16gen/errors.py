"""The exceptions of this package. Each is at the top level too, and carries the exit code of the command line."""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING = 3


class W4A16Error(Exception):
    """Base of every error that this package raises; its text names the value, the rule and the way out."""

    exit_code: ClassVar[int] = EXIT_FAILED
    """The status that the command line exits with: a proof, a compilation, a check or a write failed."""


class InvalidValueError(W4A16Error, ValueError):
    """A value that the caller passed breaks a stated rule."""

    exit_code: ClassVar[int] = EXIT_USAGE


class UnsupportedProblemError(InvalidValueError):
    """The problem is well-formed, but this kernel, or every built kernel, cannot run it."""


class MissingToolError(W4A16Error):
    """A required program, header or library is not installed."""

    exit_code: ClassVar[int] = EXIT_MISSING


def missing_extra(package: str, extra: str) -> MissingToolError:
    """Return the error of a package that is not installed, with the extra that installs it.

    Args:
        package: the package's name.
        extra: the extra of this package that has it.
    """
    return MissingToolError(f"{package} is not installed, which this needs: pip install 'w4a16gen[{extra}]'")


class BuildError(W4A16Error):
    """Compiling or linking failed; the text names the kernels and their logs."""


class BuildLockedError(BuildError):
    """Another process is building in the same folder."""


class ClusterError(W4A16Error):
    """A Ray cluster cannot be reached, has no worker that can be used, or lost them all."""

    exit_code: ClassVar[int] = EXIT_MISSING


class NotBuiltError(W4A16Error):
    """There is no built library in the folder, or it does not match what was asked for."""

    exit_code: ClassVar[int] = EXIT_MISSING


class NoHopperGpuError(W4A16Error):
    """There is no CUDA GPU, or the one there is not of compute capability 9.0."""

    exit_code: ClassVar[int] = EXIT_MISSING


class CudaError(W4A16Error):
    """The CUDA runtime refused a call."""
