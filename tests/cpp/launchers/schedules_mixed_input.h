// The schedules of CUTLASS until 3.6.
#pragma once

namespace cutlass::gemm {
struct KernelTmaWarpSpecializedCooperativeMixedInput {};
struct KernelTmaWarpSpecializedPingpongMixedInput {};
}  // namespace cutlass::gemm
