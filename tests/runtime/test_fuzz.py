"""Odd calls of the whole public API: only documented errors are raised, and what succeeds is right in float64.

W4A16GEN_FUZZ_CALLS and W4A16GEN_FUZZ_SEED ask for more calls, or others.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.library import FakeLibrary
from fakes.module import Launched, compute
from fakes.odd_values import FORMS, odd_values, of_any_array
from fakes.public_calls import Arguments, Source, public_calls

import w4a16gen
from w4a16gen import Epilogue, Library
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime import default
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE

CALLS = int(os.environ.get("W4A16GEN_FUZZ_CALLS", "2500"))
SEED = int(os.environ.get("W4A16GEN_FUZZ_SEED", "20261128"))
LEAST_CALLS = 2000
SECONDS = 120 * max(1, CALLS / 2500)
"""The time box. The test fails if fewer than LEAST_CALLS fit in."""


def compute_quietly(launched: Launched) -> None:
    """Compute as a GPU does, which warns of nothing."""
    with np.errstate(all="ignore"):
        compute(launched)


@pytest.fixture
def gpu() -> Library:
    """Return a library on a machine whose GPU is made of host memory."""
    kernels = [*with_epilogues(enumerate_space("default"), list(Epilogue)), *enumerate_space("trtllm")]
    kernels += with_epilogues(enumerate_space("experts"), [Epilogue.NONE, Epilogue.GATED])
    return FakeLibrary(kernels, compute=compute_quietly)


def made_odd(arguments: Arguments, rng: np.random.Generator, pool: list[Any]) -> Arguments:
    """Replace some arguments by odd values, or by odd forms of themselves."""
    result = dict(arguments)
    for name, value in arguments.items():
        turn = rng.integers(6)
        if turn == 0:
            result[name] = pool[int(rng.integers(len(pool)))]
        elif turn == 1 and isinstance(value, np.ndarray):
            result[name] = of_any_array(value, int(rng.integers(FORMS)))
        elif turn == 2 and isinstance(value, np.ndarray) and value.size:
            changed = value.copy()
            values = (np.nan, np.inf, -np.inf, 65504, 0) if changed.dtype.kind == "f" else (16, 255, 0)
            changed.flat[int(rng.integers(changed.size))] = values[int(rng.integers(len(values)))]
            result[name] = changed
    return result


def described(name: str, arguments: Arguments) -> str:
    """Return a call as text, for the message of a failure."""

    def text(value: Any) -> str:
        try:
            return f"{type(value).__name__} {value!r:.60}"
        except RuntimeError:
            return type(value).__name__

    return f"{name}({', '.join(f'{key}={text(value)}' for key, value in arguments.items())})"


def test_every_public_name_is_called(fake_library: Library, gpu: Library) -> None:
    names = {name.partition(".")[0] for name in public_calls(fake_library, gpu)}
    others = {name for name in w4a16gen.__all__ if name.endswith("Error")} | {"__version__"}
    assert names | others == set(w4a16gen.__all__)


def test_odd_calls_raise_documented_errors_and_give_no_wrong_number(
    fake_library: Library, gpu: Library, fake_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    monkeypatch.setattr(default, "_InUse", type("InUse", (), {"library": None}))
    rng, pool = np.random.default_rng(SEED), odd_values()
    calls = public_calls(fake_library, gpu)
    names = [
        *calls,
        *["gemm", "Library.gemm on a GPU", "moe", "Library.moe on a GPU", "pack", "quantize", "QuantizedWeight"] * 6,
    ]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    deadline = time.monotonic() + SECONDS
    for _ in range(CALLS):
        if time.monotonic() > deadline:
            break
        name = names[int(rng.integers(len(names)))]
        function, make, check, documented = calls[name]
        arguments = made_odd(make(Source(rng, tmp_path)), rng, pool)
        try:
            result = function(**arguments)
        except documented as error:
            outcomes["refused"] += 1
            if not str(error):
                failures.append(f"{described(name, arguments)}: no text")
        except Exception as error:  # noqa: BLE001  (what the test is about)
            failures.append(f"{described(name, arguments)}: {type(error).__name__}: {error}")
        else:
            outcomes["succeeded"] += 1
            try:
                with np.errstate(all="ignore"):
                    check(arguments, result)
            except Exception as error:  # noqa: BLE001  (what the test is about)
                failures.append(f"{described(name, arguments)}: wrong: {type(error).__name__}: {error!s:.300}")
    assert failures == [], "\n".join(failures)
    assert sum(outcomes.values()) >= min(LEAST_CALLS, CALLS)
    assert min(outcomes["refused"], outcomes["succeeded"]) > sum(outcomes.values()) // 5, "both kinds are tried"
