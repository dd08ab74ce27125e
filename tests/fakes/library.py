"""A build that exists only as a list of kernels, on a machine with GPUs that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fakes.devices import H100
from w4a16gen import KernelConfig, Library, Problem
from w4a16gen.choose.chooser import Chooser
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import why_cannot_run
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


class FakeLibrary(Library):
    """A library without any machine code: it lists its kernels and chooses among them."""

    def __init__(
        self, configs: Iterable[KernelConfig], *, devices: Sequence[Device] = (H100,), folder: Path = NOWHERE
    ) -> None:
        self.build = build_of(configs, folder)
        self.chooser = chooser_of(self.build.configs, folder)
        self.found = list(devices)

    def configs(self) -> list[KernelConfig]:
        return self.build.configs

    def index_of(self, config: KernelConfig | str) -> int:
        try:
            return self.build.configs.index(KernelConfig.of(config))
        except ValueError:
            raise NotBuiltError(f"{config} is not in {self.build.folder}") from None

    def why_cannot_run(self, config: KernelConfig | str, problem: Problem) -> str | None:
        self.index_of(config)
        return why_cannot_run(KernelConfig.of(config), problem)

    def devices(self) -> list[Device]:
        return self.found
