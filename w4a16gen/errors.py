"""The exceptions that users of the library and the command line meet."""

from __future__ import annotations


class W4A16Error(Exception):
    """Base of every error that this package raises on purpose; its text names value, rule and way out."""


class InvalidValueError(W4A16Error, ValueError):
    """A value that the caller passed breaks a stated rule."""


class UnsupportedProblemError(InvalidValueError):
    """The problem is well-formed, but this kernel, or every built kernel, cannot run it."""


class MissingToolError(W4A16Error):
    """Something that has to be installed is not there."""


class BuildError(W4A16Error):
    """Compiling or linking failed; the text names the kernels and their logs."""


class BuildLockedError(BuildError):
    """Another process is building in the same folder."""


class NotBuiltError(W4A16Error):
    """There is no built library in the folder, or it does not match what was asked for."""


class NoHopperGpuError(W4A16Error):
    """There is no CUDA GPU, or the one there is not of compute capability 9.0."""


class CudaError(W4A16Error):
    """The CUDA runtime refused a call."""
