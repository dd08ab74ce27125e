// As in TensorRT-LLM 1.0.
#include "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.h"

namespace tensorrt_llm {
namespace cutlass_extensions {
struct EpilogueOpBias {};
struct CutlassGemmConfig {};
}  // namespace cutlass_extensions
}  // namespace tensorrt_llm

namespace tensorrt_llm {
namespace kernels {
namespace cutlass_kernels_oss {
template <class A, class W, class S, class B, class O, cutlass::WeightOnlyQuantOp Q, class E, class C, class G, class M,
          class P>
void sm90_generic_mixed_gemm_kernelLauncher(A const*, W const*, S const*, S const*, B const*, float const, O*, int, int,
                                            int, int const, tensorrt_llm::cutlass_extensions::CutlassGemmConfig, char*,
                                            size_t, cudaStream_t, int* = nullptr) {}
}  // namespace cutlass_kernels_oss
}  // namespace kernels
}  // namespace tensorrt_llm
