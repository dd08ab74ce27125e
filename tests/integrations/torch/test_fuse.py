"""Layers that are fused: the same bits as the layers apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
linear = pytest.importorskip("w4a16gen.integrations.torch.linear")
fusing = pytest.importorskip("w4a16gen.integrations.torch.fuse")
K = 256
CS, FGS, FGSZ = QuantMode


def layer(rng: np.random.Generator, n: int, mode: QuantMode = FGS, **more: Any) -> Any:
    group_size = more.pop("group_size", 128 if mode.is_grouped else K)
    target = more.pop("target", "native")
    weight = random_weight(rng, n, more.pop("k", K), group_size, mode)
    return linear.W4A16Linear.from_packed(w4a16gen.pack_weight(weight, target=target), **more)


@pytest.mark.parametrize(
    ("sizes", "modes"),
    [
        ((128, 64, 64), (FGS, FGS, FGS)),
        ((128, 64, 24), (FGSZ, FGSZ, FGSZ)),
        ((64, 64), (CS, CS)),
        ((8, 24), (FGSZ, FGSZ)),
        ((72, 24), (CS, CS)),
        ((64, 64, 128), (FGS, FGSZ, FGS)),
    ],
)
@pytest.mark.parametrize("target", ["native", "cutlass"])
def test_a_fused_layer_computes_what_the_layers_compute(
    sizes: tuple[int, ...], modes: tuple[QuantMode, ...], target: str, rng: np.random.Generator
) -> None:
    biases = [rng.standard_normal(n).astype(np.float16) if n != 64 else None for n in sizes]
    order = rng.permutation(K)
    layers = [
        layer(rng, n, mode, bias=bias, permutation=order, alpha=0.5, target=target)
        for n, mode, bias in zip(sizes, modes, biases, strict=True)
    ]
    fused = fusing.fuse(layers)
    x = torch.from_numpy(rng.standard_normal((3, K)).astype(np.float16))
    assert torch.equal(fused(x), torch.cat([one(x) for one in layers], dim=-1))
    assert (fused.out_features, fused.layout) == (sum(sizes), layers[0].layout)


def test_a_fused_weight_is_packed_as_the_whole_weight_is(rng: np.random.Generator) -> None:
    whole = random_weight(rng, 192, K, 64, FGSZ)
    parts = [whole.channels(np.arange(start, end)) for start, end in ((0, 128), (128, 192))]
    fused = fusing.fuse([linear.W4A16Linear.from_packed(w4a16gen.pack_weight(part)) for part in parts])
    np.testing.assert_array_equal(fused.packed.numpy(), w4a16gen.pack_weight(whole).data)


def test_the_scales_and_counts_of_the_parts_are_kept(rng: np.random.Generator) -> None:
    parts = [layer(rng, 64), layer(rng, 64)]
    parts[0].activation_scale, parts[1].output_scale, parts[1].overflow = 4.0, 2.0, "check"
    fused = fusing.fuse(parts).eval()
    assert (fused.activation_scale, fused.output_scale, fused.overflow) == (4.0, 2.0, "check")
    assert fusing.fuse(parts[:1])(torch.ones(1, K)).shape == (1, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 512}, "layers with k of 256 and 512 cannot be fused"),
        ({"group_size": 64}, "layers with group_size of 128 and 64 cannot be fused"),
        ({"alpha": 2.0}, "layers with alpha of 1.0 and 2.0 cannot be fused"),
        ({"permutation": np.arange(K)[::-1].copy()}, "layers with different permutation cannot be fused"),
        ({"input_scale": np.ones(K)}, "layers with different input_scale cannot be fused"),
    ],
)
def test_layers_that_differ_are_refused(change: dict[str, Any], message: str, rng: np.random.Generator) -> None:
    with pytest.raises(InvalidValueError, match=message):
        fusing.fuse([layer(rng, 64), layer(rng, 64, **change)])


def test_other_modules_and_other_devices_are_refused(rng: np.random.Generator) -> None:
    for layers in ([], [torch.nn.Linear(8, 8)]):
        with pytest.raises(InvalidValueError, match="layers must be one or more W4A16Linear"):
            fusing.fuse(layers)
    with pytest.raises(InvalidValueError, match="layers on cpu and meta cannot be fused"):
        fusing.fuse([layer(rng, 64), layer(rng, 64).to("meta")])
    wrong: tuple[Any, ...] = (None, layer(rng, 64), iter([]))
    for nothing in wrong:
        with pytest.raises(InvalidValueError, match="layers must be one or more W4A16Linear"):
            fusing.fuse(nothing)


def test_layers_of_a_generator_are_fused(rng: np.random.Generator) -> None:
    parts = [layer(rng, 64), layer(rng, 64)]
    assert torch.equal(fusing.fuse(part for part in parts).packed, fusing.fuse(parts).packed)
