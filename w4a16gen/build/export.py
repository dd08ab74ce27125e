"""A finished build for other programs: a prefix with libraries, headers and a CMake package, or a wheel."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.choose.choice_file import CHOICE_FILE, choice_text
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.files import write_all_if_changed, write_if_changed
from w4a16gen.kernels.render import render_text
from w4a16gen.runtime.artifact import LIBRARY, MANIFEST, WHEEL_PACKAGE, Build

_PACKAGE = Path(__file__).resolve().parents[1]
_WHEEL_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of every file in a wheel, so that the same build makes the same wheel."""
_OWN_LICENSE = "LICENSE"


def licenses(build: Build, *, with_module: bool) -> dict[str, tuple[str, str]]:
    """Return the licences of everything in a build's binaries: by file name, the SPDX expression and the text.

    Args:
        build: the build.
        with_module: whether the pybind11 module is passed on too.
    """
    own = next(
        path for path in (_PACKAGE / "licenses" / _OWN_LICENSE, _PACKAGE.parent / _OWN_LICENSE) if path.is_file()
    )
    found = {_OWN_LICENSE: ("Apache-2.0", own.read_text())}
    others = {"NVIDIA-CUDA-EULA.txt": "LicenseRef-NVIDIA-CUDA-EULA"}  # the static CUDA runtime
    if build.manifest.cutlass:
        others["CUTLASS.txt"] = "BSD-3-Clause"
    if with_module:
        others["pybind11.txt"] = "BSD-3-Clause"
    return found | {name: (spdx, (_PACKAGE / "licenses" / name).read_text()) for name, spdx in others.items()}


def _manifest_text(build: Build) -> str:
    """Return the manifest of an exported build, which has no sources beside it."""
    manifest = dataclasses.replace(build.manifest, sources=None)
    return json.dumps(manifest.as_json(), indent=2) + "\n"


def export_prefix(build: Build, prefix: Path, version: str) -> list[Path]:
    """Lay out lib/, include/, a CMake package, a pkg-config file and licences; none of it needs Python or CUTLASS.

    If a file cannot be made or filled, none is written.

    Args:
        build: the build.
        prefix: the folder, which is made.
        version: of this package.

    Returns:
        The files.

    Raises:
        OSError: if a file cannot be written.
    """
    name = LIBRARY.removeprefix("lib").removesuffix(".so")
    texts = {
        "include/w4a16.h": (CUDA_FOLDER / "w4a16.h").read_text(),
        **{f"include/w4a16/{header.name}": header.read_text() for header in sorted((CUDA_FOLDER / "sdk").glob("*.h"))},
        "lib/cmake/w4a16/w4a16-config.cmake": render_text(
            "export/w4a16-config.cmake.jinja", version=version, library=LIBRARY
        ),
        "lib/cmake/w4a16/w4a16-config-version.cmake": render_text(
            "export/w4a16-config-version.cmake.jinja", version=version
        ),
        "lib/pkgconfig/w4a16.pc": render_text("export/w4a16.pc.jinja", version=version, name=name),
        "share/w4a16/manifest.json": _manifest_text(build),
        CHOICE_FILE: choice_text(build.content_hashes, build.folder / TABLE),
    }
    for file, (_, text) in licenses(build, with_module=False).items():
        texts[f"share/licenses/w4a16/{file}"] = text
    library = prefix / "lib" / LIBRARY
    contents: dict[Path, str | bytes] = {
        library: build.library.read_bytes(),
        **{prefix / path: text for path, text in texts.items()},
    }
    write_all_if_changed(contents, modes={library: 0o777})
    return list(contents)


def export_wheel(build: Build, folder: Path, version: str) -> Path:
    """Write a wheel of the build, for this Python and platform; it needs no compiler and no CUDA to install.

    With it installed, `w4a16gen.gemm` and `w4a16gen.load()` find its kernels if there is no build in the current
    folder.

    Args:
        build: the build.
        folder: where the wheel goes.
        version: of this package, which the wheel requires.

    Returns:
        The wheel.

    Raises:
        OSError: if it cannot be written.
    """
    soabi = str(sysconfig.get_config_var("SOABI")).split("-")[1]  # 313t without the global interpreter lock
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"cp{soabi.removesuffix('t')}-cp{soabi}-{platform}"
    info = f"{WHEEL_PACKAGE}-{version}.dist-info"
    inside = f"{WHEEL_PACKAGE}/build"
    listed = licenses(build, with_module=True)
    metadata = render_text(
        "export/wheel_metadata.jinja",
        name=WHEEL_PACKAGE.replace("_", "-"),
        version=version,
        kernels=len(build.configs),
        license_expression=" AND ".join(dict.fromkeys(spdx for spdx, _ in listed.values())),
        license_files=list(listed),
    )
    files: dict[str, bytes] = {
        f"{WHEEL_PACKAGE}/__init__.py": render_text("export/wheel_init.py.jinja", version=version).encode(),
        f"{inside}/{MANIFEST}": _manifest_text(build).encode(),
        f"{inside}/{build.manifest.libraries}/{build.library.name}": build.library.read_bytes(),
        f"{inside}/{build.manifest.libraries}/{build.module.name}": build.module.read_bytes(),
        **{f"{info}/licenses/{name}": text.encode() for name, (_, text) in listed.items()},
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: w4a16gen\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
    }
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    path = folder / f"{WHEEL_PACKAGE}-{version}-{tag}.whl"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _WHEEL_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            wheel.writestr(entry, data)
    write_if_changed(path, content.getvalue())
    return path


def _record(files: Mapping[str, bytes], itself: str) -> bytes:
    """Return the list of a wheel's files with their hashes."""
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{itself},,", ""]).encode()
