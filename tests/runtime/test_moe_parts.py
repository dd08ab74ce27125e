"""Which functions of the library a layer of experts calls: all of them, or those of some parts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import pytest
from fakes.library import FakeLibrary

from w4a16gen import Epilogue, KernelConfig
from w4a16gen.kernels.arrangement import UNSORTED_TOKENS
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime.expert_calls import MoeOptions
from w4a16gen.runtime.expert_plan import MOE_PARTS
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.quantize import quantize

PLAIN = enumerate_space("experts")
GATED = with_epilogues(PLAIN, [Epilogue.NONE, Epilogue.GATED])
LARGE_TILES = [config for config in GATED if config.cta.tokens > UNSORTED_TOKENS]
FUNCTIONS = dict(
    zip(MOE_PARTS, ("route", "grouped_gemm", "activate_rows", "grouped_gemm", "combine_rows"), strict=True)
)


def called(configs: Sequence[KernelConfig], parts: Collection[str] | None, *, gated: bool) -> list[str]:
    """Return the functions that a layer calls on the way, in order."""
    library = FakeLibrary(configs)
    names: list[str] = []

    def called_by(name: str, *_: object) -> tuple[int, str]:
        names.append(name)
        return 0, ""

    for name in FUNCTIONS.values():
        setattr(library.bindings.library, name, partial(called_by, name))
    library.bindings.library.token_tiles_bytes = lambda *_: (0, "", 1024)

    def on_gpu(packed: PackedExperts) -> PackedExperts:
        data = library.to_device(packed.data)
        return PackedExperts(data, packed.layout, packed.n, packed.k, packed.group_size, packed.mode, packed.order)

    gate, down = ([quantize(np.eye(n, k), group_size=64)] * 2 for n, k in ((64, 128), (128, 64)))
    w13, w2 = on_gpu(pack_experts(gate, gate, gated=gated)), on_gpu(pack_experts(down))
    hidden = library.to_device(np.zeros((3, 128), np.float16))
    ids, weights = (library.to_device(np.zeros((3, 2), kind)) for kind in (np.int32, np.float32))
    if parts is None:
        library.moe(hidden, w13, w2, ids, weights)
    else:
        library.experts.moe(hidden, w13, w2, ids, weights, MoeOptions(), parts=parts)
    return names


@pytest.mark.parametrize(
    ("configs", "gated", "left_out"),
    [
        (PLAIN, False, {"routing"}),
        (PLAIN, True, {"routing"}),
        (GATED, True, {"routing", "activation"}),
        (GATED, False, {"routing"}),
        (LARGE_TILES, True, {"activation"}),
    ],
    ids=["plain", "plain, gated weights", "gated", "gated, plain weights", "gated with large tiles"],
)
def test_a_layer_is_its_parts_in_order(configs: Sequence[KernelConfig], gated: bool, left_out: set[str]) -> None:
    parts = [name for name in MOE_PARTS if name not in left_out]
    assert called(configs, None, gated=gated) == [FUNCTIONS[name] for name in parts]
    for name in MOE_PARTS:
        assert called(configs, [name], gated=gated) == ([FUNCTIONS[name]] if name in parts else [])
