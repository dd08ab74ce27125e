"""The rooms of the package: who may import whom, that no room holds a cycle, and who owns each foreign library."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import w4a16gen

PACKAGE = Path(w4a16gen.__file__).parent
EVERYBODYS = {"errors", "files", "progress", "wording"}
ALLOWED = {
    "kernels": set(),
    "weights": {"kernels"},
    "choose": {"kernels"},
    "runtime": {"kernels", "weights", "choose"},
    "executors": set(),
    "build": {"kernels", "executors", "runtime.artifact", "choose.choice_file", "choose.timing_table"},
    "inspection": {"kernels", "weights", "choose"},
    "measure": {"kernels", "weights", "choose", "runtime", "executors"},
    "verify": {"kernels", "weights", "runtime", "build.toolchain"},
    "integrations": {"kernels", "weights", "runtime"},
}
"""Who may import whom: a room, or one module of it. `cli` may import everything, and nobody imports `cli`."""
OWNERS = {
    "jinja2": {"kernels.render"},
    "click": {"cli"},
    "rich": {"cli"},
    "filelock": {"build", "choose"},
    "pybind11": {"build"},
    "psutil": {"build"},
    "ray": {"executors.cluster"},
    "matplotlib": {"measure.plots"},
    "torch": {
        "measure.rivals",
        *(f"integrations.{name}" for name in ("torch", "engines", "vllm", "sglang", "gptqmodel", "transformers")),
    },
    "vllm": {"integrations.vllm"},
    "sglang": {"integrations.sglang"},
    "gptqmodel": {"integrations.gptqmodel"},
    "transformers": {"integrations.transformers"},
    "gguf": {"integrations.transformers.packages"},
    "cuda": {"build.toolchain"},
    "platformdirs": {"runtime.folders"},
}
"""The rooms, or the modules, that may import a foreign library."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            module = node.module or ""
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if name.removeprefix("w4a16gen.") in MODULES}
            found |= known or {module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def edges() -> list[tuple[str, str]]:
    """Return (importing, imported) for all modules of the package."""
    return [
        (name, imported.removeprefix("w4a16gen."))
        for name, path in MODULES.items()
        for imported in imports(path)
        if imported.startswith("w4a16gen.")
    ]


def room(name: str) -> str:
    return name.partition(".")[0]


def is_allowed(importing: str, imported: str) -> bool:
    here, there = room(importing), room(imported)
    if here == there or there in EVERYBODYS or here in {"cli", "__init__", "__main__"}:
        return True
    return any(imported == allowed or imported.startswith(f"{allowed}.") for allowed in ALLOWED[here])


def test_imports_follow_the_allowed_edges() -> None:
    assert [edge for edge in edges() if not is_allowed(*edge)] == []


def test_nobody_imports_the_command_line() -> None:
    assert [edge for edge in edges() if room(edge[1]) == "cli" and room(edge[0]) not in {"cli", "__main__"}] == []


def test_every_module_is_in_a_room() -> None:
    alone = {name for name in MODULES if "." not in name and (PACKAGE / f"{name}.py").is_file()}
    assert alone == EVERYBODYS | {"__init__", "__main__"}
    assert {room(name) for name in MODULES} - alone == ALLOWED.keys() | {"cli"}


def test_no_imports_go_in_circles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for importing, imported in edges():
        graph[importing].add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("library", OWNERS)
def test_foreign_libraries_have_owners(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(room(found) == library for found in imports(path))}
    strangers = {
        name for name in users if not any(name == owner or name.startswith(f"{owner}.") for owner in OWNERS[library])
    }
    assert strangers == set()


def test_calling_a_build_imports_nothing_that_makes_one() -> None:
    command = (
        "import sys, w4a16gen; w4a16gen.gemm; "
        "print([name for name in sys.modules if name.split('.')[0] in ('jinja2', 'click', 'rich', 'pybind11', 'psutil')"
        " or name.startswith(('w4a16gen.build', 'w4a16gen.measure', 'w4a16gen.verify', 'w4a16gen.integrations'))])"
    )
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.strip() == "[]"
