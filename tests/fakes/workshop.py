"""A workshop for builds with the stand-in compilers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from w4a16gen import KernelConfig
from w4a16gen.build.pipeline import BuildReport, build
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import load_build
from w4a16gen.runtime.library import Library

CONFIGS = enumerate_space("trtllm")[:4]
WEB_APP_MANIFEST = '{"name": "a web page", "start_url": "/"}'


@dataclass(frozen=True)
class Workshop:
    """A folder in which builds are made."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "build"

    @property
    def generated(self) -> Path:
        return self.root / "generated"

    @property
    def calls(self) -> Path:
        return self.root.with_name("calls")

    def build(self, configs: Sequence[KernelConfig] = CONFIGS[:1], jobs: int = 1) -> BuildReport:
        return build(configs, generated=self.generated, folder=self.folder, jobs=jobs)

    def built(self) -> list[KernelConfig]:
        """Load the build as a program does, and return its kernels."""
        return Library(load_build(self.folder)).configs()

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the workshop's folder."""
        return subprocess.run(  # noqa: S603
            [sys.executable, "-m", "w4a16gen", *arguments],
            cwd=self.root,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
