"""Random cells on a GPU: data drawn there are packed, multiplied and checked, and times are those of `bench`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from w4a16gen import Library, Problem, QuantMode
from w4a16gen.measure.cell import CellOptions, time_cell
from w4a16gen.measure.compare import compare
from w4a16gen.measure.drawn_workload import DrawnWorkload
from w4a16gen.measure.random_bench import RandomDraw, run_random_bench
from w4a16gen.measure.rivals import CUBLAS
from w4a16gen.progress import no_progress

pytestmark = pytest.mark.gpu
MODE = QuantMode.FINEGRAINED_SCALE_ONLY


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="data are drawn by torch, which is not installed")


@pytest.mark.parametrize("mode", list(QuantMode), ids=str)
@pytest.mark.parametrize("m", [1, 200, 5000])
def test_kernels_multiply_by_what_was_drawn(gpu_library: Library, torch: Any, mode: QuantMode, m: int) -> None:
    gpu = gpu_library.hopper_device()
    problem = Problem(m, 4160, 4096, 128 if mode.is_grouped else 4096)
    stage = DrawnWorkload(torch, gpu_library, gpu.index, problem, mode)
    found = time_cell(stage, torch, gpu_library, gpu, CellOptions(1, 2))
    assert found.error_over_bound
    assert all(error <= 1 for error in found.error_over_bound.values())
    assert found.timing(CUBLAS) is not None
    assert found.timing(found.chosen) is not None


@pytest.mark.parametrize("m", [16, 4096])
def test_times_are_those_of_bench(gpu_library: Library, torch: Any, m: int) -> None:
    gpu, problem = gpu_library.hopper_device(), Problem(m, 4096, 4096, 128)
    stage = DrawnWorkload(torch, gpu_library, gpu.index, problem, MODE)
    drawn = time_cell(stage, torch, gpu_library, gpu, CellOptions())
    usual = compare(gpu_library, problem, MODE, rounds=3)
    assert drawn.best.median == pytest.approx(usual.best.median, rel=0.1)
    for name in (drawn.chosen, CUBLAS):
        first, second = drawn.timing(name), usual.timing(name)
        assert first is not None
        assert second is not None
        assert first.median == pytest.approx(second.median, rel=0.1)


def test_a_draw_runs_to_its_end(gpu_library: Library, torch: Any, tmp_path: Path) -> None:
    del torch
    done = run_random_bench(
        gpu_library,
        RandomDraw(4, 3, MODE),
        CellOptions(1, 2),
        version="0",
        report=tmp_path,
        tell=print,
        show_progress=lambda *_, **__: nullcontext(no_progress),
    )
    assert done.left_out == 0
    assert done.wrong == {}
    assert done.bands[-1].call is not None
