"""Every public call with arguments that are right, and a check of its result in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import w4a16gen
from fakes.arrays import GpuArray
from fakes.checkpoints.word_formats import awq_gemm
from fakes.odd_values import NAME
from w4a16gen import (
    Activation,
    ClusterShape,
    CtaShape,
    ExpertRows,
    InvalidValueError,
    KernelConfig,
    Library,
    PackedExperts,
    PackedWeight,
    Problem,
    QuantizedWeight,
    Target,
    W4A16Error,
)
from w4a16gen.weights.activations import activated
from w4a16gen.weights.moe_reference import MoeExpectation
from w4a16gen.weights.packed import TARGET_LAYOUTS
from w4a16gen.weights.writers.convert import convert

Arguments = dict[str, Any]
HALF_ULP = 2.0**-11
MAX_HALF = 65504


class Source:
    """Right arguments for each call, drawn from a seed."""

    def __init__(self, rng: np.random.Generator, folder: Path) -> None:
        self.rng = rng
        self.folder = folder
        self.k = int(rng.choice([32, 64, 96, 128]))
        self.n = int(rng.choice([8, 16, 24]))
        self.group = int(rng.choice([32, self.k]))
        self.target = [Target.NATIVE, Target.CUTLASS][int(rng.integers(2))]

    def half(self, *shape: int, scale: float = 1.0) -> Any:
        return (self.rng.standard_normal(shape) * scale).astype(np.float16)

    def parts(self) -> Arguments:
        """Return q, scales and sometimes zeros or zero points."""
        rows = self.k // self.group
        result: Arguments = {
            "q": self.rng.integers(0, 16, (self.n, self.k)).astype(np.uint8),
            "scales": self.half(rows, self.n, scale=0.02),
        }
        kind = self.rng.integers(4)
        if kind == 0:
            result["scales"] = result["scales"][0]
            self.group = self.k
        elif kind == 1:
            result["zeros"] = (result["scales"] * 3.5).astype(np.float16)
        elif kind == 2:
            result["zero_points"] = self.rng.integers(0, 16, (rows, self.n))
        return result

    def quantized(self) -> QuantizedWeight:
        weight = self.rng.standard_normal((self.n, self.k))
        return w4a16gen.quantize(weight, group_size=self.group, zero_points=bool(self.rng.integers(2)))

    def packed(self) -> PackedWeight:
        return w4a16gen.pack_weight(self.quantized(), target=self.target)

    def experts(self) -> tuple[list[QuantizedWeight], list[QuantizedWeight], list[QuantizedWeight]]:
        """Return gate, up and down projections of three experts with equal sizes."""
        zero_points = bool(self.rng.integers(2))

        def weights(n: int, k: int) -> list[QuantizedWeight]:
            return [
                w4a16gen.quantize(self.rng.standard_normal((n, k)) * 0.1, group_size=32, zero_points=zero_points)
                for _ in range(3)
            ]

        return weights(32, self.k), weights(32, self.k), weights(self.k, 32)

    def problem(self) -> Problem:
        return Problem(4, self.n, self.k, self.group)

    def file(self) -> Path:
        return self.folder / f"{self.rng.integers(4)}.safetensors"

    def checkpoint(self) -> Path:
        """Return a folder with a checkpoint."""
        folder = self.folder / "checkpoint"
        if not folder.exists():
            folder.mkdir()
            awq_gemm(folder, self.rng)
        return folder

    def packed_checkpoint(self) -> Path:
        """Return a folder with packed weights."""
        folder = self.folder / "packed-checkpoint"
        if not folder.exists():
            convert(self.checkpoint(), folder)
        return folder


def dequantized(q: Any, scales: Any, zeros: Any = None, zero_points: Any = None) -> Any:
    """Return the weight in float64 [n, k], from parts that were accepted."""
    q, scales = np.asarray(q).astype(np.float64), np.asarray(scales).astype(np.float64)
    if scales.ndim == 1:
        scales = scales[None]
    size = q.shape[1] // scales.shape[0]
    values = (q - 8) * np.repeat(scales, size, axis=0).T
    if zero_points is not None:
        zeros = ((8 - np.asarray(zero_points).astype(np.float64)) * scales).astype(np.float16)
    if zeros is not None:
        values = values + np.repeat(np.asarray(zeros).astype(np.float64), size, axis=0).T
    return values


def is_close(got: Any, exact: Any) -> bool:
    """Return whether fp16 values are float64 values rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = exact.astype(np.float16)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    with np.errstate(invalid="ignore"):
        near = np.abs(got.astype(np.float64) - exact) <= np.abs(exact) * HALF_ULP * 1.01 + 2.0**-24
    return bool((same | near).all())


def check_pack(arguments: Arguments, packed: Any) -> None:
    kept = {name: arguments[name] for name in ("q", "scales", "zeros", "zero_points") if name in arguments}
    assert np.array_equal(packed.unpack().dequantize(), dequantized(**kept))


def check_gemm(arguments: Arguments, result: Any) -> None:
    weight = arguments["w"].unpack().dequantize()
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.asarray(arguments["a"]).astype(np.float64) @ weight.T
        exact = np.float64(np.float32(float(arguments.get("alpha", 1)))) * product
    bias = arguments.get("bias")
    exact = exact if bias is None else exact + np.asarray(bias).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = activated(Activation.of(arguments.get("activation")), exact)
    residual = arguments.get("residual")
    exact = exact if residual is None else exact + np.asarray(residual).astype(np.float64)
    assert is_close(np.asarray(result), exact)
    if arguments.get("out") is not None:
        assert result is arguments["out"]


def gemm_on(gpu: Library) -> Callable[..., Any]:
    """Return a call of `gemm` whose arrays are moved to a GPU first."""

    def call(**arguments: Any) -> Any:
        if any(isinstance(arguments.get(name), GpuArray) for name in ("a", "out")):
            raise InvalidValueError("the library refuses arrays without memory; its stand-in does not")
        movable = (np.ndarray, PackedWeight)
        moved: Arguments = {
            name: gpu.to_device(part) if isinstance(part, movable) else part for name, part in arguments.items()
        }
        result = gpu.gemm(**moved)
        assert arguments.get("out") is None or result is moved["out"]
        return result.to_host()

    return call


def check_gemm_on_gpu(arguments: Arguments, result: Any) -> None:
    check_gemm({name: value for name, value in arguments.items() if name != "out"}, result)


def check_moe(arguments: Arguments, result: Any) -> None:
    w13, w2 = arguments["w13"], arguments["w2"]
    both = [w13.expert(index).unpack() for index in range(w13.experts)]
    gate, up = ([weight.channels(part) for weight in both] for part in (slice(0, w2.k), slice(w2.k, 2 * w2.k)))
    down = [w2.expert(index).unpack() for index in range(w2.experts)]
    operands = (np.asarray(arguments[name]) for name in ("hidden", "topk_ids", "topk_weights"))
    hidden, ids, weights = operands
    options = {name: arguments[name] for name in ("activation", "weight_on_input") if name in arguments}
    places = arguments.get("expert_map")
    expected = MoeExpectation(
        hidden, gate, up, down, ids, weights, expert_map=None if places is None else np.asarray(places), **options
    )
    got = np.asarray(result)
    tame = np.isfinite(expected.result) & np.isfinite(expected.bound) & (np.abs(expected.result) < MAX_HALF / 2)
    assert got.shape == expected.result.shape
    assert (np.abs(got.astype(np.float64) - expected.result)[tame] <= expected.bound[tame]).all()
    assert arguments.get("out") is None or result is arguments["out"]


def moe_on(gpu: Library) -> Callable[..., Any]:
    """Return a call of `moe` whose arrays are moved to a GPU first."""

    def call(**arguments: Any) -> Any:
        if any(isinstance(value, GpuArray) for value in arguments.values()):
            raise InvalidValueError("the library refuses arrays without memory; its stand-in does not")
        movable = (np.ndarray, PackedExperts)
        moved: Arguments = {
            name: gpu.to_device(part) if isinstance(part, movable) else part for name, part in arguments.items()
        }
        return gpu.moe(**moved).to_host()

    return call


def check_moe_on_gpu(arguments: Arguments, result: Any) -> None:
    check_moe({name: value for name, value in arguments.items() if name != "out"}, result)


def check_quantize(arguments: Arguments, result: Any) -> None:
    weight = np.asarray(arguments["weight"]).astype(np.float64)
    step = np.repeat(np.atleast_2d(result.scales).astype(np.float64), result.group_size, axis=0).T
    assert (np.abs(result.dequantize() - weight) <= 1.02 * step + 1e-6).all()


def check_pack_weight(arguments: Arguments, result: Any) -> None:
    assert np.array_equal(result.unpack().dequantize(), arguments["weight"].dequantize())


def check_file(arguments: Arguments, result: Any) -> None:
    assert isinstance(result, PackedWeight)
    assert np.isfinite(result.unpack().dequantize()).all()
    assert arguments


def check_checkpoint(arguments: Arguments, result: Any) -> None:
    assert all(np.isfinite(layer.quantized().dequantize()).all() for layer in result.values())
    assert arguments


def check_packed_checkpoint(arguments: Arguments, result: Any) -> None:
    assert all(np.isfinite(layer.weight.unpack().dequantize()).all() for layer in result.values())
    assert arguments


def nothing(_arguments: Arguments, _result: Any) -> None:
    """Check nothing: the result is no number."""


Make = Callable[[Source], Arguments]
Check = Callable[[Arguments, Any], None]
Call = tuple[Callable[..., Any], Make, Check, tuple[type[Exception], ...]]
"""A function, its arguments, the check of its result, and the errors that it documents."""
OURS = (W4A16Error,)
FILES = (W4A16Error, OSError)


def enter_use_kernels(first: Any, second: Any) -> None:
    with w4a16gen.use_kernels(first, second):
        pass


def save(w: Any, path: Any) -> None:
    if isinstance(w, PackedWeight):
        w.save(path)


def parse_member(kind: str, text: str) -> Call:
    return getattr(w4a16gen, kind).parse, lambda _: {"value": text}, nothing, OURS


def public_calls(library: Library, gpu: Library) -> dict[str, Call]:
    """Return every public function and class with arguments that are right, and a check of its result."""

    def gemm_arguments(source: Source) -> Arguments:
        w = source.packed()
        m = int(source.rng.integers(0, 5))
        result: Arguments = {"a": source.half(m, w.k), "w": w}
        optional = {"alpha": 0.5, "bias": source.half(w.n), "out": source.half(m, w.n), "config": None}
        optional |= {"workspace": None, "stream": None, "dependent_launch": False, "activation": None}
        if w.layout == TARGET_LAYOUTS[Target.NATIVE]:
            optional |= {"activation": "silu", "residual": source.half(m, w.n)}
        return result | {name: value for name, value in optional.items() if source.rng.integers(3) == 0}

    def moe_arguments(source: Source) -> Arguments:
        gate, up, down = source.experts()
        tokens, slots = int(source.rng.integers(0, 4)), int(source.rng.integers(1, 3))
        result: Arguments = {
            "hidden": source.half(tokens, source.k),
            "w13": w4a16gen.pack_experts(gate, up, gated=bool(source.rng.integers(2))),
            "w2": w4a16gen.pack_experts(down),
            "topk_ids": source.rng.integers(-1, 4, (tokens, slots)),
            "topk_weights": source.rng.random((tokens, slots)).astype(np.float32),
        }
        optional = {"activation": "gelu", "weight_on_input": True, "invariant": True, "stream": None}
        optional |= {"expert_map": np.array([2, -1, 0, 1], np.int32), "out": source.half(tokens, source.k)}
        return result | {name: value for name, value in optional.items() if source.rng.integers(3) == 0}

    def product_arguments(source: Source) -> Arguments:
        rows = ExpertRows(3, 4, 8, np.zeros(16, np.uint8))
        return {"a": source.half(4, 32), "w": w4a16gen.pack_experts(source.experts()[2]), "rows": rows, "alpha": 1.0}

    def routing_arguments(source: Source) -> Arguments:
        return {"topk_ids": source.rng.integers(0, 3, (4, 2)), "experts": 3, "tile_tokens": 8, "stream": None}

    def listing_arguments(_source: Source) -> Arguments:
        return {"rows": 9, "tile_tokens": 8, "offsets": np.array([0, 4, 9], np.int32), "stream": None}

    def pack_arguments(source: Source) -> Arguments:
        parts = source.parts()
        return parts | {"group_size": source.group, "target": source.target}

    def on_library(name: str, make: Make) -> Call:
        return getattr(library, name), make, nothing, OURS

    config = {"config": KernelConfig.parse(NAME)}
    calls: dict[str, Call] = {
        "gemm": (w4a16gen.gemm, gemm_arguments, check_gemm, OURS),
        "pack": (w4a16gen.pack, pack_arguments, check_pack, OURS),
        "moe": (w4a16gen.moe, moe_arguments, check_moe, OURS),
        "Library.moe on a GPU": (moe_on(gpu), moe_arguments, check_moe_on_gpu, OURS),
        "grouped_gemm": (w4a16gen.grouped_gemm, product_arguments, nothing, OURS),
        "route_tokens": (w4a16gen.route_tokens, routing_arguments, nothing, OURS),
        "list_rows": (w4a16gen.list_rows, listing_arguments, nothing, OURS),
        "Library.grouped_gemm on a GPU": (gpu.grouped_gemm, product_arguments, nothing, OURS),
        "ExpertRows": (ExpertRows, lambda source: dict(vars(product_arguments(source)["rows"])), nothing, OURS),
        "pack_experts": (
            w4a16gen.pack_experts,
            lambda source: dict(zip(("weights", "up"), source.experts()[:2], strict=True)),
            nothing,
            OURS,
        ),
        "PackedExperts": (
            lambda **fields: PackedExperts(**fields).expert(0).unpack(),
            lambda source: dict(vars(w4a16gen.pack_experts(source.experts()[2]))),
            nothing,
            OURS,
        ),
        "Library.moe_workspace_bytes": (
            gpu.moe_workspace_bytes,
            lambda source: (
                {"tokens": 4, "slots": 2, "global_experts": 9, "invariant": False, "device": 0}
                | {name: moe_arguments(source)[name] for name in ("w13", "w2")}
            ),
            nothing,
            OURS,
        ),
        "pack_weight": (
            w4a16gen.pack_weight,
            lambda source: {"weight": source.quantized(), "target": str(source.target)},
            check_pack_weight,
            OURS,
        ),
        "quantize": (
            w4a16gen.quantize,
            lambda source: {
                "weight": source.rng.standard_normal((source.n, source.k)),
                "group_size": source.group,
                "zero_points": bool(source.rng.integers(2)),
            },
            check_quantize,
            OURS,
        ),
        "QuantizedWeight": (
            QuantizedWeight,
            lambda source: dict(vars(source.quantized())),
            lambda _, weight: check_gemm(
                {"a": np.ones((1, weight.k), np.float16), "w": w4a16gen.pack_weight(weight, target="cutlass")},
                np.ones((1, weight.k)) @ weight.dequantize().T,
            ),
            OURS,
        ),
        "PackedWeight": (
            lambda **fields: PackedWeight(**fields).unpack(),
            lambda source: dict(vars(source.packed())),
            nothing,
            OURS,
        ),
        "PackedWeight.save": (
            save,
            lambda source: {"w": source.packed(), "path": source.file()},
            nothing,
            FILES,
        ),
        "PackedWeight.load": (PackedWeight.load, lambda source: {"path": source.file()}, check_file, FILES),
        "open_checkpoint": (
            w4a16gen.open_checkpoint,
            lambda source: {"path": source.checkpoint()},
            check_checkpoint,
            OURS,
        ),
        "open_packed": (
            w4a16gen.open_packed,
            lambda source: {"path": source.packed_checkpoint(), "verify": True},
            check_packed_checkpoint,
            OURS,
        ),
        "load": (w4a16gen.load, lambda _: {"folder": str(library.build.folder)}, nothing, OURS),
        "configs": (w4a16gen.configs, lambda _: {}, nothing, OURS),
        "to_device": (w4a16gen.to_device, lambda source: {"value": source.packed(), "device": 0}, nothing, OURS),
        "use_kernels": (
            enter_use_kernels,
            lambda _: {"first": NAME, "second": KernelConfig.parse(NAME)},
            nothing,
            OURS,
        ),
        "Problem": (Problem, lambda source: dict(vars(source.problem())), nothing, OURS),
        "Problem.groups": (
            lambda **fields: Problem(**fields).groups,
            lambda source: dict(vars(source.problem())),
            nothing,
            OURS,
        ),
        "KernelConfig": (KernelConfig.parse, lambda _: {"name": NAME}, nothing, OURS),
        "CtaShape": (CtaShape.parse, lambda _: {"text": "64x8x128"}, nothing, OURS),
        "ClusterShape": (ClusterShape, lambda _: {"channels": 1, "tokens": 1, "k": 1}, nothing, OURS),
        "Library": (Library, lambda _: {"build": library.build}, nothing, OURS),
        "Library.gemm": (
            library.gemm,
            lambda source: gemm_arguments(source) | {"config": NAME},
            nothing,
            OURS,
        ),
        "Library.gemm on a GPU": (gemm_on(gpu), gemm_arguments, check_gemm_on_gpu, OURS),
        "Library.pack": on_library("pack", Source.parts),
        "Library.to_device": on_library("to_device", lambda source: {"value": source.half(2, 2), "device": 0}),
        "Library.choose": on_library("choose", lambda source: {"problem": source.problem(), "mode": "fgs"}),
        "Library.index_of": on_library("index_of", lambda _: dict(config)),
        "Library.kernel_for": on_library(
            "kernel_for", lambda source: {"w": source.packed(), "problem": source.problem(), "config": NAME}
        ),
        "Library.why_cannot_run": on_library(
            "why_cannot_run", lambda source: {"config": library.configs()[0], "problem": source.problem()}
        ),
        "Library.has_epilogue": on_library("has_epilogue", lambda _: {"mode": "fgs", "epilogue": "gated"}),
        "Library.packed_bytes": on_library(
            "packed_bytes", lambda source: {"config": library.configs()[0], "problem": source.problem()}
        ),
        "Library.workspace_bytes": on_library(
            "workspace_bytes",
            lambda source: {"config": library.configs()[0], "problem": source.problem(), "sm_count": 132, "device": 0},
        ),
    }
    members = {
        "Activation": "silu",
        "Epilogue": "gated",
        "QuantMode": "fgs",
        "Schedule": "warps8",
        "Scheduler": "streamk",
        "Target": "native",
    }
    return calls | {kind: parse_member(kind, text) for kind, text in members.items()}
