// Which part of a CTA's work each thread has, and the named barriers at which the roles meet.
#pragma once

#include "native/shape.h"

namespace w4a16::native {

// The part of a CTA's work that a consumer thread has.
struct Consumer {
  int warpgroup_m;
  int warpgroup_k;
  int warp;  // in its warpgroup
  int lane;
};

template <class S>
__device__ inline Consumer consumer_at(int thread) {
  const int warp = __shfl_sync(0xffffffff, thread / kWarp, 0);
  const int warpgroup = warp / 4 - 1;  // the first warpgroup is the producers'
  return {warpgroup % S::WarpgroupsM, warpgroup / S::WarpgroupsM, warp % 4, thread % kWarp};
}

// Numbers of named barriers. Number 0 belongs to __syncthreads.
constexpr int kConsumersBarrier = 1;
constexpr int kWarpgroupBarrier = 2;  // the first of one per warpgroup along the channels
constexpr int kFixupBarrier = 6;

// The fp32 accumulators of one consumer thread.
template <class S>
using Accumulators = float[S::Fragments][S::Tokens / 2];

// The rank of the CTA that stores a warp's channels of a group of 8 tokens, in a cluster that splits K.
template <class S>
__device__ inline int owner_of(const Consumer& me, int group) {
  return S::DividesOutputByTokens ? group / (S::Tokens / 8 / S::ClusterK) : me.warp / (4 / S::ClusterK);
}

// Whether this warpgroup, of those that split K, owns the result of a piece (reduce.cuh).
template <class S>
__device__ inline bool owns_piece(const Consumer& me, int piece) {
  return S::WarpgroupsK == 1 || piece % S::WarpgroupsK == me.warpgroup_k;
}

}  // namespace w4a16::native
