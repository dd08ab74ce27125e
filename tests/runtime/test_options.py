"""The options of calls: signatures, defaults and classes of options say the same, and each option arrives as itself."""

from __future__ import annotations

import inspect
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.library import FakeLibrary

import w4a16gen
from w4a16gen import Library
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime import default
from w4a16gen.runtime.calls import GemmOptions
from w4a16gen.runtime.expert_calls import MoeOptions
from w4a16gen.runtime.experts import ExpertLauncher
from w4a16gen.weights.experts import pack_experts
from w4a16gen.weights.quantize import quantize

Options = type[GemmOptions] | type[MoeOptions]
INTERNAL = {"remembered"}
"""Options that no user passes."""
CALLS: list[tuple[str, Options]] = [("gemm", GemmOptions), ("grouped_gemm", GemmOptions), ("moe", MoeOptions)]
ON_BOTH = pytest.mark.parametrize("place", [w4a16gen, Library], ids=["package", "Library"])


def keywords(function: Any) -> dict[str, Any]:
    """Return the keyword arguments of a function with their defaults, in order."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


@ON_BOTH
@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_signatures_have_the_defaults_of_the_options(place: Any, name: str, kind: Options) -> None:
    found = keywords(getattr(place, name))
    wanted = {field.name: field.default for field in fields(kind) if field.name not in INTERNAL}
    assert found == {option: wanted[option] for option in found}
    if name != "grouped_gemm":  # which has no workspace and no residual
        assert list(found) == list(wanted)


@ON_BOTH
@pytest.mark.parametrize(("name", "kind"), CALLS[1:])
def test_each_option_arrives_under_its_name(
    place: Any, name: str, kind: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeLibrary(enumerate_space("default")[:1])
    monkeypatch.setattr(default, "library_in_use", lambda: library)
    seen: list[Any] = []
    monkeypatch.setattr(ExpertLauncher, name, lambda _self, *given: seen.append(given[-1]))
    function = getattr(w4a16gen if place is w4a16gen else library, name)
    named = {option: SimpleNamespace(name=option) for option in keywords(function)}
    weights = library.to_device(pack_experts([quantize(np.eye(32), group_size=32)]))
    operands = (None, weights, weights, None, None) if name == "moe" else (None, weights, None)
    function(*operands, **named)
    (options,) = seen
    assert isinstance(options, kind)
    assert {option: getattr(options, option) for option in named} == named
