"""The numpy code of the guide on GPTQ and AWQ gives the weights that the formats mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from paths import ROOT

from docs.checkpoints import expected_weight, parts, tensors
from docs.pages import blocks_of

PAGE = ROOT / "docs" / "guides" / "gptq-awq.md"
LARGEST_ROUNDING = 0.0035 * 0.02
"""Of (8 - zero point) * scale to fp16, in scales of 0.02."""


def run(heading: str, given: str) -> dict[str, Any]:
    """Run the blocks of one section, after those that stand before all sections."""
    lines = PAGE.read_text().splitlines()
    start = lines.index(heading) + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("#")), len(lines))
    before = lines.index("## GPTQ")
    scope: dict[str, Any] = {}
    for block in blocks_of(PAGE):
        if block.line < before and not block.given_name:
            exec(block.text, scope)  # noqa: S102
    scope |= tensors(given)
    for block in blocks_of(PAGE):
        if start < block.line < end and not block.is_output:
            exec(block.text, scope)  # noqa: S102
    return scope


def test_gptq_weights() -> None:
    weight = run("## GPTQ", "gptq")["packed"].unpack()
    np.testing.assert_array_equal(weight.q, parts()["q"])
    np.testing.assert_allclose(weight.dequantize(), expected_weight(zero_points=True), atol=LARGEST_ROUNDING)


def test_gptq_weights_with_act_order_and_their_activations() -> None:
    scope = run("## GPTQ", "gptq")
    page = [block.text for block in blocks_of(PAGE) if "argsort" in block.text]
    exec(page[0], scope)  # noqa: S102
    expected = parts()["a"].astype(np.float64) @ expected_weight(zero_points=True, g_idx=parts()["g_idx"]).T
    np.testing.assert_allclose(scope["c"].astype(np.float64), expected, atol=0.02)
    unsorted = scope["w4a16gen"].gemm(parts()["a"], scope["w4a16gen"].pack(scope["q"], scope["scales"]))
    assert np.abs(unsorted.astype(np.float64) - expected).max() > 0.1


def test_awq_weights() -> None:
    weight = run("## AWQ", "awq")["packed"].unpack()
    np.testing.assert_array_equal(weight.q, parts()["q"])
    np.testing.assert_allclose(weight.dequantize(), expected_weight(zero_points=True), atol=LARGEST_ROUNDING)


def test_compressed_tensors_weights() -> None:
    weight = run("## compressed-tensors", "compressed-tensors")["packed"].unpack()
    np.testing.assert_array_equal(weight.dequantize(), expected_weight(zero_points=False))
