"""Time what torch programs wait for on a Hopper GPU: packing, loading from disk, and the way to a kernel.

    python tools/time_torch.py --gib 4 --folder /a/fast/disk

It writes a synthetic GPTQ checkpoint, loads it layer by layer, and prints rates in GB of checkpoint per second. Set
W4A16GEN_BUILD_DIR to a build of native kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import w4a16gen
from w4a16gen.integrations.torch import W4A16Linear, formats, pack_decoded, replace_linears
from w4a16gen.integrations.torch.ops import facts_of
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.weights.writers.convert import convert

GROUP = 128
SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""n and k of the layers of an 8B model, with q|k|v and gate|up in one."""
READ_BYTES = 32 << 20


def tensors_of(name: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and the shape of each tensor of a GPTQ layer."""
    groups = k // GROUP
    return {
        f"{name}.qweight": ("I32", (k // 8, n)),
        f"{name}.qzeros": ("I32", (groups, n // 8)),
        f"{name}.scales": ("F16", (groups, n)),
    }


def write_checkpoint(folder: Path, layers: dict[str, tuple[int, int]]) -> int:
    """Write random layers, and return the bytes of the file."""
    header: dict[str, Any] = {}
    end = 0
    for name, (n, k) in layers.items():
        for tensor, (dtype, shape) in tensors_of(name, n, k).items():
            size = int(np.prod(shape)) * (4 if dtype == "I32" else 2)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, entry in header.items():
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            data = rng.integers(0, 256, size, dtype=np.uint8)
            if tensor.endswith("scales"):
                data = rng.uniform(0.001, 0.01, size // 2).astype(np.float16).view(np.uint8)
            file.write(data.tobytes())
    drop_from_memory(folder)
    config = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return end


def drop_from_memory(folder: Path) -> None:
    """Let the next reader of a folder's weights read the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(call: Callable[[], object], rounds: int) -> float:
    """Return the seconds that a call takes, in the mean of some rounds after one that is not counted."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / rounds


def time_packing() -> None:
    """Print the rate of packing tensors of GPTQ that are on the GPU already."""
    for name, (n, k) in SHAPES.items():
        groups = k // GROUP
        qweight = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int32, device="cuda")
        qzeros = torch.randint(-(2**31), 2**31 - 1, (groups, n // 8), dtype=torch.int32, device="cuda")
        scales = (torch.rand(groups, n, device="cuda") * 0.01 + 0.001).half()
        given = qweight, scales, qzeros
        size = sum(tensor.nbytes for tensor in given)

        def decode(given: tuple[Any, ...] = given) -> Any:
            return formats.gptq(*given, version=2)

        decoded = decode()
        apart, whole = seconds_of(decode, 10), seconds_of(lambda: pack_decoded(decode()), 10)
        packed = seconds_of(lambda decoded=decoded: pack_decoded(decoded), 10)  # type: ignore[misc]
        rates = ", ".join(f"{what} {size / taken / 1e9:.0f}" for what, taken in (("decode", apart), ("pack", packed)))
        print(f"{name} {n}x{k}: {size / whole / 1e9:.0f} GB/s ({rates})")


def time_loading(folder: Path, gib: float) -> None:
    """Print the rate of loading a folder, and the most memory that it took."""
    layers: dict[str, tuple[int, int]] = {}
    block = sum(n * k for n, k in SHAPES.values()) * 0.53
    for number in range(max(1, round(gib * 2**30 / block))):
        layers |= {f"layers.{number}.{name}": shape for name, shape in SHAPES.items()}
    size = write_checkpoint(folder, layers)
    for what in ("from disk", "from memory"):
        checkpoint = w4a16gen.open_checkpoint(folder)
        with torch.device("meta"):
            blocks = [
                torch.nn.ModuleDict({name: torch.nn.Linear(k, n, bias=False) for name, (n, k) in SHAPES.items()})
                for _ in range(len(layers) // len(SHAPES))
            ]
            model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        report = replace_linears(model, checkpoint, device="cuda")
        torch.cuda.synchronize()
        taken = time.perf_counter() - begin
        packed = sum(buffer.nbytes for buffer in model.buffers())
        peak = torch.cuda.max_memory_allocated()
        print(f"{what}: {size / 1e9:.2f} GB in {taken:.2f} s, {size / taken / 1e9:.2f} GB/s; {report}")
        print(f"memory: {packed / 1e9:.2f} GB packed, at most {peak / 1e9:.2f} GB, {peak / packed:.3f} times as much")
        del model, blocks


def time_converted(folder: Path) -> None:
    """Convert a folder, and print the rate of loading the result, beside that of reading its files alone."""
    packed = folder / "packed"
    begin = time.perf_counter()
    size = convert(folder, packed).bytes
    print(f"convert: {size / 1e9:.2f} GB in {time.perf_counter() - begin:.1f} s")
    for what in ("from disk", "from memory"):
        if what == "from disk":
            drop_from_memory(packed)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        uploader, layers = Uploader("cuda"), []
        for layer in w4a16gen.open_packed(packed, verify=False).values():
            weight = replace(layer.weight, data=uploader.bytes(layer.weight.host_data()))
            layers.append(W4A16Linear.from_packed(weight, layer.bias, alpha=layer.alpha))
        torch.cuda.synchronize()
        taken = time.perf_counter() - begin
        print(f"converted folder, {what}: {size / taken / 1e9:.2f} GB/s")
        del layers
    drop_from_memory(packed)
    begin = time.perf_counter()
    for path in packed.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
    print(f"its files read by one thread: {size / (time.perf_counter() - begin) / 1e9:.2f} GB/s")


def time_calls() -> None:
    """Print the microseconds of the host for a call, by each way."""
    layer = W4A16Linear.from_linear(torch.nn.Linear(4096, 4096, device="cuda"), group_size=GROUP)
    weight = layer.weight_of()
    for m in (1, 16):
        x = torch.randn(m, 4096, device="cuda").half()
        y = x.bfloat16()
        arguments = (x, layer.packed, layer.bias, *facts_of(weight), 1.0)
        ways: dict[str, Callable[[], object]] = {
            "w4a16gen.gemm": lambda x=x: w4a16gen.gemm(x, weight, bias=layer.bias),  # type: ignore[misc]
            "the operator": lambda arguments=arguments: torch.ops.w4a16gen.gemm(*arguments),  # type: ignore[misc]
            "the module": lambda x=x: layer(x),  # type: ignore[misc]
            "the module in bf16": lambda y=y: layer(y),  # type: ignore[misc]
        }
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                found = {name: seconds_of(call, 2000) * 1e6 for name, call in ways.items()}
            print(f"m={m}, {mode.__name__}: " + ", ".join(f"{name} {taken:.1f} us" for name, taken in found.items()))


def main() -> None:
    """Time packing, loading and calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the synthetic checkpoint (default: 4)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write it; a temporary folder by default")
    arguments = parser.parse_args()
    time_packing()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        time_loading(Path(folder), arguments.gib)
        time_converted(Path(folder))
    time_calls()


if __name__ == "__main__":
    main()
