// The schedules of CUTLASS since 3.6.
#pragma once

namespace cutlass::gemm {
struct KernelTmaWarpSpecializedCooperative {};
struct KernelTmaWarpSpecializedPingpong {};
}  // namespace cutlass::gemm
