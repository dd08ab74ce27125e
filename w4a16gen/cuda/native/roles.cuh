// Which part of a CTA's work each thread has, and the named barriers at which the roles meet.
#pragma once

#include "native/shape.h"

namespace w4a16::native {

// Which part of the CTA's work a consumer thread has.
struct Consumer {
  int warpgroup_m;
  int warpgroup_k;
  int warp;  // in its warpgroup
  int lane;
};

template <class S>
__device__ inline Consumer consumer_at(int thread) {
  const int warp = __shfl_sync(0xffffffff, thread / kWarp, 0);
  const int warpgroup = warp / 4 - 1;  // the first is the producers'
  return {warpgroup % S::WarpgroupsM, warpgroup / S::WarpgroupsM, warp % 4, thread % kWarp};
}

// Named barriers, beside 0, which is __syncthreads.
constexpr int kConsumersBarrier = 1;
constexpr int kWarpgroupBarrier = 2;  // and the following, one for each warpgroup along the channels
constexpr int kFixupBarrier = 6;

template <class S>
using Accumulators = float[S::Fragments][S::Tokens / 2];

}  // namespace w4a16::native
