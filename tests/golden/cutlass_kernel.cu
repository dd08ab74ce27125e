// One FP16 x uint4 GEMM kernel for SM90, written by w4a16gen.
#include "cutlass/gemm.cuh"

namespace w4a16 {

struct w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk
    : cutlass_target::Gemm<cutlass_target::Shape<128, 64, 64>,   // CTA: channels, tokens, k
                           cutlass_target::Shape<2, 1, 1>,  // cluster: channels, tokens, k
                           W4A16_FINEGRAINED_SCALE_AND_ZEROS, cutlass_target::Cooperative, cutlass_target::StreamK> {};

extern const Kernel w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk_kernel;
const Kernel w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk_kernel =
    cutlass_target::make_kernel<w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk>("w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk");

}  // namespace w4a16
