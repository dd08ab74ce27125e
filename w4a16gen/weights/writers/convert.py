"""Convert a checkpoint to packed weights: a folder that is loaded by memory map, without any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.progress import Progress, no_progress
from w4a16gen.weights.importers.checkpoint import Checkpoint, open_checkpoint
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS, check_layout_group_size, pack_weight
from w4a16gen.weights.packed_checkpoint import FORMAT
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.storage import as_path
from w4a16gen.weights.writers.shards import MAX_SHARD_BYTES, Job, Part, Unit, is_finished, shards_of, write_shards
from w4a16gen.weights.writers.sources import copy_side_files, dense_units, source_digest, write_config

LAYOUT = TARGET_LAYOUTS[Target.NATIVE]
SHARD_METADATA = {"format": "pt", "w4a16gen": FORMAT, "layout": LAYOUT}
"""Of every shard. Transformers reads only files of format pt."""
METHOD = "w4a16gen"
"""The quant_method in config.json."""


@dataclass(frozen=True)
class Written:
    """What a command has written.

    Attributes:
        folder: the folder.
        layers: 4-bit layers.
        dense: tensors that were copied as they are.
        bytes: bytes of all tensors.
        shards: files that hold them.
        skipped: what stayed dense though it might have been 4-bit, with the reason.
        was_complete: whether the folder held the result already, so that nothing was written.
    """

    folder: Path
    layers: int
    dense: int
    bytes: int
    shards: int
    skipped: Mapping[str, str]
    was_complete: bool


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    progress: Progress = no_progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """Write the packed form of a checkpoint, for the native kernels.

    Files appear under their names only when they are complete, and the index last. An interrupted call continues when
    it is made again. The folder's tensors of a layer are `NAME.packed`, `NAME.alpha`, and where the layer has them
    `NAME.bias`, `NAME.permutation` and `NAME.input_scale`; see `open_packed`.

    Args:
        checkpoint: what `open_checkpoint` opens.
        folder: a folder that is new, empty, or holds a part of this result.
        progress: is called for each layer and each dense tensor.
        max_shard_bytes: largest size of a file, unless one layer is larger.

    Returns:
        What was written.

    Raises:
        InvalidValueError: if the checkpoint cannot be read, a layer cannot be packed, the folder holds anything else,
            another process writes to it, or the disk has too little free space.
        OSError: if a file cannot be written.
    """
    source, out = open_checkpoint(checkpoint), as_path("folder", folder)
    units = [packed_unit(name, _Quantized(layer)) for name, layer in source.items()]
    dense = dense_units(source.tensors, source.dense)
    job = Job(
        folder=out,
        source=source_digest(source.tensors, FORMAT, LAYOUT, max_shard_bytes),
        metadata=SHARD_METADATA,
        index={"format": FORMAT, "layout": LAYOUT},
    )
    shards = shards_of([*units, *dense], max_shard_bytes)
    complete = is_finished(job)
    if not complete:
        sides = partial(_write_sides, source, as_path("checkpoint", checkpoint), out)
        write_shards(job, shards, progress, before_index=sides)
    size = sum(unit.size for group in shards.values() for unit in group)
    return Written(out, len(units), len(dense), size, len(shards), source.unsupported, complete)


def quantization_config(source: str) -> dict[str, Any]:
    """Return the configuration of packed weights, as config.json holds it."""
    return {"quant_method": METHOD, "format": FORMAT, "layout": LAYOUT, "bits": 4, "source": source}


def _write_sides(source: Checkpoint, path: Path, folder: Path) -> None:
    """Write config.json and the tokenizer. A GGUF file that was named alone has its metadata instead."""
    is_gguf = source.method == "gguf"
    home = path if path.is_dir() else None if is_gguf else path.parent
    if home is not None:
        copy_side_files(home, folder)
    more = {"gguf": dict(source.config)} if is_gguf else {}
    write_config(home, folder, {**more, "quantization_config": quantization_config(source.method)})


class _Quantized:
    """A layer of a checkpoint, as `packed_unit` takes it."""

    def __init__(self, layer: CheckpointLayer) -> None:
        self.geometry = WeightGeometry(layer.n, layer.k, layer.group_size, layer.mode)
        self.extras: dict[str, npt.NDArray[Any]] = {}
        if (bias := layer.bias) is not None:
            self.extras["bias"] = bias
        if (order := layer.permutation) is not None:
            self.extras["permutation"] = order.astype(np.int32)
        if (scale := layer.input_scale) is not None:
            self.extras["input_scale"] = scale
        self._layer = layer

    def make(self) -> tuple[QuantizedWeight, float]:
        """Return the weight and its alpha."""
        return self._layer.quantized(), self._layer.alpha


def packed_unit(name: str, layer: Any) -> Unit:
    """Return the unit of a packed layer.

    Args:
        name: the layer's name.
        layer: has `geometry`, `extras` (small arrays by name) and `make()`, which returns the weight and alpha.

    Raises:
        InvalidValueError: if the layout does not hold such a weight.
    """
    geometry: WeightGeometry = layer.geometry
    try:
        check_layout_group_size(LAYOUT, geometry.k, geometry.group_size, geometry.mode)
    except InvalidValueError as error:
        raise InvalidValueError(f"layer {shown_name(name)} cannot be packed: {error}") from None
    names = {"float16": "F16", "int32": "I32"}
    parts = [
        Part(f"{name}.packed", "U8", (LAYOUTS[LAYOUT].packed_bytes(geometry),)),
        Part(f"{name}.alpha", "F32", (1,)),
        *(Part(f"{name}.{part}", names[array.dtype.name], array.shape) for part, array in layer.extras.items()),
    ]
    return Unit(name, parts, partial(_pack, name, layer), {"layers": {name: facts_of(geometry)}})


def facts_of(geometry: WeightGeometry) -> dict[str, Any]:
    """Return what a shard's metadata says of a layer."""
    mode: QuantMode = geometry.mode
    return {"n": geometry.n, "k": geometry.k, "group_size": geometry.group_size, "mode": mode.value}


def _pack(name: str, layer: Any) -> list[npt.NDArray[Any]]:
    weight, alpha = layer.make()
    try:
        packed = pack_weight(weight)
    except InvalidValueError as error:
        raise InvalidValueError(f"layer {shown_name(name)} cannot be packed: {error}") from None
    return [packed.data, np.array([alpha], np.float32), *layer.extras.values()]
