"""Stand-ins of the header that declares the launcher, as the releases of TensorRT-LLM and descendants declare it."""

from __future__ import annotations

from pathlib import Path

HEADER = "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"
TYPES = """
#include <cstddef>
struct half {};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
namespace cutlass {
struct uint4b_t {};
enum class WeightOnlyQuantOp { PER_COLUMN_SCALE_ONLY, FINEGRAINED_SCALE_ONLY, FINEGRAINED_SCALE_AND_ZEROS };
namespace gemm { struct KernelTmaWarpSpecializedCooperativeMIXED {}; struct KernelTmaWarpSpecializedPingpongMIXED {}; }
namespace epilogue { struct TmaWarpSpecializedCooperative {}; struct TmaWarpSpecialized {}; }
}
namespace cute { template <int V> struct Int {}; template <class... T> struct Shape {}; }
OPEN_ROOT namespace cutlass_extensions { struct EpilogueOpBias {}; struct CutlassGemmConfig {}; } CLOSE_ROOT
"""
LAUNCHER = """
template <class A, class W, class S, class B, class O, cutlass::WeightOnlyQuantOp Q, class E, class C, class G, class M,
          class P>
void sm90_generic_mixed_gemm_kernelLauncher(A const*, W const*, S const*, S const*, B const*, float const, O*, int, int,
  int, int const, ROOT::cutlass_extensions::CutlassGemmConfig, char*, size_t, cudaStream_t, int* = nullptr) {}
"""
MACROS = """
#define TRTLLM_NAMESPACE_BEGIN namespace tensorrt_llm { inline namespace _v1 {
#define TRTLLM_NAMESPACE_END } }
"""
AGES = {
    "0.9 to 0.20": ("namespace tensorrt_llm {", "}", "namespace kernels { namespace cutlass_kernels {", "} }"),
    "1.0": ("namespace tensorrt_llm {", "}", "namespace kernels { namespace cutlass_kernels_oss {", "} }"),
    "1.1, one line": ("namespace tensorrt_llm {", "}", "namespace kernels::cutlass_kernels_oss {", "}"),
    "1.2, inline namespace": (
        "TRTLLM_NAMESPACE_BEGIN",
        "TRTLLM_NAMESPACE_END",
        "namespace kernels { namespace cutlass_kernels_oss {",
        "} }",
    ),
    "inline namespace, old name": (
        "TRTLLM_NAMESPACE_BEGIN",
        "TRTLLM_NAMESPACE_END",
        "namespace kernels { inline namespace k { namespace cutlass_kernels {",
        "} } }",
    ),
    "both names": (
        "namespace tensorrt_llm {",
        "}",
        "namespace kernels { namespace cutlass_kernels { struct Other {}; } namespace cutlass_kernels_oss {",
        "} }",
    ),
}
"""By age: how the root is opened and closed, and the launcher's own namespaces."""
DESCENDANT = ("namespace onnxruntime::llm {", "}", "namespace kernels { namespace cutlass_kernels {", "} }")


def write_header(
    folder: Path,
    age: tuple[str, str, str, str],
    *,
    root: str = "tensorrt_llm",
    header: str = HEADER,
    mixed_input: bool = False,
) -> Path:
    """Write a stand-in of the header into an include folder; return its path."""
    opening, closing, begin, end = age
    types = TYPES.replace("MIXED", "MixedInput" if mixed_input else "")
    types = types.replace("OPEN_ROOT", opening).replace("CLOSE_ROOT", closing)
    path = folder / header
    path.parent.mkdir(parents=True)
    own = header.removesuffix(".inl") + ".h"
    (folder / own).write_text("#pragma once\n")
    launcher = LAUNCHER.replace("ROOT", root)
    path.write_text(f'#include "{own}"\n{MACROS}{types}{opening}\n{begin}\n{launcher}\n{end} {closing}\n')
    return path
