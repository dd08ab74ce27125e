"""A finished build for other programs: a prefix with libraries, headers and a CMake package, or a wheel."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

from w4a16gen.build.compile import CUDA_FOLDER
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.render import render_text
from w4a16gen.runtime.artifact import LIBRARY, MANIFEST, WHEEL_PACKAGE, Build

"""What the wheel installs; `load` looks for it where no build is in the current folder."""


_WHEEL_TIME = (1980, 1, 1, 0, 0, 0)
"""The same wheel for the same build: zip files hold times."""


def export_prefix(build: Build, prefix: Path, version: str) -> list[Path]:
    """Lay out lib/, include/, a CMake package and a pkg-config file; none of it needs Python or CUTLASS.

    Args:
        build: the build.
        prefix: the folder, which is made.
        version: of this package.

    Raises:
        OSError: if it cannot be written.
    """
    name = LIBRARY.removeprefix("lib").removesuffix(".so")
    texts = {
        "include/w4a16.h": (CUDA_FOLDER / "w4a16.h").read_text(),
        "include/w4a16/runner.h": (CUDA_FOLDER / "sdk" / "runner.h").read_text(),
        "lib/cmake/w4a16/w4a16-config.cmake": render_text(
            "export/w4a16-config.cmake.jinja", version=version, library=LIBRARY
        ),
        "lib/cmake/w4a16/w4a16-config-version.cmake": render_text(
            "export/w4a16-config-version.cmake.jinja", version=version
        ),
        "lib/pkgconfig/w4a16.pc": render_text("export/w4a16.pc.jinja", version=version, name=name),
        "share/w4a16/manifest.json": json.dumps(build.manifest, indent=2) + "\n",
    }
    for path, text in texts.items():
        write_if_changed(prefix / path, text)
    library = prefix / "lib" / LIBRARY
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_name(f".{LIBRARY}.new")
    shutil.copyfile(build.library, fresh)
    fresh.replace(library)
    return [prefix / path for path in ("lib/" + LIBRARY, *texts)]


def export_wheel(build: Build, folder: Path, version: str) -> Path:
    """Write a wheel that holds the build, for this Python and platform; it needs no compiler and no CUDA to install.

    With it installed, `w4a16gen.gemm` and `w4a16gen.load()` find its kernels wherever there is no build in the current
    folder.

    Args:
        build: the build.
        folder: where the wheel goes.
        version: of this package, which the wheel requires.

    Raises:
        OSError: if it cannot be written.
    """
    python = f"cp{sysconfig.get_config_var('py_version_nodot')}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"{python}-{python}-{platform}"
    info = f"{WHEEL_PACKAGE}-{version}.dist-info"
    inside = f"{WHEEL_PACKAGE}/build"
    files: dict[str, bytes] = {
        f"{WHEEL_PACKAGE}/__init__.py": render_text("export/wheel_init.py.jinja", version=version).encode(),
        f"{inside}/{MANIFEST}": (json.dumps(build.manifest, indent=2) + "\n").encode(),
        f"{inside}/lib/{build.library.name}": build.library.read_bytes(),
        f"{inside}/lib/{build.module.name}": build.module.read_bytes(),
        f"{info}/METADATA": render_text("export/wheel_metadata.jinja", name=WHEEL_PACKAGE, version=version).encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: w4a16gen\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
    }
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{WHEEL_PACKAGE}-{version}-{tag}.whl"
    fresh = path.with_name(f".{path.name}.new")
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _WHEEL_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content)
    fresh.replace(path)
    return path


def _record(files: Mapping[str, bytes], itself: str) -> bytes:
    """Give the list of a wheel's files with their hashes."""
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{itself},,", ""]).encode()
