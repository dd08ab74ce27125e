// One FP16 x uint4 GEMM kernel for SM90, written by w4a16gen.
#include "native_gemm.cuh"

namespace w4a16 {

struct w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_splitk_singletile
    : native::Shape<64, 16,  // CTA: channels, tokens
                    1, 4,  // consumer warpgroups along channels, along K
                    2, W4A16_FINEGRAINED_SCALE_ONLY> {};

extern const Kernel w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_splitk_singletile_kernel;
const Kernel w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_splitk_singletile_kernel =
    native::make_kernel<w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_splitk_singletile>("w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_splitk_singletile");

}  // namespace w4a16
