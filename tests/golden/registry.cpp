// The table of the kernels in this library, written by w4a16gen.
#include "library/registry.h"

namespace w4a16 {
extern const Kernel w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent_kernel;
extern const Kernel w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk_kernel;

const Kernel* const kKernels[] = {
    &w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent_kernel,
    &w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk_kernel,
};
const int kKernelCount = 2;
}  // namespace w4a16
