"""The C interface of mixtures of experts: what it refuses before any launch, and the module's calls of it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from c_structures import (
    CActivateArguments,
    CCombineArguments,
    CExperts,
    CGatherArguments,
    CGemmArguments,
    CIds,
    CKernelInfo,
    CListingArguments,
    CProblem,
    CRouteArguments,
)
from emulated_experts import EmulatedExperts, Ints, at, build_experts, entries
from emulation import aligned

from w4a16gen import KernelConfig, Library, QuantMode
from w4a16gen.kernels.epilogue import Activation, why_not_gated
from w4a16gen.weights.layouts.fragments import interleaved
from w4a16gen.weights.packed import pack_weight
from w4a16gen.weights.reference import random_weight

PLAIN = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_grouped")
GATED = KernelConfig.parse(f"{PLAIN.name}_gated")
NO_IDS = (0, 0, 0, 0)
STEP = 1 << 20
TILES = 5 * 16
"""Bytes of the list of 8 rows and 3 experts, with tiles of 8 tokens: a head, a full tile, and a last one of each."""
OK, INVALID, UNSUPPORTED = 0, 1, 2

pytestmark = pytest.mark.xdist_group("emulated")

BASES: dict[str, ctypes.Structure] = {
    "w4a16_route": CRouteArguments(
        ids=STEP,
        id_bytes=4,
        expert_map=2 * STEP,
        global_experts=6,
        experts=3,
        tokens=4,
        slots=2,
        tile_tokens=8,
        offsets=3 * STEP,
        routes_of_rows=4 * STEP,
        rows_of_routes=5 * STEP,
        token_tiles=6 * STEP,
        token_tiles_bytes=TILES,
    ),
    "w4a16_list_token_tiles": CListingArguments(
        offsets=STEP, experts=3, rows=8, tile_tokens=8, token_tiles=2 * STEP, token_tiles_bytes=TILES
    ),
    "w4a16_gather_rows": CGatherArguments(
        hidden=STEP,
        row_count=2 * STEP,
        routes_of_rows=3 * STEP,
        weights=4 * STEP,
        rows=5 * STEP,
        tokens=4,
        slots=2,
        columns=16,
    ),
    "w4a16_activate_rows": CActivateArguments(
        gates_and_factors=STEP, row_count=2 * STEP, output=3 * STEP, rows=8, columns=16, activation=5
    ),
    "w4a16_combine_rows": CCombineArguments(
        rows=STEP, rows_of_routes=2 * STEP, weights=3 * STEP, output=4 * STEP, tokens=4, slots=2, columns=16
    ),
}
"""Right arguments of each function, at addresses that nobody reads."""

LIMIT = 1 << 30
GATHERING = {"hidden": 7 * STEP, "weights": 8 * STEP, "rows": 9 * STEP, "columns": 16}
"""What routing needs to gather rows as well."""
ROUTE: list[tuple[dict[str, Any], str]] = [
    ({"ids": None}, "ids must not be null"),
    ({"ids": STEP + 2}, "ids at 0x100002 must be aligned to 4 bytes"),
    ({"ids": STEP + 4, "id_bytes": 8}, "ids at 0x100004 must be aligned to 8 bytes"),
    ({"id_bytes": 2}, "id_bytes of 2 must be 4 or 8"),
    ({"expert_map": 2 * STEP + 2}, "expert map at 0x200002 must be aligned to 4 bytes"),
    ({"global_experts": 0}, f"global_experts of 0 must be 1 to {LIMIT}"),
    ({"experts": 0}, "experts of 0 must be 1 to 1024"),
    ({"experts": 1025}, "experts of 1025 must be 1 to 1024"),
    ({"tokens": -1}, f"tokens of -1 must be 0 to {LIMIT}"),
    ({"tokens": LIMIT + 1}, f"tokens of {LIMIT + 1} must be 0 to {LIMIT}"),
    ({"slots": 0}, f"slots of 0 must be 1 to {LIMIT}"),
    ({"tokens": LIMIT}, f"tokens * slots of {2 * LIMIT} must be at most {LIMIT}: split the tokens"),
    ({"tile_tokens": 0}, f"tile_tokens of 0 must be 1 to {LIMIT}"),
    ({"offsets": None}, "offsets must not be null"),
    ({"offsets": 3 * STEP + 2}, "offsets at 0x300002 must be aligned to 4 bytes"),
    ({"routes_of_rows": None}, "routes of rows must not be null"),
    ({"rows_of_routes": 5 * STEP + 1}, "rows of routes at 0x500001 must be aligned to 4 bytes"),
    ({"token_tiles": None}, "list of token tiles must not be null"),
    ({"token_tiles": 6 * STEP + 8}, "list of token tiles at 0x600008 must be aligned to 16 bytes"),
    ({"token_tiles_bytes": TILES - 1}, f"list of token tiles of {TILES - 1} bytes must be at least {TILES} bytes"),
    ({"offsets": STEP + 28}, "offsets overlaps the ids: pass another array"),
    ({"offsets": 2 * STEP + 20}, "offsets overlaps the expert map: pass another array"),
    ({"rows_of_routes": 4 * STEP - 28}, "routes of rows overlaps the rows of routes: pass another array"),
    ({"token_tiles": 3 * STEP}, "offsets overlaps the list of token tiles: pass another array"),
    ({**GATHERING, "columns": 0}, f"columns of 0 must be 1 to {LIMIT}"),
    ({**GATHERING, "columns": 12}, "columns of 12 must be a multiple of 8"),
    ({**GATHERING, "hidden": 7 * STEP + 8}, "hidden states at 0x700008 must be aligned to 16 bytes"),
    ({**GATHERING, "rows": None}, "rows must not be null"),
    ({**GATHERING, "weights": 8 * STEP + 2}, "routing weights at 0x800002 must be aligned to 4 bytes"),
    ({**GATHERING, "rows": 7 * STEP + 16}, "rows overlaps the hidden states: pass another array"),
    ({**GATHERING, "rows": 5 * STEP}, "rows of routes overlaps the rows: pass another array"),
]
LISTING: list[tuple[dict[str, Any], str]] = [
    ({"rows": -1}, f"rows of -1 must be 0 to {LIMIT}"),
    ({"rows": LIMIT + 1}, f"rows of {LIMIT + 1} must be 0 to {LIMIT}"),
    ({"experts": 1025}, "experts of 1025 must be 1 to 1024"),
    ({"tile_tokens": -8}, "tile_tokens of -8 must be 1 to"),
    ({"offsets": None}, "offsets, counts or indices must be given, and only one of them"),
    ({"counts": 3 * STEP}, "offsets, counts or indices must be given, and only one of them"),
    ({"indices": 3 * STEP}, "offsets, counts or indices must be given, and only one of them"),
    ({"offsets": None, "indices": 3 * STEP + 2}, "indices at 0x300002 must be aligned to 4 bytes"),
    (
        {"offsets": None, "indices": 2 * STEP + TILES - 4},
        "list of token tiles overlaps the indices: pass another array",
    ),
    ({"offsets": None, "counts": 3 * STEP}, f"stride of 0 must be 1 to {LIMIT}"),
    ({"offsets": None, "counts": 3 * STEP + 2, "stride": 4}, "counts at 0x300002 must be aligned to 4 bytes"),
    ({"offsets": STEP + 2}, "offsets at 0x100002 must be aligned to 4 bytes"),
    ({"token_tiles": None}, "list of token tiles must not be null"),
    ({"token_tiles_bytes": TILES - 16}, f"list of token tiles of {TILES - 16} bytes must be at least {TILES} bytes"),
    ({"token_tiles": STEP}, "list of token tiles overlaps the offsets: pass another array"),
    (
        {"offsets": None, "counts": 2 * STEP + TILES - 4, "stride": 4},
        "list of token tiles overlaps the counts: pass another array",
    ),
]
GATHER: list[tuple[dict[str, Any], str]] = [
    ({"hidden": None}, "hidden states must not be null"),
    ({"hidden": STEP + 8}, "hidden states at 0x100008 must be aligned to 16 bytes"),
    ({"row_count": None}, "row count must not be null"),
    ({"routes_of_rows": None}, "routes of rows must not be null"),
    ({"weights": 4 * STEP + 1}, "routing weights at 0x400001 must be aligned to 4 bytes"),
    ({"rows": None}, "rows must not be null"),
    ({"rows": 5 * STEP + 8}, "rows at 0x500008 must be aligned to 16 bytes"),
    ({"tokens": -1}, f"tokens of -1 must be 0 to {LIMIT}"),
    ({"slots": -2}, f"slots of -2 must be 1 to {LIMIT}"),
    ({"columns": 0}, f"columns of 0 must be 1 to {LIMIT}"),
    ({"columns": 12}, "columns of 12 must be a multiple of 8: pad the layer with zeros"),
    ({"rows": STEP + 4 * 16 * 2 - 16}, "rows overlaps the hidden states: pass another array"),
    ({"row_count": 5 * STEP + 8 * 16 * 2 - 4}, "rows overlaps the row count: pass another array"),
    ({"weights": 5 * STEP - 28}, "rows overlaps the routing weights: pass another array"),
]
ACTIVATE: list[tuple[dict[str, Any], str]] = [
    ({"gates_and_factors": None}, "gates and factors must not be null"),
    ({"gates_and_factors": STEP + 8}, "gates and factors at 0x100008 must be aligned to 16 bytes"),
    ({"row_count": 2 * STEP + 2}, "row count at 0x200002 must be aligned to 4 bytes"),
    ({"output": None}, "output must not be null"),
    ({"rows": -1}, f"rows of -1 must be 0 to {LIMIT}"),
    ({"columns": -8}, f"columns of -8 must be 1 to {LIMIT}"),
    ({"columns": 4}, "columns of 4 must be a multiple of 8"),
    ({"activation": 1}, "activation of 1 must be a gated w4a16_activation, 5 to 7"),
    ({"activation": 8}, "activation of 8 must be a gated w4a16_activation, 5 to 7"),
    ({"output": STEP + 8 * 32 * 2 - 16}, "output overlaps the gates and factors: pass another array"),
    ({"output": STEP}, "output overlaps the gates and factors: pass another array"),
]
COMBINE: list[tuple[dict[str, Any], str]] = [
    ({"rows": None}, "rows must not be null"),
    ({"rows": STEP + 8}, "rows at 0x100008 must be aligned to 16 bytes"),
    ({"rows_of_routes": None}, "rows of routes must not be null"),
    ({"weights": 3 * STEP + 2}, "routing weights at 0x300002 must be aligned to 4 bytes"),
    ({"output": None}, "output must not be null"),
    ({"output": 4 * STEP + 8}, "output at 0x400008 must be aligned to 16 bytes"),
    ({"tokens": LIMIT}, f"tokens * slots of {2 * LIMIT} must be at most {LIMIT}: split the tokens"),
    ({"columns": 20}, "columns of 20 must be a multiple of 8"),
    ({"output": STEP + 8 * 16 * 2 - 16}, "output overlaps the rows: pass another array"),
    ({"rows_of_routes": 4 * STEP}, "output overlaps the rows of routes: pass another array"),
]
UNSORTED_BYTES = 3 * 8 * 16 * 2
"""Bytes of the rows of unsorted routes: 8 of each of 3 experts, of 16 columns."""


def few(
    ids: int | None = 5 * STEP, expert_map: int | None = 6 * STEP, global_experts: int = 6, id_bytes: int = 4
) -> dict[str, Any]:
    """Return the ids of few tokens, at addresses that nobody reads."""
    return {"unsorted": CIds(ids, expert_map, global_experts, id_bytes), "slots": 2}


COMBINE_UNSORTED: list[tuple[dict[str, Any], str]] = [
    ({"unsorted": CIds()}, "rows of routes must not be null"),
    ({"tokens": 9}, "tokens of unsorted routes of 9 must be 0 to 8"),
    ({"slots": 65, "tokens": 1}, "slots of 65 must be 1 to 64"),
    ({"slots": 17}, "unsorted routes of 68 must be 0 to 64"),
    ({"experts": 0}, "experts of 0 must be 1 to 1024"),
    ({"experts": 1025}, "experts of 1025 must be 1 to 1024"),
    (few(global_experts=0), f"global_experts of 0 must be 1 to {LIMIT}"),
    (few(id_bytes=2), "id_bytes of 2 must be 4 or 8"),
    (few(id_bytes=9), "id_bytes of 9 must be 4 or 8"),
    (few(5 * STEP + 4, id_bytes=8), "ids at 0x500004 must be aligned to 8 bytes"),
    (few(expert_map=6 * STEP + 2), "expert map at 0x600002 must be aligned to 4 bytes"),
    ({"output": STEP + UNSORTED_BYTES - 16}, "output overlaps the rows: pass another array"),
    ({"output": 5 * STEP + 16}, "output overlaps the ids: pass another array"),
    ({"output": 6 * STEP + 16}, "output overlaps the expert map: pass another array"),
]
CALLS = [
    *(("w4a16_route", *row) for row in ROUTE),
    *(("w4a16_list_token_tiles", *row) for row in LISTING),
    *(("w4a16_gather_rows", *row) for row in GATHER),
    *(("w4a16_activate_rows", *row) for row in ACTIVATE),
    *(("w4a16_combine_rows", *row) for row in COMBINE),
    *(
        ("w4a16_combine_rows", {"rows_of_routes": None, "experts": 3, **few(), **change}, text)
        for change, text in COMBINE_UNSORTED
    ),
    *((name, {"dependent_launch": 3}, "dependent_launch of 3 must be a w4a16_launch, 0 to 2") for name in BASES),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedExperts:
    """Return two grouped kernels, compiled for the CPU."""
    return build_experts([PLAIN, GATED], tmp_path_factory.mktemp("experts"), "-O0")


def changed(base: ctypes.Structure, change: dict[str, Any]) -> ctypes.Structure:
    """Return a copy of a structure with other values."""
    copy = type(base).from_buffer_copy(base)
    for name, value in change.items():
        assert hasattr(copy, name)
        setattr(copy, name, value)
    return copy


def refusal(library: ctypes.CDLL, name: str, *given: Any) -> tuple[int, str]:
    """Return the status and the sentence of a call."""
    message = ctypes.create_string_buffer(500)
    status = getattr(library, name)(*given, message, ctypes.c_size_t(len(message)))
    return status, message.value.decode()


@pytest.mark.compile
@pytest.mark.parametrize(("name", "change", "text"), CALLS, ids=str)
def test_a_wrong_call_is_refused(emulated: EmulatedExperts, name: str, change: dict[str, Any], text: str) -> None:
    status, message = refusal(emulated.library, name, ctypes.byref(changed(BASES[name], change)))
    assert status == INVALID
    assert text in message


@pytest.mark.compile
@pytest.mark.parametrize("name", BASES)
def test_null_arguments_are_refused_and_nothing_to_do_is_done(emulated: EmulatedExperts, name: str) -> None:
    assert refusal(emulated.library, name, None) == (INVALID, "arguments must not be null")
    size = "rows" if isinstance(BASES[name], CListingArguments | CActivateArguments) else "tokens"
    nothing = type(BASES[name]).from_buffer_copy(BASES[name])
    written = {field: aligned(np.zeros(TILES, np.uint8)) for field in ("offsets", "token_tiles")}
    for field, kind, *_ in nothing._fields_:
        if kind is ctypes.c_void_p:
            setattr(nothing, field, at(written.get(field)))
    setattr(nothing, size, 0)
    assert refusal(emulated.library, name, ctypes.byref(nothing)) == (OK, "")


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["i4", "i8"])
@pytest.mark.parametrize("expert_map", [None, np.arange(3, dtype=np.int32)], ids=["plain", "mapped"])
def test_without_rows_offsets_are_0_and_the_list_is_empty(
    emulated: EmulatedExperts, kind: str, expert_map: Ints | None
) -> None:
    routes = emulated.route(np.zeros((0, 2), kind), 3, 8, expert_map)
    assert routes.offsets.tolist() == [0, 0, 0, 0]
    assert (routes.token_tiles[0], routes.tiles) == (0, [])
    assert emulated.list_token_tiles(8, 0, offsets=np.zeros(4, np.int32))[0] == 0
    assert emulated.list_token_tiles(8, 0, counts=np.zeros(3, np.int32), stride=16)[0] == 0


NOTHING: list[tuple[str, dict[str, Any], str]] = [
    ("w4a16_route", {"tokens": 0, "offsets": None}, "offsets must not be null"),
    ("w4a16_route", {"tokens": 0, "token_tiles": None}, "list of token tiles must not be null"),
    ("w4a16_route", {"tokens": 0, "token_tiles_bytes": 0}, "list of token tiles of 0 bytes must be at least 16 bytes"),
    ("w4a16_route", {"tokens": 0, "offsets": 6 * STEP}, "offsets overlaps the list of token tiles"),
    ("w4a16_list_token_tiles", {"rows": 0, "token_tiles": None}, "list of token tiles must not be null"),
    (
        "w4a16_list_token_tiles",
        {"rows": 0, "token_tiles_bytes": 9},
        "list of token tiles of 9 bytes must be at least 16",
    ),
]


@pytest.mark.compile
@pytest.mark.parametrize(("name", "change", "text"), NOTHING, ids=str)
def test_what_an_empty_call_writes_is_checked(
    emulated: EmulatedExperts, name: str, change: dict[str, Any], text: str
) -> None:
    status, message = refusal(emulated.library, name, ctypes.byref(changed(BASES[name], change)))
    assert (status, text in message) == (INVALID, True), message


@pytest.mark.compile
def test_an_array_of_no_indices_may_be_null(emulated: EmulatedExperts) -> None:
    name, tiles = "w4a16_list_token_tiles", aligned(np.zeros(TILES, np.uint8))
    for rows, status in ((0, OK), (1, INVALID)):
        given = changed(BASES[name], {"offsets": None, "rows": rows, "token_tiles": at(tiles)})
        assert refusal(emulated.library, name, ctypes.byref(given))[0] == status


@pytest.mark.parametrize("name", BASES)
def test_a_build_without_grouped_kernels_says_how_to_get_them(fake_library: Library, name: str) -> None:
    library = ctypes.CDLL(str(fake_library.build.library))
    status, message = refusal(library, name, ctypes.byref(BASES[name]))
    assert status == UNSUPPORTED
    assert "this build holds no grouped kernel" in message
    assert "run `w4a16gen build --space experts`" in message


def test_bytes_of_a_list_of_token_tiles(fake_library: Library) -> None:
    library = ctypes.CDLL(str(fake_library.build.library))
    name = "w4a16_token_tiles_bytes"

    def call(*sizes: int) -> tuple[int, str, int]:
        found = ctypes.c_size_t(77)
        outcome = refusal(library, name, *map(ctypes.c_int64, sizes), ctypes.byref(found))
        return outcome[0], outcome[1], found.value

    assert call(8, 3, 8) == (OK, "", TILES)
    assert call(0, 3, 8) == (OK, "", 16)
    assert call(2, 1024, 64) == (OK, "", 3 * 16)
    counts = 4 * 1024 * 128  # of the experts' routes in each part, of which there are at most 128
    assert call(LIMIT, 1024, 8) == (OK, "", (LIMIT // 8 + 1024 + 1) * 16 + counts)
    assert call(2049, 5, 8) == (OK, "", (2049 // 8 + 5 + 1) * 16 + 64), "of three parts, in whole entries"
    assert call(-1, 3, 8) == (INVALID, f"rows of -1 must be 0 to {LIMIT}", 77)
    assert call(8, 1025, 8) == (INVALID, "experts of 1025 must be 1 to 1024", 77)
    assert call(8, 3, 0) == (INVALID, f"tile_tokens of 0 must be 1 to {LIMIT}", 77)
    assert refusal(library, name, *map(ctypes.c_int64, (8, 3, 8)), None) == (OK, "")


STRIDE = 1 << 14
OUTPUT = 4 * STEP
GEMM: list[tuple[dict[str, Any], int, str]] = [
    ({"kernel": 2}, INVALID, "kernel index 2 must be at least 0 and below 2"),
    ({"problem": None}, INVALID, "problem must not be null"),
    ({"arguments": None}, INVALID, "arguments must not be null"),
    ({"experts": None}, INVALID, "experts must not be null"),
    ({"n": 12}, UNSUPPORTED, "n of 12 must be a positive multiple of 8"),
    ({"count": 0}, INVALID, "experts of 0 must be 1 to 1024"),
    ({"count": 1025}, INVALID, "experts of 1025 must be 1 to 1024"),
    ({"tile_tokens": 16}, INVALID, f"tile_tokens of 16 must be 8, those of {PLAIN.name}: make another list"),
    (
        {"packed_stride": 4096},
        INVALID,
        "packed stride of 4096 bytes must be a multiple of 128, and at least 4480 bytes",
    ),
    ({"packed_stride": STRIDE + 64}, INVALID, "packed stride of 16448 bytes must be a multiple of 128"),
    ({"token_tiles": None}, INVALID, "list of token tiles must not be null"),
    ({"token_tiles": 5 * STEP + 4}, INVALID, "list of token tiles at 0x500004 must be aligned to 16 bytes"),
    ({"token_tiles_bytes": 79}, INVALID, "list of token tiles of 79 bytes must be at least 80 bytes"),
    ({"activations": None}, INVALID, "activations must not be null"),
    ({"packed": 2 * STEP + 64}, INVALID, "packed weight at 0x200040 must be aligned to 128 bytes"),
    ({"packed_bytes": 1}, INVALID, "packed weight of 1 bytes must be exactly"),
    ({"bias": 3 * STEP + 1}, INVALID, "bias at 0x300001 must be aligned to 2 bytes"),
    ({"output": OUTPUT + 2}, INVALID, "output at 0x400002 must be aligned to 16 bytes"),
    ({"output": STEP}, INVALID, "output overlaps the activations: pass another array"),
    ({"bias": OUTPUT - (3 * 64 - 1) * 2}, INVALID, "output overlaps the bias: pass another array"),
    ({"token_tiles": OUTPUT - 64}, INVALID, "output overlaps the list of token tiles: pass another array"),
    ({"activation": 9}, INVALID, "activation of 9 must be a w4a16_activation, 0 to 7"),
    ({"activation": 1}, INVALID, "grouped kernels compute gated activations only"),
    ({"residual": 6 * STEP}, INVALID, "grouped kernels compute gated activations only"),
    (
        {"activation": 5},
        INVALID,
        "grouped kernels with epilogue none cannot: the call needs one with epilogue gated, of `w4a16gen build --space",
    ),
    ({"kernel": 1}, INVALID, "grouped kernels with epilogue gated cannot: the call needs one with epilogue none, of"),
    ({"kernel": 1, "activation": 5, "n": 72}, INVALID, str(why_not_gated(72))),
    ({"kernel": 1, "activation": 5, "residual": OUTPUT + 64}, INVALID, "output overlaps the residual"),
]
FEW_ROWS_BYTES = 3 * 8 * 128 * 2
"""Bytes of the activations of unsorted routes: 8 rows of each of 3 experts, of K 128."""
GEMM_UNSORTED: list[tuple[dict[str, Any], str]] = [
    ({"m": 9}, "tokens of unsorted routes of 9 must be 0 to 8"),
    ({"slots": 0}, "slots of 0 must be 1 to 64"),
    ({"slots": 9}, "unsorted routes of 72 must be 0 to 64"),
    ({"count": 0}, "experts of 0 must be 1 to 1024"),
    (few(global_experts=0), f"global_experts of 0 must be 1 to {LIMIT}"),
    (few(id_bytes=0), "id_bytes of 0 must be 4 or 8"),
    (few(5 * STEP + 4, id_bytes=8), "ids at 0x500004 must be aligned to 8 bytes"),
    (few(expert_map=6 * STEP + 2), "expert map at 0x600002 must be aligned to 4 bytes"),
    ({"packed_stride": 4096}, "packed stride of 4096 bytes must be a multiple of 128, and at least 4480 bytes"),
    ({"activations": OUTPUT + 3 * 8 * 64 * 2 - 16}, "output overlaps the activations: pass another array"),
    ({"activations": OUTPUT - FEW_ROWS_BYTES + 16}, "output overlaps the activations: pass another array"),
    ({"output": 5 * STEP + 48}, "output overlaps the ids: pass another array"),
    ({"output": 6 * STEP + 16}, "output overlaps the expert map: pass another array"),
]


def grouped_gemm(library: ctypes.CDLL, change: dict[str, Any]) -> tuple[int, str]:
    """Call w4a16_grouped_gemm with other values than right ones."""
    problem = CProblem(8, 64, 128, 128)
    for name in ("m", "n"):
        setattr(problem, name, change.get(name, getattr(problem, name)))
    kernel = change.get("kernel", 0)
    needed = ctypes.c_size_t()
    refusal(library, "w4a16_packed_bytes", kernel, ctypes.byref(problem), ctypes.byref(needed))
    arguments = CGemmArguments(
        activations=STEP, packed=2 * STEP, packed_bytes=needed.value, bias=3 * STEP, output=OUTPUT, alpha=1.0
    )
    experts = CExperts(3, STRIDE, 5 * STEP, TILES, 8)
    for name, value in change.items():
        for struct in (arguments, experts):
            if hasattr(struct, name):
                setattr(struct, name, value)
    given = {"problem": problem, "arguments": arguments, "experts": experts}
    pointers = [None if name in change else ctypes.byref(struct) for name, struct in given.items()]
    return refusal(library, "w4a16_grouped_gemm", kernel, *pointers)


@pytest.mark.compile
@pytest.mark.parametrize(("change", "status", "text"), GEMM, ids=str)
def test_a_wrong_product_is_refused(emulated: EmulatedExperts, change: dict[str, Any], status: int, text: str) -> None:
    got, message = grouped_gemm(emulated.library, change)
    assert (got, text in message) == (status, True), message


@pytest.mark.compile
@pytest.mark.parametrize(("change", "text"), GEMM_UNSORTED, ids=str)
def test_a_wrong_product_of_few_tokens_is_refused(emulated: EmulatedExperts, change: dict[str, Any], text: str) -> None:
    got, message = grouped_gemm(emulated.library, {"token_tiles": None, "token_tiles_bytes": 0, **few(), **change})
    assert (got, text in message) == (INVALID, True), message


@pytest.mark.compile
def test_an_output_over_the_last_expert_is_refused(emulated: EmulatedExperts) -> None:
    last = 2 * STEP + 2 * STRIDE
    assert (
        grouped_gemm(emulated.library, {"output": last})[1] == "output overlaps the packed weight: pass another array"
    )


@pytest.mark.compile
def test_each_kind_of_kernel_has_its_function(emulated: EmulatedExperts, fake_library: Library) -> None:
    assert grouped_gemm(emulated.library, {"m": 0}) == (OK, "")
    problem, arguments = CProblem(8, 64, 128, 128), CGemmArguments()
    given = (ctypes.byref(problem), ctypes.byref(arguments))
    sentence = f"{PLAIN.name} is a grouped kernel: call w4a16_grouped_gemm"
    assert refusal(emulated.library, "w4a16_gemm", 0, *given) == (UNSUPPORTED, sentence)
    ordinary = ctypes.CDLL(str(fake_library.build.library))
    status, message = refusal(ordinary, "w4a16_grouped_gemm", 0, *given, ctypes.byref(CExperts()))
    assert status == UNSUPPORTED
    assert "is no grouped kernel: call w4a16_gemm, or take a kernel of `w4a16gen build --space experts`" in message
    found = []
    for library in (emulated.library, ordinary):
        info = CKernelInfo()
        assert library.w4a16_get_kernel_info(0, ctypes.byref(info)) == 0
        found.append(info.grouped)
    assert found == [1, 0]


@pytest.mark.compile
def test_a_grouped_kernel_needs_no_workspace_and_packs_as_others(emulated: EmulatedExperts) -> None:
    problem, found = CProblem(8, 64, 256, 128), ctypes.c_size_t(77)
    given = (0, ctypes.byref(problem))
    assert refusal(emulated.library, "w4a16_can_implement", *given) == (OK, "")
    assert refusal(emulated.library, "w4a16_workspace_bytes", *given, 132, ctypes.byref(found)) == (OK, "")
    assert found.value == 0
    weight = random_weight(np.random.default_rng(0), 64, 256, 128, QuantMode.FINEGRAINED_SCALE_ONLY)
    assert refusal(emulated.library, "w4a16_packed_bytes", *given, ctypes.byref(found)) == (OK, "")
    assert found.value == pack_weight(weight).data.size


@pytest.mark.compile
def test_offsets_that_decrease_do_not_leave_the_list(emulated: EmulatedExperts) -> None:
    offsets = np.tile(np.array([0, 40], np.int32), 20)
    listed = emulated.list_token_tiles(8, 40, offsets=offsets)
    assert listed[0] == 40 // 8 + 39


@pytest.mark.compile
def test_the_module_passes_the_kind_of_launch(emulated: EmulatedExperts, fake_library: Library) -> None:
    opened, on = fake_library.module.KernelLibrary(str(emulated.path)), (0, 3, 0)
    written = (3 * STEP, 4 * STEP, 5 * STEP, 6 * STEP, TILES)
    for outcome in (
        opened.route(STEP, 4, 0, 0, 3, 4, 2, 8, *written, 0, 0, 0, 0, *on),
        opened.list_token_tiles(STEP, 0, 0, 0, 3, 8, 8, 2 * STEP, TILES, *on),
        opened.gather_rows(STEP, 2 * STEP, 3 * STEP, 0, 5 * STEP, 4, 2, 16, *on),
        opened.activate_rows(STEP, 2 * STEP, 3 * STEP, 8, 16, Activation.SWIGLU.number, *on),
        opened.combine_rows(STEP, 2 * STEP, 0, 4 * STEP, 4, 2, 16, *NO_IDS, 3, *on),
    ):
        assert outcome == (INVALID, "dependent_launch of 3 must be a w4a16_launch, 0 to 2")


@pytest.mark.compile
def test_the_module_lists_rows_that_name_their_experts(emulated: EmulatedExperts, fake_library: Library) -> None:
    opened = fake_library.module.KernelLibrary(str(emulated.path))
    indices = aligned(np.array([2] * 9 + [-1] * 7 + [0] * 3, np.int32))
    _, _, tiles_bytes = opened.token_tiles_bytes(indices.size, 3, 8)
    listed = aligned(np.full(tiles_bytes // 4, -1, np.int32))
    emulated.library.emulation_set(0, 4)
    outcome = opened.list_token_tiles(0, 0, 0, at(indices), 3, indices.size, 8, at(listed), tiles_bytes, 0, False, 0)
    assert outcome == (OK, "")
    assert entries(listed) == [[0, 0, 16, 19], [2, 1, 0, 9], [2, 1, 0, 9]]


LAYER = 64, 128, 7, 2, 3
"""Hidden size, intermediate size, tokens, slots, and experts."""


def drawn_layer() -> tuple[Any, ...]:
    """Return both projections of the experts, hidden states, ids and weights."""
    rng = np.random.default_rng(4)
    size, inner, tokens, slots, experts = LAYER
    w13, w2 = (
        [random_weight(rng, n, k, 64, QuantMode.FINEGRAINED_SCALE_ONLY) for _ in range(experts)]
        for n, k in ((2 * inner, size), (size, inner))
    )
    hidden = aligned(rng.standard_normal((tokens, size)).astype(np.float16))
    ids = aligned(rng.integers(-1, experts, (tokens, slots)))
    return w13, w2, hidden, ids, aligned(rng.random((tokens, slots)).astype(np.float32))


@pytest.mark.compile
def test_the_module_makes_the_same_calls(emulated: EmulatedExperts, fake_library: Library) -> None:
    """A layer, call by call, by the module that Python opens libraries with."""
    opened = fake_library.module.KernelLibrary(str(emulated.path))
    assert [kernel["grouped"] for kernel in opened.kernels()] == [True, True]
    assert [
        kernel["grouped"] for kernel in fake_library.module.KernelLibrary(str(fake_library.build.library)).kernels()
    ][:2] == [False, False]
    size, inner, tokens, slots, experts = LAYER
    w13, w2, hidden, ids, weights = drawn_layer()
    wanted = emulated.moe(PLAIN, hidden, w13, w2, ids, weights)

    emulated.library.emulation_set(0, 4)
    on = (0, False, 0)
    routes = tokens * slots
    status, message, tiles_bytes = opened.token_tiles_bytes(routes, experts, 8)
    assert (status, message) == (OK, "")
    offsets, routes_of_rows, rows_of_routes, tiles, listed = (
        aligned(np.full(count, -1, np.int32)) for count in (experts + 1, routes, routes, *[tiles_bytes // 4] * 2)
    )

    def check(outcome: tuple[int, str]) -> None:
        assert outcome == (OK, "")

    written = (at(offsets), at(routes_of_rows), at(rows_of_routes), at(tiles), tiles_bytes)
    check(opened.route(at(ids), 8, 0, 0, experts, tokens, slots, 8, *written, 0, 0, 0, 0, *on))
    check(opened.list_token_tiles(at(offsets), 0, 0, 0, experts, routes, 8, at(listed), tiles_bytes, *on))
    assert listed[0] == tiles[0] > 0
    assert np.array_equal(listed[4:], tiles[4:])
    rows = aligned(np.full((routes, size), np.nan, np.float16))
    count = at(offsets[-1:])
    check(opened.gather_rows(at(hidden), count, at(routes_of_rows), 0, at(rows), tokens, slots, size, *on))
    same = aligned(np.full((routes, size), np.nan, np.float16))
    gathers = (at(hidden), 0, at(same), size)
    check(opened.route(at(ids), 8, 0, 0, experts, tokens, slots, 8, *written, *gathers, *on))
    assert np.array_equal(same, rows, equal_nan=True)

    def multiply(a: Any, packed: list[Any], n: int, activation: Activation, kernel: int) -> Any:
        together = aligned(np.stack(packed))
        out = aligned(np.full((routes, n // 2 if activation.is_gated else n), np.nan, np.float16))
        numbers = (kernel, routes, n, a.shape[1], 64, at(a), at(together), together[0].size, 0, at(out), 1.0)
        grouped = (experts, together[0].size, at(tiles), tiles_bytes, 8, False, *NO_IDS, 0, False)
        check(opened.grouped_gemm(*numbers, activation.number, 0, *grouped, *on))
        return out

    plain = [pack_weight(weight).data for weight in w13]
    both = multiply(rows, plain, 2 * inner, Activation.NONE, 0)
    act = aligned(np.full((routes, inner), np.nan, np.float16))
    check(opened.activate_rows(at(both), count, at(act), routes, inner, Activation.SWIGLU.number, *on))
    fused = multiply(rows, [pack_weight(weight, gated=True).data for weight in w13], 2 * inner, Activation.SWIGLU, 1)
    last = int(offsets[-1])
    assert np.allclose(fused[:last].astype(float), act[:last].astype(float), rtol=4e-3, atol=4e-3)
    down = multiply(act, [pack_weight(weight).data for weight in w2], size, Activation.NONE, 0)
    output = aligned(np.full((tokens, size), np.nan, np.float16))
    check(
        opened.combine_rows(
            at(down), at(rows_of_routes), at(weights), at(output), tokens, slots, size, *NO_IDS, experts, *on
        )
    )
    assert np.array_equal(output.view(np.uint16), wanted.view(np.uint16))
    refused = opened.combine_rows(
        0, at(rows_of_routes), at(weights), at(output), tokens, slots, size, *NO_IDS, experts, *on
    )
    assert refused == (INVALID, "rows must not be null")


@pytest.mark.compile
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "geglu"])
def test_interleaved_products_are_activated_as_rows_of_eight(
    emulated: EmulatedExperts, fake_library: Library, rng: np.random.Generator, activation: str
) -> None:
    opened = fake_library.module.KernelLibrary(str(emulated.path))
    emulated.library.emulation_set(0, 4)
    rows, inner, number = 5, 48, Activation(activation).number
    both = rng.standard_normal((rows, 2 * inner)).astype(np.float16)
    apart, together = (aligned(np.full((rows, inner), np.nan, np.float16)) for _ in range(2))
    whole, eights = aligned(both), aligned(interleaved(both))
    assert opened.activate_rows(at(whole), 0, at(apart), rows, inner, number, 0, False, 0) == (OK, "")
    assert opened.activate_rows(at(eights), 0, at(together), rows * inner // 8, 8, number, 0, False, 0) == (OK, "")
    assert np.isfinite(apart).all()
    assert np.array_equal(apart.view(np.uint16), together.view(np.uint16))


@pytest.mark.compile
def test_the_module_lets_products_find_the_experts_of_few_tokens(
    emulated: EmulatedExperts, fake_library: Library
) -> None:
    opened = fake_library.module.KernelLibrary(str(emulated.path))
    size, inner, tokens, slots, experts = LAYER
    w13, w2, drawn, ids, weights = drawn_layer()
    beside = aligned(np.full(tokens * size + 8 * experts * inner, np.nan, np.float16))
    hidden = beside[: tokens * size].reshape(tokens, size)  # that experts share: outputs may follow at once
    hidden[...] = drawn
    wanted = emulated.moe(PLAIN, hidden, w13, w2, ids, weights)
    emulated.library.emulation_set(0, 4)
    on, chosen = (0, False, 0), (at(ids), 8, 0, 0)
    gated = beside[tokens * size :].reshape(8 * experts, inner)
    down = aligned(np.full((8 * experts, size), np.nan, np.float16))
    for kernel, a, out, weight, applied in (
        (1, hidden, gated, w13, Activation.SWIGLU),
        (0, gated, down, w2, Activation.NONE),
    ):
        packed = aligned(np.stack([pack_weight(one, gated=applied.is_gated).data for one in weight]))
        numbers = (kernel, tokens, weight[0].n, weight[0].k, 64, at(a), at(packed), packed[0].size, 0, at(out), 1.0)
        grouped = (experts, packed[0].size, 0, 0, 8, False, *chosen, slots, a is hidden)
        assert opened.grouped_gemm(*numbers, applied.number, 0, *grouped, *on) == (OK, "")
    output = aligned(np.full((tokens, size), np.nan, np.float16))
    sums = (at(down), 0, at(weights), at(output), tokens, slots, size)
    assert opened.combine_rows(*sums, *chosen, experts, *on) == (OK, "")
    assert np.abs(output.astype(float) - wanted).max() < 4e-3 * np.abs(wanted.astype(float)).max()
