"""The native kernel's own index maps and dequantisation, run on the CPU, rebuild a packed weight."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from host_programs import compile_for_host

from w4a16gen import QuantMode, Target, pack_weight
from w4a16gen.weights.layouts.fragments import scale_exponents, unit_exponents
from w4a16gen.weights.reference import dequantized_half, random_weight


@pytest.fixture(scope="session")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the walk."""
    return compile_for_host("host_walk", tmp_path_factory.mktemp("walk"))


CASES = [
    (QuantMode.PER_COLUMN_SCALE_ONLY, 200),
    *((mode, group) for mode in list(QuantMode)[1:] for group in (32, 64, 96, 128, 192, 256, 384, 768)),
]


@pytest.mark.parametrize(("mode", "group"), CASES)
@pytest.mark.parametrize("size", [0.01, 2000.0])  # the layout divides scales from 1/32 on, or with zeros from 1024
def test_the_walk_rebuilds_the_weight(
    walker: Path, rng: np.random.Generator, mode: QuantMode, group: int, size: float
) -> None:
    k = 768 if mode.is_grouped else group
    weight = random_weight(rng, 136, k, group, mode, size=size)
    assert len(np.unique(weight.q)) == 16
    packed = pack_weight(weight, target=Target.NATIVE)
    arguments = [str(list(QuantMode).index(mode)), "136", str(k), str(group)]
    done = subprocess.run([walker, *arguments], input=packed.data.tobytes(), capture_output=True, check=True)  # noqa: S603
    walked = np.frombuffer(done.stdout, np.float16).reshape(192, -(-k // 128) * 128)
    assert np.array_equal(walked[:136, :k], dequantized_half(weight))
    assert not walked[136:].any(), "padding channels weigh nothing"
    if not mode.has_zeros:
        assert not walked[:, k:].any(), "nor does padding along k"


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_a_gated_weight_has_a_gate_and_its_factor_in_each_thread(
    walker: Path, rng: np.random.Generator, mode: QuantMode
) -> None:
    weight = random_weight(rng, 176, 256, 64 if mode.is_grouped else 256, mode)
    packed = pack_weight(weight, gated=True)
    arguments = [str(list(QuantMode).index(mode)), "176", "256", str(weight.group_size)]
    done = subprocess.run([walker, *arguments], input=packed.data.tobytes(), capture_output=True, check=True)  # noqa: S603
    walked = np.frombuffer(done.stdout, np.float16).reshape(192, 256)[:176].reshape(11, 2, 8, 256)
    gates, factors = np.split(dequantized_half(weight), 2)
    assert np.array_equal(walked[:, 0].reshape(88, 256), gates)
    assert np.array_equal(walked[:, 1].reshape(88, 256), factors)


def test_the_kernels_and_packing_agree_on_units_and_ranges(walker: Path) -> None:
    lines = subprocess.run([walker], capture_output=True, check=True, text=True).stdout.splitlines()  # noqa: S603
    for line, mode in zip(lines, list(QuantMode)[1:], strict=True):
        *units, largest = map(int, line.split())
        assert units == unit_exponents(16, mode).tolist()
        just_too_large = np.array([[2.0**largest]], np.float16)
        assert scale_exponents(just_too_large, mode).tolist() == [1]
        assert scale_exponents(just_too_large * np.float16(0.5), mode).tolist() == [0]
