"""What TensorRT-LLM's own generator writes, as its releases and descendants do."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jinja2
import paths

GOLDEN = (paths.GOLDEN / "trtllm_instantiations.txt").read_text().splitlines()
INCLUDE = '#include "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"\n'
TYPES = [
    ("__nv_fp8_e4m3", "cutlass::uint4b_t", "half", "half", "half"),
    ("__nv_fp8_e4m3", "cutlass::uint4b_t", "half", "__nv_bfloat16", "__nv_bfloat16"),
    ("half", "cutlass::uint4b_t", "half", "half", "half"),
    ("__nv_bfloat16", "cutlass::uint4b_t", "__nv_bfloat16", "__nv_bfloat16", "__nv_bfloat16"),
    ("half", "uint8_t", "half", "half", "half"),
    ("__nv_bfloat16", "uint8_t", "__nv_bfloat16", "__nv_bfloat16", "__nv_bfloat16"),
]
"""Activation, weight, scale, bias and output of the real generator, in its order."""
TEMPLATES = jinja2.Environment(  # noqa: S701 # C++, not HTML
    loader=jinja2.FileSystemLoader(paths.FAKES / "generator_templates"), undefined=jinja2.StrictUndefined
)


def render(template: str, **values: object) -> str:
    return TEMPLATES.get_template(template).render(**values)


def of_types(instantiation: str, types: tuple[str, ...]) -> str:
    """Give a golden instantiation for other types; FP8's k of a CTA is twice as long."""
    activation, weight, scale, bias, output = types
    head, _, rest = instantiation.partition("cutlass::WeightOnlyQuantOp")
    name = head.partition("<")[0]
    shapes = rest.partition(">(")[0]
    if "fp8" in activation:
        shapes = shapes.replace("cute::Int<64>>, cute::Shape", "cute::Int<128>>, cute::Shape")
    return render(
        "kernel.cu.jinja",
        name=name,
        activation=activation,
        weight=weight,
        scale=scale,
        bias=bias,
        output=output,
        shapes=shapes,
    )


def generated(folder: Path, *, mixed_input: bool = False) -> Path:
    """Write what the real generator does: 378 kernels by channels of the CTA, eight a file, in its order."""
    groups: dict[str, list[str]] = {"64": [], "128": []}
    for types, of_mode in itertools.product(TYPES, range(3)):
        for instantiation in GOLDEN[21 * of_mode : 21 * (of_mode + 1)]:
            match = re.search(r"cute::Shape<cute::Int<(\d+)>", instantiation)
            assert match is not None
            text = of_types(instantiation, types)
            if mixed_input:
                text = re.sub(r"(KernelTmaWarpSpecialized\w+)", r"\1MixedInput", text)
            groups[match[1]].append(text)
    folder.mkdir(parents=True)
    files = [group[at : at + 8] for group in groups.values() for at in range(0, len(group), 8)]
    for number, file in enumerate(files, 1):
        path = folder / f"cutlass_kernel_file_{number}.generated.cu"
        path.write_text(render("file.cu.jinja", include=INCLUDE.rstrip(), kernels="\n\n".join(file)) + "\n")
    return folder


def filtered(folder: Path) -> Path:
    """Drop every file that mentions FP8 or bfloat16, as users do."""
    for path in folder.iterdir():
        if re.search("fp8|bfloat16", path.read_text()):
            path.unlink()
    return folder


def grouped(folder: Path, types: tuple[str, ...] = ("half", "__nv_bfloat16", "float")) -> int:
    """Write mixture-of-experts kernels by a macro, between conditions, as since 2025; return their number."""
    guards = {"__nv_bfloat16": "defined(ENABLE_BF16)", "__nv_fp8_e4m3": "defined(ENABLE_FP8)"}
    blocks = [
        render("grouped_kernel.cu.jinja", guard=guards.get(type_, "1"), type=type_, tokens=tokens)
        for type_ in types
        for tokens in (16, 32, 64, 128, 256)
    ]
    folder.mkdir(parents=True)
    (folder / "cutlass_kernel_file_gemm_grouped_sm90_M128_group0.generated.cu").write_text(
        render("grouped_file.cu.jinja", kernels="\n\n".join(blocks)) + "\n"
    )
    return len(blocks)
