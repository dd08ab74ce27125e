"""Other makers' kernels in `bench`: what they are given, checked without torch by stand-ins that multiply in numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from w4a16gen import Problem, QuantMode
from w4a16gen.measure import compare as sweep
from w4a16gen.measure.results import Comparison, Timing
from w4a16gen.measure.rivals import BF16_NAMES, CUBLAS, RIVAL_NAMES, RIVALS, Rival, relative_error
from w4a16gen.measure.timing import Contender
from w4a16gen.weights.importers.gptq import gptq_words
from w4a16gen.weights.quantize import quantize
from w4a16gen.weights.quantized import QuantizedWeight

SYMMETRIC = QuantMode.FINEGRAINED_SCALE_ONLY


def a_weight(k: int = 256, group_size: int = 128) -> QuantizedWeight:
    return quantize(np.random.default_rng(3).standard_normal((64, k)), group_size=group_size)


def test_gptq_words_hold_eight_values_the_first_lowest() -> None:
    q = np.random.default_rng(1).integers(0, 16, (24, 5), dtype=np.uint8)
    words = gptq_words(q, 0)
    assert words.dtype.name == "int32"
    assert words.shape == (3, 5)
    for place in range(24):
        assert (words.view(np.uint32)[place // 8] >> 4 * (place % 8) & 15 == q[place]).all()
    across = gptq_words(q.T.copy(), 1)
    assert (across == words.T).all()
    assert across.flags.c_contiguous


def test_a_right_result_passes_and_each_kind_of_mistake_does_not() -> None:
    weight = a_weight()
    a = np.random.default_rng(2).standard_normal((8, 256)).astype(np.float16)
    exact = a.astype(np.float64) @ weight.dequantize().T

    def error(dense: Any) -> float:
        return relative_error((a @ dense.T).astype(np.float16), exact)

    right = weight.dequantize()
    shifted = right + weight.scales.repeat(128, axis=0).T
    swapped = right.reshape(64, -1, 2)[..., ::-1].reshape(64, 256)
    halves = np.roll(right, 128, axis=1)
    allowed = [rival.largest_error for rival in RIVALS]
    assert error(right) < min(allowed) / 4
    for wrong in (shifted, swapped, halves, right * 1.1, np.zeros_like(right)):
        assert error(wrong) > 2 * max(allowed)


def test_rivals_that_multiply_in_bf16_are_named_so() -> None:
    assert {rival.name for rival in RIVALS if rival.name.endswith("_bf16")} == BF16_NAMES
    assert BF16_NAMES < RIVAL_NAMES


def test_only_rivals_with_right_results_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[str, float | Exception] = {
        "right": 0.5,
        "wrong": 7.0,
        "nan": float("nan"),
        "missing": ImportError("No module named 'missing'"),
        "broken": RuntimeError("no kernel\nfor this"),
    }
    contender = Contender(lambda: None, lambda: 1.0, 20)

    def record_rival(_torch: Any, rival: Rival) -> tuple[Contender, float]:
        outcome = outcomes[rival.name]
        if isinstance(outcome, Exception):
            raise outcome
        return contender, outcome

    stage: Any = SimpleNamespace(record_cublas=lambda _torch: contender, record_rival=record_rival)
    asked = [Rival(name, f"{name}-kernels", "float16", 0.01, lambda *_: []) for name in outcomes]
    monkeypatch.setattr(sweep, "find_torch", SimpleNamespace)
    contenders: dict[sweep.Entrant, Contender] = {}
    errors: dict[str, float] = {}
    left_out = sweep.record_others(stage, asked, contenders, errors)
    assert contenders.keys() == {(CUBLAS, False), ("right", False)}
    assert errors == {"right": 0.5}
    assert left_out == {
        "wrong": "its error is 7 times what rounding explains",
        "nan": "its error is nan times what rounding explains",
        "missing": "No module named 'missing': pip install missing-kernels",
        "broken": "RuntimeError: no kernel for this",
    }
    monkeypatch.setattr(sweep, "find_torch", lambda: None)
    contenders.clear()
    assert sweep.record_others(stage, asked[:1], contenders, errors) == {"right": "torch is not installed"}
    assert not contenders


def test_a_rival_is_never_taken_for_one_of_our_kernels() -> None:
    first, second, *_ = (rival.name for rival in RIVALS)
    timings = [Timing(second, [1.0]), Timing(first, [2.0]), Timing(CUBLAS, [3.0]), Timing("a", [4.0])]
    found = Comparison(Problem(1, 64, 64, 64), SYMMETRIC, {"a": 4.0}, 0, timings, {}, "a")
    assert found.best.contender == "a"
    assert found.best_rival is not None
    assert found.best_rival.contender == second
    assert found.timing(found.chosen) == timings[3]
    assert found.timing(None) is None
