"""Files of checkpoints, written byte by byte: safetensors, GGUF, and folders with their configuration."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NAMES = {
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
}


class BFloat16:
    """An array whose values are written as bfloat16; they must be bfloat16 values already."""

    def __init__(self, values: Array) -> None:
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), "not bfloat16 values"
        self.bits = (bits >> 16).astype(np.uint16)


Tensors = Mapping[str, "Array | BFloat16"]


def header_of(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    """Return the entries of a safetensors header, and the bytes of the tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name, value in tensors.items():
        array = value.bits if isinstance(value, BFloat16) else value
        content = np.ascontiguousarray(array).tobytes()
        dtype = "BF16" if isinstance(value, BFloat16) else NAMES[array.dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return header, data


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """Return a safetensors file with a header, which may be text that is no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file."""
    header, data = header_of(tensors)
    if metadata:
        header["__metadata__"] = dict(metadata)
    path.write_bytes(safetensors_bytes(header, data))


def write_folder(
    folder: Path,
    tensors: Tensors,
    quantization: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    key: str = "quantization_config",
) -> Path:
    """Write a folder with one safetensors file and the configuration of its quantization."""
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", key: dict(quantization)}))
    return folder


def gguf_text(text: str) -> bytes:
    """Return a text as GGUF writes it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "IQ4_NL": 20}


def gguf_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], *, version: int = 3) -> bytes:
    """Return a GGUF file of tensors given as type, shape [.., n, k] and bytes."""
    keys = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    keys += gguf_text("tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("bc")
    keys += gguf_text("numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        infos += gguf_text(name) + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        infos += struct.pack("<IQ", GGUF_TYPES[kind], len(data))
        data += content
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 3) + keys + infos
    return head + b"\0" * (-len(head) % 32) + data
