"""The commands that install what is missing, as they must be typed on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import site
import sys
import sysconfig
from pathlib import Path

_PACKAGE = "w4a16gen"
UNSET_NVCC = "unset W4A16GEN_NVCC"
_END_OF_NAME = re.compile(r"[^A-Za-z0-9._-]")


def _system_command(**by_manager: str) -> str:
    """Return the command of the first package manager that this machine has."""
    folders = (Path("/usr/bin"), Path("/bin"), Path("/sbin"))
    for manager, command in by_manager.items():
        if any((folder / manager.replace("_", "-")).exists() for folder in folders):
            return command
    return "use the system's package manager"


INSTALL_COMPILER = _system_command(
    apt_get="sudo apt-get install g++",
    dnf="sudo dnf install gcc-c++",
    pacman="sudo pacman -S gcc",
    zypper="sudo zypper install gcc-c++",
)
"""Installs g++."""


def install_python_headers() -> str:
    """Return the command that installs Python.h for the running Python."""
    version = ".".join(map(str, sys.version_info[:2]))
    return _system_command(
        apt_get=f"sudo apt-get install python{version}-dev",
        dnf=f"sudo dnf install python{version}-devel",
        pacman="sudo pacman -S python",
        zypper=f"sudo zypper install python{version.replace('.', '')}-devel",
    )


def install_compiler(major: int) -> str:
    """Return the command that installs one version of g++."""
    return _system_command(
        apt_get=f"sudo apt-get install g++-{major}",
        dnf=f"sudo dnf install gcc{major}-c++",
        pacman=f"sudo pacman -S gcc{major}",
        zypper=f"sudo zypper install gcc{major}-c++",
    )


def _requirements(extra: str | None) -> list[str]:
    """Return this package's requirements of an extra, or those that it always has, without their markers.

    What it takes from another extra of this package is left out.
    """
    try:
        listed = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pairs = [requirement.partition(";")[::2] for requirement in listed]
    found = []
    for text, marker in pairs:
        match = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if (match[1] if match else None) == extra and not text.startswith(f"{_PACKAGE}["):
            found.append(text.strip())
    return found


def requirement(name: str) -> str:
    """Return a package as this one requires it, for example `cmake>=3.25`; its bare name if it is not required."""
    known = (*_requirements(None), *_requirements("build"))
    return next((text for text in known if _END_OF_NAME.split(text)[0] == name), name)


def pip_install(*names: str) -> str:
    """Return the command that installs packages for the running Python.

    It names the interpreter, so that it does the right thing in a virtual environment, in conda and outside of both.
    Outside of both it adds `--user` if the folder of packages cannot be written or this package was installed so, and
    `--break-system-packages` where the distribution asks for it.
    """
    return _pip([requirement(name) for name in names])


def install_cuda() -> str:
    """Return the command that installs nvcc with its parts, in releases that fit each other."""
    return _pip(_requirements("cuda") or [f"{_PACKAGE}[cuda]"])


def replace_nvcc() -> str:
    """Return the command that gets another nvcc than the present one, which is too old or none at all."""
    return f"{UNSET_NVCC}; {install_cuda()}" if os.environ.get("W4A16GEN_NVCC") else install_cuda()


def _pip(requirements: list[str]) -> str:
    wanted = " ".join(map(shlex.quote, requirements))
    interpreter = shlex.quote(sys.executable or "python3")
    if not _has_pip():
        return f"uv pip install --python {interpreter} {wanted}"
    return f"{interpreter} -m pip install{pip_flags()} {wanted}"


def _has_pip() -> bool:
    """Return whether this Python has pip. A search for the module would make setuptools remove distutils."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pip_flags() -> str:
    """Return the flags that pip needs for the running Python."""
    is_apart = sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()
    if is_apart:
        return ""
    here = Path(__file__).resolve()
    for_user = here.is_relative_to(Path(site.getusersitepackages()).resolve())
    managed = (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").is_file()
    return (" --user" if for_user else "") + (" --break-system-packages" if managed else "")
