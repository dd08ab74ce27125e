"""Write tensors to shards of safetensors files: one unit at a time, whole files only, and resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import (
    has_digest,
    read_sealed,
    remove_abandoned,
    seal,
    sole_writer,
    write_json,
    written_whole,
)
from w4a16gen.progress import Progress
from w4a16gen.weights.importers.folder import INDEX, SINGLE, read_json
from w4a16gen.weights.importers.mapped import MAX_JSON_BYTES
from w4a16gen.weights.importers.tensors import byte_size

STATE = ".w4a16gen-unfinished.json"
"""Names the shards that are complete, until all are."""
MAX_SHARD_BYTES = 4 << 30
_SCHEMA = "w4a16gen.unfinished/1"
_ALIGNMENT = 64
_LENGTH_BYTES = 8
_CHUNK = 8 << 20
_SPARE_BYTES = 16 << 20
"""What headers, the index and side files may take beside the tensors."""


@dataclass(frozen=True)
class Part:
    """A tensor to be written.

    Attributes:
        name: its name.
        dtype: its dtype, as safetensors names it.
        shape: its sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        size = byte_size(self.dtype, self.shape)
        if size is None:
            raise InvalidValueError(f"tensor {self.name!r} of dtype {self.dtype} does not fill whole bytes")
        return size


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors that are computed together and stand in one shard.

    Attributes:
        name: what progress shows.
        parts: the tensors.
        make: returns their values, in the order of the parts.
        facts: what the shard's metadata says of the unit, by key and name; JSON values.
    """

    name: str
    parts: Sequence[Part]
    make: Callable[[], Sequence[npt.NDArray[Any]]]
    facts: Mapping[str, Mapping[str, Any]]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Job:
    """What is written, and where.

    Attributes:
        folder: the folder.
        source: a digest of the source and of all settings; a folder of another source is not continued.
        metadata: text for the metadata of every shard.
        index: members of the index's metadata.
    """

    folder: Path
    source: str
    metadata: Mapping[str, str]
    index: Mapping[str, Any]


def shards_of(units: Sequence[Unit], most: int = MAX_SHARD_BYTES) -> dict[str, list[Unit]]:
    """Return the units of each shard by file name. A unit larger than `most` gets a shard of its own.

    Args:
        units: the units, in the order of the files.
        most: bytes of a shard.

    Raises:
        InvalidValueError: if two tensors have one name.
    """
    names = [part.name for unit in units for part in unit.parts]
    if len(set(names)) != len(names):
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise InvalidValueError(f"two tensors would have the name {repeated!r}: rename one of them")
    groups: list[list[Unit]] = []
    size = most
    for unit in units:
        if size + unit.size > most or not groups:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def is_finished(job: Job) -> bool:
    """Return whether the folder holds the complete result of the job already.

    Raises:
        InvalidValueError: if it holds anything else but a part of the result.
    """
    folder = job.folder
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a file" if folder.exists() else "a link to nothing"
        raise InvalidValueError(f"{folder} is {what}: name a new folder")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not present:
        return False
    found, digests = _written(folder)
    temporary = {name for name in present if name.startswith(".") and name.endswith(".tmp")}
    ignored = temporary | {STATE} if found and not digests else temporary  # no shard of another job would be lost
    if found != job.source and not set(present) <= ignored:
        what = (
            "the result of another checkpoint, or of other options" if found else f"other files, such as {present[0]!r}"
        )
        raise InvalidValueError(f"{folder} holds {what}: name a new folder")
    return STATE not in present and INDEX in present and all(has_digest(folder / n, d) for n, d in digests.items())


def write_shards(
    job: Job, shards: Mapping[str, Sequence[Unit]], progress: Progress, *, before_index: Callable[[], None]
) -> None:
    """Write the shards that are not complete, then the index, which makes the folder complete.

    Args:
        job: what is written.
        shards: the units of each shard.
        progress: is called for each unit.
        before_index: writes the other files.

    Raises:
        InvalidValueError: if the disk has too little free space, a unit cannot be made, or another process writes to
            the folder.
        OSError: if a file cannot be written.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with sole_writer(job.folder):
            if not is_finished(job):  # another process may have written since the caller asked
                _write_missing(job, shards, progress, before_index)
    except BlockingIOError:
        raise InvalidValueError(
            f"another process is writing to {job.folder}: wait for it, or name another folder"
        ) from None


def _write_missing(
    job: Job, shards: Mapping[str, Sequence[Unit]], progress: Progress, before_index: Callable[[], None]
) -> None:
    folder = job.folder
    remove_abandoned(folder)
    digests = _completed(job, shards)
    _check_space(folder, [units for name, units in shards.items() if name not in digests])
    write_json(folder / STATE, seal({"schema": _SCHEMA, "source": job.source, "shards": digests}))
    (folder / INDEX).unlink(missing_ok=True)
    done, total = 0, sum(len(units) for units in shards.values())
    for name, units in shards.items():
        if name not in digests:
            digests[name] = _write_shard(job, name, units, partial(_report, progress, done, total))
            write_json(folder / STATE, seal({"schema": _SCHEMA, "source": job.source, "shards": digests}))
        done += len(units)
    before_index()
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name]} for name in shards}
    size = sum(unit.size for units in shards.values() for unit in units)
    weight_map = {part.name: name for name, units in shards.items() for unit in units for part in unit.parts}
    metadata = {"total_size": size, "source": job.source, **job.index, "files": files}
    write_json(folder / INDEX, seal({"metadata": metadata, "weight_map": weight_map}))
    (folder / STATE).unlink(missing_ok=True)


def _report(progress: Progress, before: int, total: int, number: int, what: str) -> None:
    progress(before + number, total, what)


def _completed(job: Job, shards: Mapping[str, Sequence[Unit]]) -> dict[str, str]:
    """Return the digests of the shards that an interrupted run has completed, and that are still whole."""
    source, known = _written(job.folder)
    if source != job.source:
        return {}
    return {name: known[name] for name in shards if name in known and has_digest(job.folder / name, known[name])}


def _written(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the source of what a folder holds, and the digests of its shards; nothing if it holds anything else."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if os.path.lexists(folder / STATE):
            state = _read_state(folder)
            return str(state["source"]), {str(name): str(digest) for name, digest in state["shards"].items()}
        index = read_json(folder, INDEX)["metadata"]
        return str(index["source"]), {str(name): str(entry["sha256"]) for name, entry in index["files"].items()}
    return "", {}


def _read_state(folder: Path) -> dict[str, Any]:
    """Return what an interrupted run has written.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is anything else.
    """
    if (folder / STATE).stat().st_size > MAX_JSON_BYTES:
        raise ValueError("it is too long")
    return read_sealed(folder / STATE, _SCHEMA)


def _check_space(folder: Path, missing: Sequence[Sequence[Unit]]) -> None:
    needed = sum(unit.size for units in missing for unit in units) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidValueError(
            f"{folder} has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB are needed: use another disk"
        )


def _write_shard(job: Job, name: str, units: Sequence[Unit], report: Callable[[int, str], None]) -> str:
    """Write one shard and return its digest."""
    digest = hashlib.sha256()
    with written_whole(job.folder / name) as file:
        head = _header(job, units)
        file.write(head)
        digest.update(head)
        for number, unit in enumerate(units, 1):
            for part, array in zip(unit.parts, unit.make(), strict=True):
                content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                if len(content) != part.size:
                    raise InvalidValueError(f"tensor {part.name!r} has {len(content)} bytes, not {part.size}")
                for start in range(0, len(content), _CHUNK):
                    piece = content[start : start + _CHUNK].data
                    file.write(piece)
                    digest.update(piece)
            report(number, unit.name)
    return digest.hexdigest()


def _header(job: Job, units: Sequence[Unit]) -> bytes:
    """Return the length and the header of a shard, padded so that the tensors start at a multiple of 64 bytes."""
    facts: dict[str, dict[str, Any]] = {}
    for unit in units:
        for key, values in unit.facts.items():
            facts.setdefault(key, {}).update(values)
    metadata = {**job.metadata, **{key: json.dumps(values) for key, values in facts.items()}}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for unit in units:
        for part in unit.parts:
            header[part.name] = {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [end, end + part.size],
            }
            end += part.size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
