"""Where builds are. Command-line completion asks this too, so nothing heavy is imported here.

A build that no argument names is looked for in this order:

1. the folder that W4A16GEN_BUILD_DIR names;
2. `build` in the current folder, if it belongs to the user;
3. the user's folder of builds, where `w4a16gen build --user` writes;
4. an installed wheel of kernels.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path

from w4a16gen.errors import NotBuiltError
from w4a16gen.runtime.artifact import (
    MANIFEST,
    WHEEL_PACKAGE,
    Build,
    ForeignBuildError,
    check_folder_owner,
    check_owner,
    load_build,
)

BUILD_FOLDER_VARIABLE = "W4A16GEN_BUILD_DIR"
CACHE_VARIABLE = "W4A16GEN_CACHE_DIR"
_LOCAL = Path("build")


def default_build_folder() -> Path:
    """Return the folder that builds go to: W4A16GEN_BUILD_DIR, or `build` in the current folder."""
    return Path(os.environ.get(BUILD_FOLDER_VARIABLE) or _LOCAL)


def user_build_folder() -> Path:
    """Return the user's folder of builds for this Python, in W4A16GEN_CACHE_DIR or the system's folder of caches."""
    cache = os.environ.get(CACHE_VARIABLE)
    if not cache:
        import platformdirs  # noqa: PLC0415 - needed only where ./build is missing

        cache = platformdirs.user_cache_dir("w4a16gen", appauthor=False)
    return Path(cache) / (sys.implementation.cache_tag or "python") / "build"


def installed_build_folder() -> Path | None:
    """Return the build in an installed wheel of kernels, or None if no such wheel is installed."""
    installed = importlib.util.find_spec(WHEEL_PACKAGE)
    if installed is None or installed.origin is None:
        return None
    return Path(installed.origin).parent / "build"


def folder_to_load() -> Path:
    """Return the folder that `load` reads, or `build` in the current folder if there is no build anywhere."""
    return next(iter(_folders()), _LOCAL)


def load_default_build() -> Build:
    """Read the build that is used where no folder is named.

    A folder that another user may have written, though nobody named it, is passed over with a warning if there is
    another build.

    Raises:
        NotBuiltError: if there is no usable build; or if the only one was named by nobody, and another user may have
            written it (see `check_owner`).
    """
    refused: ForeignBuildError | None = None
    for folder in _folders():
        if os.environ.get(BUILD_FOLDER_VARIABLE) or folder == installed_build_folder():
            return _chosen(load_build(folder), refused)
        try:
            check_folder_owner(folder)
            build = load_build(folder)
            check_owner(build)
        except ForeignBuildError as error:
            refused = refused or error
            continue
        return _chosen(build, refused)
    if refused is not None:
        raise refused
    return load_build(_LOCAL)


def _chosen(build: Build, refused: NotBuiltError | None) -> Build:
    if refused is not None:
        warnings.warn(f"{refused}. The build in {build.folder} is used instead", stacklevel=3)
    return build


def _folders() -> list[Path]:
    """Return the folders that hold a build, in the order in which they are used."""
    if os.environ.get(BUILD_FOLDER_VARIABLE):
        return [default_build_folder()]
    found = [folder for folder in (_LOCAL, user_build_folder()) if os.path.lexists(folder / MANIFEST)]
    installed = installed_build_folder()
    return [*found, installed] if installed is not None else found
