"""Quantize a model: round its linear layers to the nearest 4-bit values, for other programs or for this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import NATIVE_GROUP_MULTIPLE
from w4a16gen.progress import Progress, no_progress
from w4a16gen.weights.importers.folder import open_folder, open_safetensors, read_json
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.tensors import DTYPES, FLOATS, Tensors
from w4a16gen.weights.importers.words import bfloat16_to_float32
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed_checkpoint import FORMAT
from w4a16gen.weights.quantize import RoundedWeight, bfloat16_scale, round_to_nearest
from w4a16gen.weights.quantized import OFFSET, Double, QuantizedWeight, canonical, pack_nibbles
from w4a16gen.weights.storage import as_path
from w4a16gen.weights.writers.convert import (
    LAYOUT,
    SHARD_METADATA,
    Written,
    packed_unit,
    quantization_config,
)
from w4a16gen.weights.writers.shards import MAX_SHARD_BYTES, Job, Part, Unit, is_finished, shards_of, write_shards
from w4a16gen.weights.writers.sources import CONFIG, copy_side_files, dense_units, source_digest, write_config

COMPRESSED = "compressed-tensors"
PACKED = "w4a16gen"
FORMATS = (COMPRESSED, PACKED)
"""What `quantize_model` writes."""
ALWAYS_DENSE = (
    *("lm_head", "*.lm_head", "*embed*", "*norm*", "wte", "*.wte", "wpe", "*.wpe", "shared", "*.gate", "*router*"),
    "*expert_gate",
    *("*score", "*classifier*", "*pooler*"),
)
"""Patterns of modules that are no linear layers, are small, or lose too much with 4 bits."""
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose linear layers are stored as [k, n]."""
_ROWS = 1 << 22
"""Weights that are rounded at once."""
_WEIGHT = ".weight"
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Attributes:
        group_size: values of K per scale, a multiple of 32.
        zero_points: whether each group gets a zero point.
        format: one of `FORMATS`.
        skip: patterns of modules that stay dense, beside `ALWAYS_DENSE`; * stands for any text.
    """

    group_size: int = 128
    zero_points: bool = False
    format: str = COMPRESSED
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InvalidValueError: naming the setting.
        """
        object.__setattr__(self, "group_size", integer("group_size", self.group_size))
        if not isinstance(self.zero_points, (bool, np.bool_)):
            raise InvalidValueError(f"zero_points of type {type(self.zero_points).__name__} must be True or False")
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise InvalidValueError(f"skip of {self.skip!r} must be a sequence of patterns, such as ['*.down_proj']")
        if self.group_size <= 0 or self.group_size % NATIVE_GROUP_MULTIPLE != 0:
            raise InvalidValueError(f"group size {self.group_size} must be a multiple of {NATIVE_GROUP_MULTIPLE}")
        if self.format not in FORMATS:
            raise InvalidValueError(f"format {self.format!r} must be one of {', '.join(FORMATS)}")


def quantize_model(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    progress: Progress = no_progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """Round the linear layers of a model to 4 bits.

    Files appear under their names only when they are complete, and the index last. An interrupted call continues when
    it is made again.

    Args:
        model: a folder with config.json and safetensors files in FP16, BF16 or FP32, or one such file beside its
            config.json.
        folder: a folder that is new, empty, or holds a part of this result.
        settings: how to quantize; None takes the defaults.
        progress: is called for each layer and each dense tensor.
        max_shard_bytes: largest size of a file, unless one layer is larger.

    Returns:
        What was written.

    Raises:
        InvalidValueError: if the model cannot be read or is quantized already, no layer can be quantized, a weight is
            not finite, a pattern matches no module, the folder holds anything else, another process writes to it, or
            the disk has too little free space.
        OSError: if a file cannot be written.
    """
    settings = settings or Settings()
    source, out = as_path("model", model), as_path("folder", folder)
    tensors = _open(source)
    home = source if source.is_dir() else source.parent
    _check_model(home)
    modules, skipped = _select(tensors, settings)
    make = _compressed if settings.format == COMPRESSED else _packed
    units = [make(tensors, module, settings) for module in modules]
    used = {f"{module}{_WEIGHT}" for module in modules}
    if settings.format == PACKED:
        used |= {f"{module}.bias" for module in modules}
    dense = dense_units(tensors, [name for name in tensors if name not in used])
    index = {"format": FORMAT, "layout": LAYOUT} if settings.format == PACKED else {}
    job = Job(
        folder=out,
        source=source_digest(tensors, vars(settings), LAYOUT, max_shard_bytes),
        metadata=SHARD_METADATA if settings.format == PACKED else {"format": "pt"},
        index=index,
    )
    shards = shards_of([*units, *dense], max_shard_bytes)
    complete = is_finished(job)
    if not complete:
        config = _compressed_config(settings, skipped) if settings.format == COMPRESSED else quantization_config("rtn")
        write_shards(job, shards, progress, before_index=partial(_write_sides, home, out, config))
    size = sum(unit.size for group in shards.values() for unit in group)
    return Written(out, len(units), len(dense), size, len(shards), skipped, complete)


def _write_sides(home: Path, folder: Path, config: dict[str, Any]) -> None:
    copy_side_files(home, folder)
    write_config(home, folder, {"quantization_config": config})


def _open(source: Path) -> Tensors:
    try:
        if source.is_dir():
            return open_folder(source)
        if source.suffix == ".safetensors":
            return open_safetensors(source.parent, [source.name])
    except OSError as error:
        raise InvalidValueError(f"{source} cannot be read: {error.strerror}") from None
    raise InvalidValueError(f"{source} must be a folder with safetensors files, or such a file")


def _check_model(folder: Path) -> None:
    """Raise if the model is not described, is quantized, or stores its linear layers in another order."""
    config = read_json(folder, CONFIG)
    if not config:
        raise InvalidValueError(
            f"{folder} has no {CONFIG}, which says of what kind the model is: copy it beside the weights"
        )
    if any(config.get(key) for key in ("quantization_config", "compression_config", "quantization")):
        raise InvalidValueError(f"{folder} is quantized already: `w4a16gen convert` packs its weights as they are")
    if config.get("model_type") in _TRANSPOSED:
        raise InvalidValueError(
            f"{folder} is of model type {shown_name(config['model_type'])}, whose layers are stored as [k, n]: "
            "only [n, k] is supported"
        )


def _select(tensors: Tensors, settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Return the modules to quantize, and the matrices that stay dense with the reason."""
    chosen, skipped = [], {}
    _check_patterns(tensors, settings.skip)
    for name in tensors:
        info = tensors[name]
        module = name.removesuffix(_WEIGHT)
        if module == name or len(info.shape) < 2:  # noqa: PLR2004
            continue
        patterns = [pattern for pattern in (*settings.skip, *ALWAYS_DENSE) if fnmatchcase(module, pattern)]
        if patterns:
            skipped[module] = f"it matches {patterns[0]}"
        elif len(info.shape) != 2 or info.dtype not in FLOATS or 0 in info.shape:  # noqa: PLR2004
            skipped[module] = (
                f"its weight of dtype {info.dtype} and shape {list(info.shape)} is no FP16, BF16 or FP32 matrix"
            )
        elif info.shape[1] % settings.group_size != 0:
            skipped[module] = f"k = {info.shape[1]} is no multiple of the group size {settings.group_size}"
        else:
            chosen.append(module)
    if not chosen:
        reasons = [f"{shown_name(name)}: {why}" for name, why in skipped.items()]
        reason = next((text for text in reasons if "group size" in text), next(iter(reasons), ""))
        raise InvalidValueError(
            f"no layer can be quantized{f'; {reason}' if reason else ': there is no matrix [n, k]'}"
        )
    return chosen, skipped


def _check_patterns(tensors: Tensors, patterns: Iterable[str]) -> None:
    """Raise if a pattern matches no module: what it was meant for would be quantized."""
    modules = [name.removesuffix(_WEIGHT) for name in tensors if name.endswith(_WEIGHT)]
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in modules):
            known = f", such as {shown_name(modules[-1])}" if modules else ""
            raise InvalidValueError(
                f"pattern {shown_name(pattern)} matches none of {len(modules)} modules{known}: * stands for any text"
            )


def _rows(tensors: Tensors, name: str) -> Iterator[Double]:
    """Return a matrix as float64 in blocks of rows, so that only one block takes memory."""
    info = tensors[name]
    n, k = info.shape
    stored = tensors.raw(name).view(DTYPES[info.dtype]).reshape(n, k)
    step = max(1, _ROWS // k)
    for start in range(0, n, step):
        block = stored[start : start + step]
        values = (bfloat16_to_float32(block) if info.dtype == "BF16" else block).astype(np.float64)
        if not np.isfinite(values).all():
            raise InvalidValueError(f"tensor {shown_name(name)} must be finite")
        yield values


def _rounded(tensors: Tensors, module: str, settings: Settings, *, bfloat16: bool) -> RoundedWeight:
    """Round a layer, block by block."""
    name = f"{module}{_WEIGHT}"
    round_scale = bfloat16_scale if bfloat16 else None
    try:
        blocks = [
            round_to_nearest(rows, settings.group_size, zero_points=settings.zero_points, round_scale=round_scale)
            for rows in _rows(tensors, name)
        ]
    except InvalidValueError as error:
        raise InvalidValueError(f"layer {shown_name(module)}: {error}") from None
    q, scales, points = (
        np.concatenate([getattr(block, part) for block in blocks]) for part in ("q", "scales", "zero_points")
    )
    return RoundedWeight(q, scales, points)


def _compressed(tensors: Tensors, module: str, settings: Settings) -> Unit:
    """Return the unit of a layer in the form of compressed-tensors, pack-quantized."""
    info = tensors[f"{module}{_WEIGHT}"]
    (n, k), groups = info.shape, info.shape[1] // settings.group_size
    scale_dtype = "BF16" if info.dtype == "BF16" else "F16"
    parts = [
        Part(f"{module}.weight_packed", "I32", (n, k // 8)),
        Part(f"{module}.weight_scale", scale_dtype, (n, groups)),
        Part(f"{module}.weight_shape", "I64", (2,)),
    ]
    if settings.zero_points:
        parts.append(Part(f"{module}.weight_zero_point", "I32", (-(-n // 8), groups)))
    return Unit(module, parts, partial(_make_compressed, tensors, module, settings, scale_dtype), {})


def _make_compressed(tensors: Tensors, module: str, settings: Settings, dtype: str) -> list[npt.NDArray[Any]]:
    rounded = _rounded(tensors, module, settings, bfloat16=dtype == "BF16")
    if dtype == "BF16":
        scales: npt.NDArray[Any] = (rounded.scales.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        scales = rounded.scales.astype(np.float16)
    arrays = [pack_nibbles(rounded.q), scales, np.array(rounded.q.shape, np.int64)]
    if settings.zero_points:
        points = np.pad(rounded.zero_points.T, ((0, 0), (0, -len(rounded.zero_points) % 8)))  # [groups, n]
        arrays.append(np.ascontiguousarray(np.ascontiguousarray(pack_nibbles(points)).view("<i4").T))
    return arrays


def _compressed_config(settings: Settings, skipped: Iterable[str]) -> dict[str, Any]:
    """Return the configuration that compressed-tensors reads."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": not settings.zero_points,
        "strategy": "group",
        "group_size": settings.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": COMPRESSED,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted(skipped),
    }


class _Layer:
    """A layer of the model, as `packed_unit` takes it."""

    def __init__(self, tensors: Tensors, module: str, settings: Settings) -> None:
        n, k = tensors[f"{module}{_WEIGHT}"].shape
        mode = QuantMode.FINEGRAINED_SCALE_AND_ZEROS if settings.zero_points else QuantMode.FINEGRAINED_SCALE_ONLY
        self.geometry = WeightGeometry(n, k, settings.group_size, mode)
        self.extras: Mapping[str, npt.NDArray[Any]] = {}
        self._parts = tensors, module, settings
        if f"{module}.bias" in tensors:
            tensors.need(f"{module}.bias", FLOATS, (n,))
            bias = tensors.double(f"{module}.bias")
            if np.abs(bias).max() > _HALF_MAX:
                raise InvalidValueError(f"layer {shown_name(module)}: bias exceeds fp16's 65504")
            self.extras = {"bias": bias.astype(np.float16)}

    def make(self) -> tuple[QuantizedWeight, float]:
        """Return the weight and its alpha."""
        tensors, module, settings = self._parts
        rounded = _rounded(tensors, module, settings, bfloat16=False)
        zeros = ((OFFSET - rounded.zero_points.astype(np.float64)) * rounded.scales).T.astype(np.float16)
        scales = rounded.scales.T.astype(np.float16)
        size = settings.group_size
        return canonical(rounded.q, scales, zeros if settings.zero_points else None, group_size=size), 1.0


def _packed(tensors: Tensors, module: str, settings: Settings) -> Unit:
    """Return the unit of a layer in this package's form."""
    return packed_unit(module, _Layer(tensors, module, settings))
