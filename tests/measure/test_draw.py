"""Layers and token counts drawn at random: the same for a seed, in range, spread as promised."""

from __future__ import annotations

from collections import Counter

import pytest

from w4a16gen import Problem, QuantMode
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.problem import why_cannot_run
from w4a16gen.measure.draw import MOST_WEIGHTS, draw_cells, real_layers

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNEL = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warpgroups4_persistent")
CELLS = draw_cells(600, 7, MODE)


def test_a_draw_depends_on_its_seed_alone_and_a_longer_one_begins_with_a_shorter_one() -> None:
    assert draw_cells(600, 7, MODE) == CELLS
    assert draw_cells(9, 7, MODE) == CELLS[:9]
    assert draw_cells(9, 8, MODE) != CELLS[:9]
    assert CELLS[1] == ("random", Problem(125, 9728, 1280, 128)), "the numbers of this seed never change"


def test_no_cell_comes_twice_and_each_can_run() -> None:
    assert len({problem for _, problem in CELLS}) == len(CELLS)
    for _, problem in CELLS:
        assert why_cannot_run(KERNEL, problem) is None
        assert 1 <= problem.m <= 8192
        assert problem.n * problem.k <= MOST_WEIGHTS
        assert problem.group_size == 128


def test_half_of_the_layers_are_real_and_the_others_are_multiples_of_64() -> None:
    real = {(n, k) for _, n, k in real_layers()}
    names = Counter("random" if name == "random" else "real" for name, _ in CELLS)
    assert names["real"] == pytest.approx(300, abs=20), "doublets of real layers are dropped"
    for name, problem in CELLS:
        if name == "random":
            assert all(1024 <= side <= 32_768 for side in (problem.n, problem.k))
            assert (problem.n % 64, problem.k % 128) == (0, 0)
        else:
            assert (problem.n, problem.k) in real
    assert any(problem.n % 128 for name, problem in CELLS if name == "random")


def test_token_counts_are_log_uniform() -> None:
    tokens = [problem.m for _, problem in CELLS]
    for least, most, share in ((1, 8, 0.25), (9, 90, 0.25), (91, 900, 0.25), (901, 8192, 0.25)):
        assert sum(least <= m <= most for m in tokens) / len(tokens) == pytest.approx(share, abs=0.06)


def test_per_column_mode_has_one_group() -> None:
    cells = draw_cells(20, 7, QuantMode.PER_COLUMN_SCALE_ONLY)
    assert all(problem.group_size == problem.k for _, problem in cells)
    assert [(problem.m, problem.n, problem.k) for _, problem in cells] == [
        (problem.m, problem.n, problem.k) for _, problem in CELLS[:20]
    ]


def test_real_layers_are_models_layers_each_shape_once() -> None:
    layers = real_layers()
    assert ("llama-3-8b qkv", 6144, 4096) in layers
    assert ("llama-3-70b gate_up / 8", 7168, 8192) in layers
    assert len({(n, k) for _, n, k in layers}) == len(layers) > 50
