// One FP16 x uint4 GEMM kernel for SM90, written by w4a16gen.
#include "native/launch.cuh"

namespace w4a16 {

struct w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent
    : native::Shape<64, 16, 128,  // CTA: channels, tokens, k
                    4,  // consumer warpgroups
                    1, 1, 2,  // cluster: channels, tokens, k
                    false,  // stream-K
                    W4A16_FINEGRAINED_SCALE_ONLY> {};

extern const Kernel w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent_kernel;
const Kernel w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent_kernel =
    native::make_kernel<w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent>("w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent");

}  // namespace w4a16
