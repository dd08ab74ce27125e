"""The layers of the package: imports point one way, and single responsibilities stay single."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import w4a16gen

PACKAGE = Path(w4a16gen.__file__).parent
ORDER = [
    {"errors", "files", "driver", "contender"},
    {"config"},
    {"built", "legality", "problem", "toolchain"},
    {"space", "quantize", "dispatch", "arrays", "models"},
    {"render", "packing", "tuning", "rivals"},
    {"shipped", "comparison"},
    {"chooser"},
    {"compile", "trtllm", "audit"},
    {"build"},
    {"loaded"},
    {"module", "export"},
    {"api"},
    {"verify"},
    {"bench"},
    {"stage"},
    {"sweep"},
    {"bench_report", "tune"},
    {"cli", "__init__"},
    {"__main__"},
]
LAYER = {module: level for level, modules in enumerate(ORDER) for module in modules}


def imports() -> list[tuple[str, str]]:
    """Give every (importing, imported) pair of top-level modules of the package."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "w4a16gen":
                parts = (node.module or "").split(".")
                imported = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                found += [(importer, name) for name in imported if name != importer]
    return found


def test_imports_only_point_down() -> None:
    wrong = [(a, b) for a, b in imports() if b in LAYER and LAYER[b] >= LAYER[a] and a != "__init__"]
    assert wrong == []


def test_every_module_has_a_layer() -> None:
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert modules == LAYER.keys()


def test_one_module_owns_each_foreign_library() -> None:
    owners = {"jinja2": {"render"}, "click": {"cli"}, "rich": {"cli"}, "filelock": {"build", "tuning"}}
    for library, allowed in owners.items():
        users = {
            path.relative_to(PACKAGE).parts[0].removesuffix(".py")
            for path in PACKAGE.rglob("*.py")
            if f"import {library}" in path.read_text() or f"from {library}" in path.read_text()
        }
        assert users == allowed


def test_importing_the_package_needs_neither_torch_nor_a_gpu() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "import torch" not in path.read_text()


def test_importing_the_package_loads_nothing_that_only_building_needs() -> None:
    needed_to_build = ["jinja2", "pybind11", "click", "rich", "w4a16gen.compile", "w4a16gen.toolchain"]
    listed = f"import sys, w4a16gen; print([name for name in {needed_to_build} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)  # noqa: S603
    assert found.stdout == "[]\n"
