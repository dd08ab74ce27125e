"""The folder of the default build. Command-line completion asks this too, so nothing heavy is imported here."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from w4a16gen.runtime.artifact import MANIFEST, WHEEL_PACKAGE, Build, check_owner, load_build

BUILD_FOLDER_VARIABLE = "W4A16GEN_BUILD_DIR"


def default_build_folder() -> Path:
    """Return the folder that builds go to: W4A16GEN_BUILD_DIR, or `build` in the current folder."""
    return Path(os.environ.get(BUILD_FOLDER_VARIABLE) or "build")


def installed_build_folder() -> Path | None:
    """Return the build in an installed wheel of kernels, or None if no such wheel is installed."""
    installed = importlib.util.find_spec(WHEEL_PACKAGE)
    if installed is None or installed.origin is None:
        return None
    return Path(installed.origin).parent / "build"


def folder_to_load() -> Path:
    """Return the folder that `load` reads: the default folder, or the installed wheel's if that has no build."""
    folder = default_build_folder()
    if os.environ.get(BUILD_FOLDER_VARIABLE) or (folder / MANIFEST).exists():
        return folder
    return installed_build_folder() or folder


def load_default_build() -> Build:
    """Read the build that is used where no folder is named.

    Raises:
        NotBuiltError: if there is no usable build; or if it was found in the current folder, named by nobody, and
            another user may have written it (see `check_owner`).
    """
    folder = folder_to_load()
    build = load_build(folder)
    if folder == Path("build") and not os.environ.get(BUILD_FOLDER_VARIABLE):
        check_owner(build)
    return build
