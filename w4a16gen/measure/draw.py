"""Layers and token counts drawn at random, so that a comparison is not one of the layers that kernels were tuned on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.models import MODELS

GROUP_SIZE = 128
CHANNEL_STEP = 64
LEAST_SIDE, MOST_SIDE = 1024, 32_768
"""Smallest and largest n and k of a random layer."""
MOST_WEIGHTS = 1 << 29
"""Weights of a layer. 20 copies of its results fit every Hopper card, and 8,192 tokens take some 15 ms."""
MOST_TOKENS = 8192
DIVISIONS = (1, 2, 4, 8)
"""GPUs that real layers are divided among."""


@cache
def real_layers() -> tuple[tuple[str, int, int], ...]:
    """Return name, n and k of the known models' layers on 1 to 8 GPUs, each shape once."""
    shapes: dict[tuple[int, int], str] = {}
    for name, model in MODELS.items():
        for gpus in DIVISIONS:
            try:
                layers = model.layers(gpus)
            except InvalidValueError:  # its heads cannot be divided
                continue
            for layer, n, k in layers:
                if k % GROUP_SIZE == 0 and n * k <= MOST_WEIGHTS:
                    shapes.setdefault((n, k), f"{name} {layer}" + (f" / {gpus}" if gpus > 1 else ""))
    return tuple((name, n, k) for (n, k), name in shapes.items())


def draw_cells(count: int, seed: int, mode: QuantMode) -> list[tuple[str, Problem]]:
    """Draw cells: a layer and a number of tokens each.

    Half of the layers are real models', the others have random sides, which are log-uniform multiples of 64 (n) and of
    the group size (k). Token counts are log-uniform. The cells depend on the seed and this package's version alone, not
    on the GPU, and a longer draw begins with the cells of a shorter one.

    Args:
        count: the cells.
        seed: of the draw.
        mode: the quantisation mode; per-column mode has one group.

    Returns:
        Each cell's layer, by name, and its problem. No problem comes twice.

    Example:
        >>> draw_cells(1, 0, QuantMode.FINEGRAINED_SCALE_ONLY)[0][1].group_size
        128
    """
    drawn: dict[Problem, str] = {}
    for name, problem in _endless(random.Random(seed), mode):  # noqa: S311  (nothing secret)
        drawn.setdefault(problem, name)
        if len(drawn) == count:
            break
    return [(name, problem) for problem, name in drawn.items()]


def _endless(source: random.Random, mode: QuantMode) -> Iterator[tuple[str, Problem]]:
    """Yield cells without end. Only `random` is asked: Python keeps its numbers from version to version."""
    while True:
        for is_real in (True, False):
            name, n, k = _real_layer(source) if is_real else _random_layer(source)
            m = int(_log_uniform(source, 1, MOST_TOKENS + 1))
            yield name, Problem(m, n, k, GROUP_SIZE if mode.is_grouped else k)


def _real_layer(source: random.Random) -> tuple[str, int, int]:
    layers = real_layers()
    return layers[int(source.random() * len(layers))]


def _random_layer(source: random.Random) -> tuple[str, int, int]:
    while True:
        n, k = _side(source, CHANNEL_STEP), _side(source, GROUP_SIZE)
        if n * k <= MOST_WEIGHTS:
            return "random", n, k


def _side(source: random.Random, step: int) -> int:
    return step * int(_log_uniform(source, LEAST_SIDE // step, MOST_SIDE // step + 1))


def _log_uniform(source: random.Random, least: int, end: int) -> float:
    """Return a number of [least, end), log-uniform; rounding never reaches the end."""
    return min(least * math.exp(source.random() * math.log(end / least)), math.nextafter(end, 0))
