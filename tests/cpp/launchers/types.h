// Stand-ins of the types that the launcher takes.
#pragma once

#include <cstddef>

#include "schedules.h"

struct half {};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
namespace cutlass {
struct uint4b_t {};
enum class WeightOnlyQuantOp { PER_COLUMN_SCALE_ONLY, FINEGRAINED_SCALE_ONLY, FINEGRAINED_SCALE_AND_ZEROS };
namespace epilogue {
struct TmaWarpSpecializedCooperative {};
struct TmaWarpSpecialized {};
}  // namespace epilogue
}  // namespace cutlass
namespace cute {
template <int V>
struct Int {};
template <class... T>
struct Shape {};
}  // namespace cute
