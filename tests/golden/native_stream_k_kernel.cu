// One FP16 x uint4 GEMM kernel for SM90, written by w4a16gen.
#include "native/launch.cuh"

namespace w4a16 {

struct w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_streamk
    : native::Shape<256, 64, 128,  // CTA: channels, tokens, k
                    2,  // consumer warpgroups
                    1, 1, 1,  // cluster: channels, tokens, k
                    true,  // stream-K
                    W4A16_FINEGRAINED_SCALE_AND_ZEROS> {};

extern const Kernel w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_streamk_kernel;
const Kernel w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_streamk_kernel =
    native::make_kernel<w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_streamk>("w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_streamk");

}  // namespace w4a16
