"""Time what activations, gates and residuals add to a product, beside the kernels that they replace.

    w4a16gen build --epilogue none --epilogue elementwise --epilogue gated
    python tools/time_epilogues.py --build build --tokens 1 16 64 256 2048 --layer 28672x4096 --layer 4096x14336

Needs torch and a Hopper GPU. Each number of tokens and layer gets the kernel that a plain call chooses, or those of
--kernel, and the same with each epilogue. Graphs of all variants are replayed in turn, with weights of random bytes
that leave L2 cold. "apart" is the plain product and one compiled kernel of torch that does the rest.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import w4a16gen
from w4a16gen import Activation, KernelConfig, Library, PackedWeight, Problem, QuantMode
from w4a16gen.kernels.epilogue import CallEpilogue
from w4a16gen.weights.packed import GATED_LAYOUT, TARGET_LAYOUTS

COLD_BYTES = 220_000_000
MAX_COPIES = 24
ALIGNMENT = 1024
REPLAYS = 40
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
GROUP = 128
PLAIN = "plain"


def main() -> None:
    """Print microseconds of each variant, and what it takes more than the plain product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", help="folder of the build; the default one without it")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--layer", action="append", help="NxK; may be repeated")
    parser.add_argument("--kernel", action="append", help="name of a plain kernel to time instead of the chosen one")
    given = parser.parse_args()
    library, torch = w4a16gen.load(given.build), importlib.import_module("torch")
    for layer in given.layer or ["28672x4096", "4096x14336"]:
        n, k = map(int, layer.split("x"))
        for m in given.tokens:
            problem = Problem(m, n, k, GROUP)
            chosen = given.kernel or [library.choose(problem, MODE).kernel]
            for kernel in map(KernelConfig.of, chosen):
                show(problem, kernel, time_variants(torch, variants(torch, library, problem, kernel)))


def variants(
    torch: Any, library: Library, problem: Problem, kernel: KernelConfig
) -> dict[str, Callable[[int], object]]:
    """Return a launch for each variant; its argument is the turn."""
    m, n, k = problem.m, problem.n, problem.k
    size = library.packed_bytes(kernel, problem)
    step = -(-size // ALIGNMENT) * ALIGNMENT
    copies = max(2, min(MAX_COPIES, COLD_BYTES // step + 1))
    pool = torch.randint(0, 256, (copies * step,), dtype=torch.uint8, device="cuda")
    layout = TARGET_LAYOUTS[kernel.target]
    plain = [PackedWeight(pool[turn * step : turn * step + size], layout, n, k, GROUP, MODE) for turn in range(copies)]
    gated = [replace(weight, layout=GATED_LAYOUT) for weight in plain]
    a, residual, out = (torch.randn(m, columns, device="cuda").half() for columns in (k, n, n))
    half = torch.empty(m, n // 2, dtype=torch.float16, device="cuda")
    workspace = torch.empty(library.workspace_bytes(kernel, problem), dtype=torch.uint8, device="cuda")

    def call(weights: list[PackedWeight], to: Any, **options: Any) -> Callable[[int], object]:
        def launch(turn: int) -> object:
            stream = torch.cuda.current_stream()
            weight = weights[turn % copies]
            call = CallEpilogue(Activation.of(options.get("activation")), has_residual="residual" in options)
            config = replace(kernel, epilogue=call.kernels)
            return library.gemm(a, weight, config=config, out=to, workspace=workspace, stream=stream, **options)

        return launch

    product = call(plain, out)
    silu = torch.nn.functional.silu
    gate = torch.compile(lambda x, to: to.copy_(silu(x[:, : n // 2].float()) * x[:, n // 2 :].float()))
    add = torch.compile(lambda x, y: x.add_(y))
    return {
        PLAIN: product,
        "silu": call(plain, out, activation="silu"),
        "gelu": call(plain, out, activation="gelu"),
        "relu2": call(plain, out, activation="relu2"),
        "residual": call(plain, out, residual=residual),
        "residual in place": call(plain, out, residual=out),
        "swiglu": call(gated, half, activation="swiglu"),
        "plain, gate apart": lambda turn: (product(turn), gate(out, half)),
        "plain, residual apart": lambda turn: (product(turn), add(residual, out)),
    }


def time_variants(torch: Any, launches: Mapping[str, Callable[[int], object]]) -> dict[str, float]:
    """Replay the graphs of all variants in turn; return the median microseconds of a launch of each."""
    graphs = {name: record(torch, launch) for name, launch in launches.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1000 / MAX_COPIES)
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def record(torch: Any, launch: Callable[[int], object]) -> Any:
    """Return a graph of launches in turn."""
    for turn in range(3):
        launch(turn)  # compile and allocate first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(MAX_COPIES):
            launch(turn)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def show(problem: Problem, kernel: KernelConfig, times: Mapping[str, float]) -> None:
    """Print one problem's times."""
    print(f"{problem}, {kernel.short_name}")
    for name, time in times.items():
        print(f"  {name:22} {time:9.2f} us  {100 * (time / times[PLAIN] - 1):+6.1f} %")


if __name__ == "__main__":
    main()
