"""Proofs of grouped kernels and layers of experts on a Hopper GPU: which problems and random routings they run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from w4a16gen.kernels.config import KernelConfig
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.library import Library
from w4a16gen.verify.expert_inputs import ExpertWeights, draw_ids
from w4a16gen.verify.expert_layers import LAYER, prove_layers
from w4a16gen.verify.grouped_products import PRODUCT, prove_products, prove_routing
from w4a16gen.verify.guards import GuardedGpu
from w4a16gen.verify.numeric import NumericProof

SHAPES = ((272, 768, 128), (208, 352, 32), (592, 192, 64))
"""Channels, K and group size of an expert."""
EXPERTS = (1, 7, 64)
LAYER_SIZES = ((256, 192, 64), (512, 352, 32))
"""Hidden size, intermediate size and group size of layers."""
RANDOM_SHAPE = (80, 96, 32)
"""Channels, K and group size of random routings."""
RANDOM_EXPERTS = (4, 32, 128, 512)
"""The most experts of a random routing; one of these is drawn."""
MOST_RANDOM_EXPERTS = max(RANDOM_EXPERTS)
REPORTED = 50
"""Random routings from one report of progress to the next."""


def prove_experts(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    *,
    device: int = 0,
    seed: int = 0,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    experts: Sequence[int] = EXPERTS,
    progress: Progress = no_progress,
) -> None:
    """Run grouped kernels on random routings, and layers of experts, and add the outcomes to the kernels' proofs.

    Args:
        library: the loaded build.
        proofs: the grouped kernels to run, with the proofs to add to.
        device: the GPU.
        seed: of the random numbers.
        shapes: channels, K and group size of the products.
        experts: numbers of experts.
        progress: called after the kernels of a mode have run a problem.
    """
    gpu = GuardedGpu(library, device)
    modes = sorted({config.mode for config in proofs})
    todo = list(itertools.product(modes, shapes, experts))
    layers = list(itertools.product(modes, LAYER_SIZES))
    for done, (mode, shape, count) in enumerate(todo, 1):
        rng = np.random.default_rng((seed, done))
        weights = ExpertWeights.draw(gpu, rng, mode, shape, count)
        for config in sorted(config for config in proofs if config.mode is mode):
            prove_products(gpu, config, proofs[config], weights, rng)
        progress(done, len(todo) + len(layers), f"{mode} {PRODUCT} n={shape[0]} k={shape[1]} experts={count}")
    for done, (mode, sizes) in enumerate(layers, len(todo) + 1):
        prove_layers(gpu, mode, sizes, proofs, np.random.default_rng((seed, done)))
        progress(done, len(todo) + len(layers), f"{mode} {LAYER} hidden={sizes[0]} intermediate={sizes[1]}")


def prove_random_routings(
    library: Library,
    proofs: Mapping[KernelConfig, NumericProof],
    count: int,
    *,
    device: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Run random grouped kernels on random routings of 1 to 512 experts, and add the outcomes to the kernels' proofs.

    Args:
        library: the loaded build.
        proofs: the grouped kernels to run, with the proofs to add to.
        count: routings.
        device: the GPU.
        seed: of the random numbers.
        progress: called after some routings.
    """
    gpu, rng, kernels = GuardedGpu(library, device), np.random.default_rng(seed), sorted(proofs)
    if not kernels:
        return
    modes = sorted({config.mode for config in kernels})
    weights = {mode: ExpertWeights.draw(gpu, rng, mode, RANDOM_SHAPE, MOST_RANDOM_EXPERTS) for mode in modes}
    for done in range(1, count + 1):
        config = kernels[int(rng.integers(len(kernels)))]
        experts = int(rng.integers(1, int(rng.choice(RANDOM_EXPERTS)) + 1))
        ids = draw_ids(rng, int(rng.integers(1, 41)), int(rng.integers(1, 9)), experts)
        given = weights[config.mode].first(experts)
        prove_routing(gpu, config, proofs[config], given, ids, rng, in_graph=(bool(rng.integers(2)),))
        if done % REPORTED == 0 or done == count:
            progress(done, count, f"random routings of {config.mode}")
