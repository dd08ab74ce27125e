// One FP16 x uint4 GEMM kernel for SM90, written by w4a16gen.
#include "native/launch.cuh"

namespace w4a16 {

struct w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent
    : native::Shape<64, 8, 128,  // CTA: channels, tokens, k
                    2,  // consumer warpgroups
                    1, 1, 2,  // cluster: channels, tokens, k
                    false,  // stream-K
                    W4A16_PER_COLUMN_SCALE_ONLY, true> {};  // warps multiply each by itself

extern const Kernel w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent_kernel;
const Kernel w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent_kernel =
    native::make_kernel<w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent>("w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent");

}  // namespace w4a16
