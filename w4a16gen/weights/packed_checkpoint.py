"""Open a folder that `w4a16gen convert` wrote: packed weights in memory maps."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import file_digest, seal
from w4a16gen.kernels.config import QuantMode
from w4a16gen.weights.importers.folder import INDEX, inside, read_json
from w4a16gen.weights.importers.mapped import MappedFile, map_file, parse_json, shown_name
from w4a16gen.weights.importers.safetensors_file import read_header
from w4a16gen.weights.importers.stored import Indices
from w4a16gen.weights.importers.tensors import TensorInfo, Tensors
from w4a16gen.weights.packed import LAYOUTS, PackedWeight
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.storage import as_path
from w4a16gen.wording import counted

FORMAT = "w4a16gen.packed_checkpoint/1"
"""Name and version of the folder's form; the version changes with the names and meanings of tensors and metadata."""
_FACTS = {"n", "k", "group_size", "mode"}


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A layer that computes `alpha * gemm(a, weight) + bias`.

    Before the product, multiply a by `input_scale` and take its columns in the order of `permutation`, where these are
    not None.

    Attributes:
        name: path of the module in the model.
        weight: the packed weight, in a read-only memory map; `to_device` moves it to a GPU.
        alpha: the factor to pass to `gemm`.
        bias: fp16 [n], or None.
        permutation: columns of the activations in the order of the weight, intp [k], or None.
        input_scale: fp16 [k], or None.
    """

    name: str
    weight: PackedWeight
    alpha: float
    bias: Half | None
    permutation: Indices | None
    input_scale: Half | None


class PackedCheckpoint(Mapping[str, PackedLayer]):
    """The packed layers of a folder by name, in the order of its files. `open_packed` returns one.

    Attributes:
        path: the folder.
        layout: tag of the layout of all weights.
        config: config.json of the folder.
        dense: names of the tensors that belong to no packed layer.
    """

    def __init__(self, path: Path, layout: str, tensors: Tensors, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Check each layer's facts against the headers; `open_packed` makes packed checkpoints."""
        self.path = path
        self.layout = layout
        self.config = read_json(path, "config.json")
        self._tensors = tensors
        self._geometries = {name: _weight_of(tensors, name, layout, of) for name, of in facts.items()}
        parts = ("packed", "alpha", "bias", "permutation", "input_scale")
        used = {f"{name}.{part}" for name in self._geometries for part in parts}
        self.dense = [name for name in tensors if name not in used]

    def __getitem__(self, name: str) -> PackedLayer:
        if name not in self._geometries:
            known = shown_name(next(iter(self._geometries), ""))
            raise InvalidValueError(
                f"{self.path} has no packed layer {shown_name(name)}; it has {len(self)}, such as {known}"
            )
        return _layer(self._tensors, name, self._geometries[name])

    def __contains__(self, name: object) -> bool:
        return name in self._geometries

    def get(self, name: str, default: Any = None) -> Any:
        """Return a layer, or the default if there is none of this name.

        Args:
            name: the layer.
            default: what to return otherwise.
        """
        return self[name] if name in self._geometries else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._geometries)

    def __len__(self) -> int:
        return len(self._geometries)

    def __repr__(self) -> str:
        return f"PackedCheckpoint({str(self.path)!r}, layout={self.layout!r}, {counted(len(self), 'layer')})"

    @property
    def tensors(self) -> Tensors:
        """All tensors of the files."""
        return self._tensors

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as the file stores it, in a read-only memory map. bfloat16 is copied to float32, exactly.

        Args:
            name: the tensor, for example one of `dense`.

        Returns:
            The tensor, of any shape and dtype; blocks of a GGUF file as bytes.

        Raises:
            InvalidValueError: if there is none of this name, or numpy has no such dtype.
        """
        if name not in self._tensors:
            raise InvalidValueError(f"{self.path} has no tensor {shown_name(name)}")
        return self._tensors.array(name)


def open_packed(path: str | os.PathLike[str], *, verify: bool = True) -> PackedCheckpoint:
    """Open a folder that `w4a16gen convert` or `w4a16gen quantize` wrote.

    The weights stay in the files, in memory maps; nothing is copied or unpacked. Do not change the files meanwhile.

    Args:
        path: the folder.
        verify: whether to compare each file with its digest, which reads all of it once. Without it, only sizes and
            headers are checked.

    Returns:
        A mapping from layer names to layers.

    Raises:
        InvalidValueError: if it is no such folder, is incomplete or damaged, or its layout is not known.

    Example:
        >>> import w4a16gen
        >>> packed = w4a16gen.open_packed("Qwen3-8B-packed")  # doctest: +SKIP
        >>> layer = packed["model.layers.0.mlp.down_proj"]  # doctest: +SKIP
        >>> c = w4a16gen.gemm(a, layer.weight, bias=layer.bias, alpha=layer.alpha)  # doctest: +SKIP
    """
    folder = as_path("path", path)
    if not isinstance(verify, (bool, np.bool_)):
        raise InvalidValueError(f"verify of type {type(verify).__name__} must be True or False")
    try:
        return _open(folder, verify=bool(verify))
    except OSError as error:
        raise InvalidValueError(f"{folder} cannot be read: {error.strerror}") from None


def _open(folder: Path, *, verify: bool) -> PackedCheckpoint:
    if not folder.is_dir():
        raise InvalidValueError(f"{folder} must be a folder that `w4a16gen convert` wrote")
    index = read_json(folder, INDEX)
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format"), str):
        raise InvalidValueError(
            f"{folder} holds no packed weights, or their conversion was interrupted: run `w4a16gen convert` (again)"
        )
    if metadata["format"] != FORMAT:
        raise InvalidValueError(
            f"{folder} is of format {shown_name(metadata['format'])}, but this version reads {FORMAT!r}: convert again"
        )
    if index.get("sha256") != seal(index)["sha256"]:
        raise InvalidValueError(f"{folder / INDEX} is damaged: its content does not match its digest")
    layout = metadata.get("layout")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise InvalidValueError(f"{folder} is packed as {shown_name(layout)}, not as one of {known}: convert again")
    files = _files(folder, metadata.get("files"))
    if verify:
        _verify(files)
    tensors: dict[str, TensorInfo] = {}
    layers: dict[str, Any] = {}
    for file, _ in files:
        found, facts = read_header(file)
        if facts.get("w4a16gen") != FORMAT or facts.get("layout") != layout:
            raise InvalidValueError(f"{file.path} does not belong to the packed weights of its folder")
        tensors |= found
        layers |= parse_json(facts.get("layers", "{}").encode(), f"the list of layers of {file.path}")
    weight_map = index.get("weight_map")
    named = {name: info.file.path.name for name, info in tensors.items()}
    if weight_map != named:
        raise InvalidValueError(f"{folder / INDEX} names other tensors than the files hold: convert again")
    return PackedCheckpoint(folder, layout, Tensors(tensors, {}), layers)


def _files(folder: Path, listed: Any) -> list[tuple[MappedFile, str]]:
    """Return the files that an index lists, with their digests, after a check of their sizes."""
    if not isinstance(listed, dict) or not listed:
        raise InvalidValueError(f"{folder / INDEX} must list the files")
    found = []
    for name, entry in listed.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise InvalidValueError(f"{folder / INDEX} must give the bytes and the digest of {shown_name(name)}")
        file = map_file(inside(folder, name))
        if len(file.data) != entry["bytes"]:
            size = shown_name(entry["bytes"])
            raise InvalidValueError(f"{file.path} has {len(file.data)} bytes, not {size}: it is truncated or changed")
        found.append((file, str(entry["sha256"])))
    return found


def _verify(files: list[tuple[MappedFile, str]]) -> None:
    """Compare all files with their digests, several at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda file: file_digest(file[0].path), files))
    for (file, expected), digest in zip(files, digests, strict=True):
        if digest != expected:
            raise InvalidValueError(f"{file.path} is damaged: its bytes do not have the digest that the index carries")


def _weight_of(tensors: Tensors, name: str, layout: str, facts: Any) -> PackedWeight:
    """Return the packed weight of a layer, in its memory map."""
    if not isinstance(facts, dict) or set(facts) != _FACTS:
        raise InvalidValueError(f"layer {shown_name(name)} must have n, k, group_size and mode")
    try:
        mode = QuantMode.parse(facts["mode"])
        weight = PackedWeight(None, layout, facts["n"], facts["k"], facts["group_size"], mode)
    except InvalidValueError as error:
        raise InvalidValueError(f"layer {shown_name(name)}: {error}") from None
    tensors.need(f"{name}.packed", ("U8",), (weight.nbytes,))
    tensors.need(f"{name}.alpha", ("F32",), (1,))
    for part, dtype, size in (
        ("bias", "F16", weight.n),
        ("permutation", "I32", weight.k),
        ("input_scale", "F16", weight.k),
    ):
        if f"{name}.{part}" in tensors:
            tensors.need(f"{name}.{part}", (dtype,), (size,))
    return PackedWeight(tensors.raw(f"{name}.packed"), layout, weight.n, weight.k, weight.group_size, mode)


def _layer(tensors: Tensors, name: str, weight: PackedWeight) -> PackedLayer:
    """Return a layer with its small arrays, which are checked and copied."""
    arrays = {
        part: np.array(tensors.array(f"{name}.{part}"))
        for part in ("alpha", "bias", "permutation", "input_scale")
        if f"{name}.{part}" in tensors
    }
    for part in ("alpha", "bias", "input_scale"):
        if part in arrays and not np.isfinite(arrays[part]).all():
            raise InvalidValueError(f"tensor {shown_name(f'{name}.{part}')} must be finite")
    alpha = float(arrays["alpha"][0])
    if alpha <= 0 or math.frexp(alpha)[0] != 0.5:  # noqa: PLR2004
        raise InvalidValueError(f"tensor {shown_name(f'{name}.alpha')} of {alpha} must be a power of two")
    order = arrays.get("permutation")
    if order is not None and not np.array_equal(np.sort(order), np.arange(weight.k)):
        raise InvalidValueError(
            f"tensor {shown_name(f'{name}.permutation')} must hold each of 0 to {weight.k - 1} once"
        )
    return PackedLayer(
        name,
        weight,
        alpha,
        arrays.get("bias"),
        None if order is None else order.astype(np.intp),
        arrays.get("input_scale"),
    )
