"""Files of a checkpoint folder: which ones there are, and none outside the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import MAX_JSON_BYTES, map_file, parse_json, shown_name
from w4a16gen.weights.importers.safetensors_file import read_header
from w4a16gen.weights.importers.tensors import TensorInfo, Tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_SHARDS = 10_000
_HUB_BLOBS, _HUB_SNAPSHOTS = "blobs", "snapshots"


def inside(folder: Path, name: Any) -> Path:
    """Return the path of a file that a checkpoint names, which must lie in its folder.

    A link may lead out of the folder only to `blobs` of the same model, as in the cache of the Hugging Face hub.

    Args:
        folder: the folder of the checkpoint.
        name: the file's name, out of the index.

    Raises:
        InvalidValueError: if it is no plain file name, or a link that leads elsewhere.
    """
    if not isinstance(name, str) or not name or name != Path(name).name or name.startswith(".") or "\\" in name:
        raise InvalidValueError(f"{folder}: the file name {shown_name(name)} must be a plain name, without a folder")
    if any(ord(letter) < ord(" ") for letter in name):
        raise InvalidValueError(f"{folder}: the file name {shown_name(name)} has control characters")
    path = folder / name
    home = folder.resolve()
    try:
        parent = path.resolve(strict=True).parent
    except (OSError, RuntimeError):
        raise InvalidValueError(f"{path} does not exist: the checkpoint is incomplete") from None
    homes = {home, home.parent.parent / _HUB_BLOBS} if home.parent.name == _HUB_SNAPSHOTS else {home}
    if parent not in homes:
        raise InvalidValueError(f"{path} is a link out of its folder: copy the file into the folder")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of the folder, or an empty object if there is none.

    Raises:
        InvalidValueError: if it is no JSON object, or a link out of the folder.
    """
    if not (folder / name).is_symlink() and not (folder / name).exists():
        return {}
    file = map_file(inside(folder, name))
    return parse_json(file.data[: MAX_JSON_BYTES + 1].tobytes(), str(file.path))


def open_safetensors(folder: Path, names: list[str]) -> Tensors:
    """Return the tensors of some files of a folder.

    Args:
        folder: the folder.
        names: the files' names.

    Raises:
        InvalidValueError: if a file is missing or broken, or two files hold a tensor of the same name.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        found, facts = read_header(map_file(inside(folder, name)))
        repeated = next((tensor for tensor in found if tensor in tensors), None)
        if repeated is not None:
            raise InvalidValueError(f"{folder}: two files hold the tensor {shown_name(repeated)}")
        tensors |= found
        metadata |= facts
    return Tensors(tensors, metadata)


def open_folder(folder: Path) -> Tensors:
    """Return the tensors of a checkpoint folder: those of its index, or else of all its safetensors files.

    Raises:
        InvalidValueError: if there are none, a file is missing or broken, or the index contradicts the files.
    """
    index = read_json(folder, INDEX)
    if index:
        return _open_indexed(folder, index)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in names:
        names = [SINGLE]
    if not names:
        raise InvalidValueError(_why_no_tensors(folder))
    return open_safetensors(folder, names)


def _open_indexed(folder: Path, index: dict[str, Any]) -> Tensors:
    """Return the tensors of the shards that an index names."""
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InvalidValueError(f"{folder / INDEX} must have a weight_map")
    if not all(isinstance(file, str) for file in files.values()):
        raise InvalidValueError(f"{folder / INDEX}: weight_map must map tensors to file names")
    shards = sorted(set(files.values()))
    if len(shards) > _MAX_SHARDS:
        raise InvalidValueError(f"{folder / INDEX} names {len(shards)} files, more than {_MAX_SHARDS}")
    tensors = open_safetensors(folder, shards)
    for name, file in files.items():
        if name not in tensors or tensors[name].file.path.name != file:
            raise InvalidValueError(f"{folder / INDEX}: {file} does not hold the tensor {shown_name(name)}")
    return tensors


def _why_no_tensors(folder: Path) -> str:
    """Return the sentence about a folder without safetensors files."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds {shown_name(pickles[0])}, a pickle, which can run code when it is read: "
            "save the model as safetensors"
        )
    return f"{folder} holds no *.safetensors file and no *.gguf file: name the folder that holds the model"
