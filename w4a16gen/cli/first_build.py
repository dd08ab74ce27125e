"""`run` and `bench` without a build: the default kernels are built first, so that two commands lead to a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from w4a16gen.cli.build import build_kernels, failed_status
from w4a16gen.cli.output import note
from w4a16gen.cli.services import services
from w4a16gen.errors import BuildError, NotBuiltError

if TYPE_CHECKING:
    from w4a16gen.runtime.library import Library


def load_or_build(folder: Path | None) -> Library:
    """Return the build; if nothing was ever built here and there is a Hopper GPU, build the default kernels first.

    A folder that the user named is never built into, and neither is one with a damaged build.

    Raises:
        NotBuiltError: if there is no build to load and none is made.
        NoHopperGpuError: if there is no build, and no GPU that needs one.
        BuildError: if a kernel does not compile.
    """
    try:
        return services().load(folder)
    except NotBuiltError:
        if folder is not None or not _is_first_build():
            raise
    from w4a16gen.kernels.spaces import Filter
    from w4a16gen.runtime.devices import first_hopper

    driver = services().find_driver()
    first_hopper(driver.gpus if driver else ())  # else minutes of building would end in this error
    note("no build found in ./build: the default kernels are built first")
    if failed_status(build_kernels(Filter(), (), Path("generated"), None, None)):
        raise BuildError("not every kernel compiled: run `w4a16gen build` again to see why")
    return services().load(None)


def _is_first_build() -> bool:
    """Whether there is no build at all, and no variable names another one."""
    from w4a16gen.runtime.artifact import MANIFEST
    from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE, folder_to_load

    return not os.environ.get(BUILD_FOLDER_VARIABLE) and not os.path.lexists(folder_to_load() / MANIFEST)
