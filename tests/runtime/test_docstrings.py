"""What an editor and `help` show: examples that run, arguments that are described, and public names only."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import w4a16gen

FUNCTIONS = [
    "configs",
    "gemm",
    "grouped_gemm",
    "list_rows",
    "load",
    "moe",
    "open_checkpoint",
    "open_packed",
    "pack",
    "pack_experts",
    "pack_weight",
    "quantize",
    "route_tokens",
    "to_device",
    "use_kernels",
]
CLASSES = ["PackedExperts", "PackedWeight", "QuantizedWeight"]
MODULES = [
    "",
    "runtime.default",
    "weights.division",
    "weights.experts",
    "weights.importers.checkpoint",
    "weights.importers.rounding",
    "weights.importers.words",
    "weights.packed",
    "weights.packed_checkpoint",
    "weights.quantize",
    "weights.quantized",
]


def callables() -> Iterator[tuple[str, Any]]:
    """Return every public function, and the methods of the classes that users call."""
    for name in FUNCTIONS:
        yield name, getattr(w4a16gen, name)
    for kind in ("Library", "PackedWeight", "QuantizedWeight"):
        for name, member in inspect.getmembers(getattr(w4a16gen, kind), callable):
            if not name.startswith("_"):
                yield f"{kind}.{name}", member


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module: str) -> None:
    loaded = importlib.import_module(f"w4a16gen.{module}".rstrip("."))
    result = doctest.testmod(loaded, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_every_public_function_and_value_has_an_example(name: str) -> None:
    assert ">>> " in inspect.cleandoc(getattr(w4a16gen, name).__doc__)


@pytest.mark.parametrize(("name", "function"), list(callables()))
def test_every_argument_is_described(name: str, function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert text, name
    parameters = [parameter for parameter in inspect.signature(function).parameters if parameter not in {"self", "cls"}]
    if len(parameters) > 1 and "see `w4a16gen." not in text:
        missing = [parameter for parameter in parameters if f"    {parameter}: " not in text]
        assert missing == [], f"{name} does not describe {missing}"


def test_completion_shows_public_names_only() -> None:
    assert sorted(dir(w4a16gen)) == sorted(w4a16gen.__all__)
    text = pydoc.plain(pydoc.render_doc(w4a16gen))
    assert text.index("gemm(activations, packed)") < text.index("PACKAGE CONTENTS")


def test_error_classes_are_at_the_top_level_with_their_exit_codes() -> None:
    codes = {name: getattr(w4a16gen, name).exit_code for name in w4a16gen.__all__ if name.endswith("Error")}
    assert codes == {
        "W4A16Error": 1,
        "BuildError": 1,
        "BuildLockedError": 1,
        "ClusterError": 3,
        "CudaError": 1,
        "InvalidValueError": 2,
        "UnsupportedProblemError": 2,
        "MissingToolError": 3,
        "NoHopperGpuError": 3,
        "NotBuiltError": 3,
    }


def test_importing_the_package_imports_no_numpy() -> None:
    program = "import sys, w4a16gen; print('numpy' in sys.modules); w4a16gen.quantize; print('numpy' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.split() == ["False", "True"]
