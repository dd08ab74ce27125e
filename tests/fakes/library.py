"""A build that exists only as a list of kernels, on a machine with GPUs made of host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from fakes.devices import H100
from fakes.module import FakeModule, Launched, compute
from w4a16gen import KernelConfig, Library
from w4a16gen.choose.chooser import Chooser
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.kernels.device import Device
from w4a16gen.runtime import bindings
from w4a16gen.runtime.artifact import MODULE, Build, BuiltKernel, Manifest

NOWHERE = Path("nowhere")
"""A folder that is not there."""


def manifest_of(configs: Iterable[KernelConfig]) -> Manifest:
    """Return the manifest of a build of these kernels."""
    kernels = tuple(BuiltKernel(config, f"hash of {config.name}", 1, 0.0, 0) for config in sorted(configs))
    names = tuple(kernel.config.name for kernel in kernels)
    return Manifest(
        compiler="a compiler",
        cuda_version=(13, 0),
        cutlass="4.2.0",
        link_digest="a link",
        libraries="lib-0123456789abcdef",
        library_sha256="a digest",
        module=MODULE,
        module_sha256="another digest",
        sources=None,
        asked=names,
        failed=(),
        kernels=kernels,
    )


def build_of(configs: Iterable[KernelConfig], folder: Path = NOWHERE) -> Build:
    """Return a build of these kernels, of which nothing is on disk."""
    return Build(folder, manifest_of(configs))


def chooser_of(configs: Iterable[KernelConfig], folder: Path = NOWHERE) -> Chooser:
    """Return the chooser among these kernels; the folder may hold a tuning table."""
    return Chooser(build_of(configs).content_hashes, folder / TABLE)


class FakeBuild(Build):
    """A build whose files are there as far as loading asks; what they hold is never read."""

    @property
    def library(self) -> Path:
        return Path(__file__)

    @property
    def module(self) -> Path:
        return Path(__file__)


class FakeLibrary(Library):
    """A library whose kernels compute the reference in host memory; all but the native module is the package's own."""

    module: FakeModule

    def __init__(
        self,
        configs: Iterable[KernelConfig],
        *,
        devices: Sequence[Device] = (H100,),
        folder: Path = NOWHERE,
        compute: Callable[[Launched], None] = compute,
    ) -> None:
        wanted = sorted(set(configs))
        module = FakeModule(wanted, devices)
        module.compute = compute
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bindings, "_import_module", lambda *_: module)
            super().__init__(FakeBuild(folder, manifest_of(wanted)))


def record(_launched: Launched) -> None:
    """Compute nothing: for arrays that are only described."""
