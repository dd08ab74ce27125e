"""Open a checkpoint of any readable format: a mapping from layer names to layers, read on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers import gguf, gguf_file
from w4a16gen.weights.importers.detect import Layers, configuration_of, find_layers
from w4a16gen.weights.importers.folder import PICKLES, open_folder, open_safetensors
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.mapped import map_file, shown_name
from w4a16gen.weights.importers.stored import UnsupportedLayerError
from w4a16gen.weights.importers.tensors import Tensors
from w4a16gen.weights.storage import as_path
from w4a16gen.wording import counted

_GGUF, _SAFETENSORS = ".gguf", ".safetensors"


class Checkpoint(Mapping[str, CheckpointLayer]):
    """The 4-bit layers of a checkpoint by name, in the order of its files. Nothing but headers is kept in memory.

    Attributes:
        path: the folder or the file.
        method: how it was quantized, as its configuration says: `gptq`, `awq`, `gguf` and so on.
        config: the configuration of its quantization; of a GGUF file its metadata.
        unsupported: quantized layers that cannot be weights of this package, with the reason.
        dense: names of the tensors that belong to no 4-bit layer.
    """

    def __init__(self, path: Path, method: str, config: Mapping[str, Any], tensors: Tensors, layers: Layers) -> None:
        """Check the headers of every layer; `open_checkpoint` makes checkpoints.

        Raises:
            InvalidValueError: if a layer contradicts itself, or there is none that can be read.
        """
        self.path = path
        self.method = method
        self.config = config
        self.unsupported: dict[str, str] = {}
        self._tensors = tensors
        self._layers: dict[str, CheckpointLayer] = {}
        for name, make in layers.items():
            try:
                self._layers[name] = CheckpointLayer(make())
            except UnsupportedLayerError as error:
                self.unsupported[name] = str(error)
        if not self._layers:
            reason = next(iter(self.unsupported.values()), f"its tensors are not those of {method}")
            raise InvalidValueError(f"{path} has no layer that can be read: {reason}")

    def __getitem__(self, name: str) -> CheckpointLayer:
        if name in self._layers:
            return self._layers[name]
        if name in self.unsupported:
            raise InvalidValueError(self.unsupported[name])
        known = shown_name(next(iter(self._layers)))
        raise InvalidValueError(
            f"{self.path} has no 4-bit layer {shown_name(name)}; it has {len(self)}, such as {known}"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def get(self, name: str, default: Any = None) -> Any:
        """Return a layer, or the default if there is none of this name.

        Args:
            name: the layer.
            default: what to return otherwise.
        """
        return self._layers.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, method={self.method!r}, {counted(len(self._layers), 'layer')})"

    @property
    def tensors(self) -> Tensors:
        """All tensors of the files."""
        return self._tensors

    @property
    def dense(self) -> list[str]:
        """Names of the tensors that belong to no 4-bit layer."""
        used: set[str] = set()
        for layer in self._layers.values():
            used |= layer.tensor_names
        return [name for name in self._tensors if name not in used]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as the file stores it, in a read-only memory map. bfloat16 is copied to float32, exactly.

        Args:
            name: the tensor, for example one of `dense`.

        Returns:
            The tensor, of any shape and dtype.

        Raises:
            InvalidValueError: if there is none of this name, or numpy has no such dtype.
        """
        if name not in self._tensors:
            raise InvalidValueError(f"{self.path} has no tensor {shown_name(name)}")
        return self._tensors.array(name)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a 4-bit checkpoint: GPTQ, AWQ, compressed-tensors, AutoRound, GGUF, HQQ, torchao, MLX or ModelOpt.

    Only headers are read. Each layer reads its own values when it is asked for them. Nothing is executed, and no file
    outside the folder is opened. Do not change the files while the checkpoint is in use.

    Args:
        path: a folder with `config.json` and safetensors files, one such file beside its `config.json`, a .gguf file,
            or a folder with one .gguf file.

    Returns:
        A mapping from layer names to layers.

    Raises:
        InvalidValueError: if the path is no checkpoint, its format cannot be read, or a file is damaged.

    Example:
        >>> import pathlib, tempfile
        >>> import w4a16gen
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     w4a16gen.open_checkpoint(folder)
        Traceback (most recent call last):
        ...
        w4a16gen.errors.InvalidValueError: ... holds no *.safetensors file and no *.gguf file: name the folder ...
    """
    place = as_path("path", path)
    try:
        return _open(place)
    except OSError as error:
        raise InvalidValueError(f"{place} cannot be read: {error.strerror}") from None


def _open(place: Path) -> Checkpoint:
    """Return the checkpoint of a folder or a file."""
    if place.is_dir():
        found = sorted(file for file in place.glob(f"*{_GGUF}") if file.is_file())
        if not found or any(place.glob(f"*{_SAFETENSORS}")):
            tensors = open_folder(place)
            method, config = configuration_of(place)
            return Checkpoint(place, method, config, tensors, find_layers(tensors, method, config))
        if len(found) > 1:
            raise InvalidValueError(f"{place} holds {len(found)} GGUF files: name one of them")
        place = found[0]
    if place.suffix.lower() in PICKLES:
        raise InvalidValueError(f"{place} is a pickle, which can run code when it is read: save it as safetensors")
    if place.suffix.lower() == _SAFETENSORS:
        tensors = open_safetensors(place.parent, [place.name])
        method, config = configuration_of(place.parent)
        return Checkpoint(place, method, config, tensors, find_layers(tensors, method, config))
    if place.suffix.lower() == _GGUF:
        infos, metadata = gguf_file.read_header(map_file(place))
        tensors = Tensors(infos, metadata)
        return Checkpoint(place, "gguf", metadata, tensors, gguf.stored_layers(tensors))
    if not place.exists():
        raise InvalidValueError(
            f"{place} does not exist: name a folder or a file of a checkpoint. Nothing is downloaded"
        )
    raise InvalidValueError(f"{place} must be a folder, a .safetensors file or a .gguf file")
