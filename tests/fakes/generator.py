"""What TensorRT-LLM's own generator writes, as its releases and descendants do."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

GOLDEN = (Path(__file__).parents[1] / "golden" / "trtllm_instantiations.txt").read_text().splitlines()
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


def of_types(instantiation: str, types: tuple[str, ...]) -> str:
    """Give a golden instantiation for other types; FP8's k of a CTA is twice as long."""
    activation, weight, scale, bias, output = types
    head, _, rest = instantiation.partition("cutlass::WeightOnlyQuantOp")
    name = head.partition("<")[0]
    shapes = rest.partition(">(")[0]
    if "fp8" in activation:
        shapes = shapes.replace("cute::Int<64>>, cute::Shape", "cute::Int<128>>, cute::Shape")
    parameters = (
        f"const {activation}*, const {weight}*, const {scale}*, const {scale}*, const {bias}*, const float, {output}*, "
        "int, int, int, const int, tensorrt_llm::cutlass_extensions::CutlassGemmConfig, char*, size_t, cudaStream_t, "
        "int*"
    )
    return f"{name}<{', '.join(types)}, cutlass::WeightOnlyQuantOp{shapes}>(\n{parameters}\n);"


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
        body = "\n\n".join(file)
        (folder / f"cutlass_kernel_file_{number}.generated.cu").write_text(
            f"{INCLUDE}namespace tensorrt_llm\n{{\nnamespace kernels\n{{\nnamespace cutlass_kernels\n{{\n\n{body}\n\n"
            "} // namespace cutlass_kernels\n} // namespace kernels\n} // namespace tensorrt_llm\n"
        )
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
        f"#if {guards.get(type_, '1')} && {guards.get(type_, '1')}\n"
        f"        INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM(Sm90, {type_}, {type_}, {type_}, void, EpilogueOpDefault,"
        f" NONE,\n                128, {tokens}, 64, 1, 1, 1, false, false, false, true);\n#endif\n"
        for type_ in types
        for tokens in (16, 32, 64, 128, 256)
    ]
    folder.mkdir(parents=True)
    (folder / "cutlass_kernel_file_gemm_grouped_sm90_M128_group0.generated.cu").write_text(
        '#include "launcher.inl"\nnamespace a { namespace b {\n' + "\n".join(blocks) + "\n} }\n"
    )
    return len(blocks)
