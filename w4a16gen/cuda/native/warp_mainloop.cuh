// The main loop of kernels for few tokens, whose warps multiply independently with mma.sync.
//
// A WGMMA of 8 tokens is short, and the four warps of a warpgroup wait for each other around it. Here no warp waits for
// another. The fragments are the same: an A fragment of mma.m16n8k16, and its accumulators, are one warp's part of
// those of WGMMA (PTX ISA, "Matrix Fragments for mma.m16n8k16").
#pragma once

#include "native/mainloop.cuh"
#include "native/mma_sync.cuh"

namespace w4a16::native {

// The B fragments of a stage's activations, indexed by 64 k, 8 tokens and 32 k.
template <class S>
struct Activations {
  static constexpr int kGroups = S::Tokens / 8;
  uint32_t matrices[2][kGroups][2][4];

  // `row` is the lane's row of the first four matrices. An offset of 32 k is one of 64 bytes before the swizzle, which
  // is an exclusive or.
  __device__ void load(uint32_t row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          load_matrices((row ^ pair * 64) + half * S::HalfActivationBytes + group * 8 * 128,
                        matrices[half][group][pair]);
        }
      }
    }
  }
};

// Accumulates this warp's stages of one tile. Two or four successive k16 steps have separate accumulators, which are
// added at the end, so that no mma waits for the previous one.
template <class S, int Rows>
__device__ inline void consume_stages_by_warps(const Shared<S>& shared, int stages, const Consumer& me,
                                               Position<S::Stages>& at, Accumulators<S>& sum) {
  constexpr int kGroups = S::Tokens / 8;
  constexpr int kSteps = 4;
  constexpr int kParts = kGroups > 1 ? 2 : 4;  // the same number of registers with 16 tokens as with 8
  float parts[kParts][S::Fragments][kGroups][4] = {};
  const uint32_t lane_row = me.lane % 8 * 128 + (me.lane / 8 ^ me.lane % 8) * 16;  // 128-byte swizzle
#pragma unroll 1
  for (; stages > 0; --stages) {
    const int slot = at.slot;
    barrier_wait(shared.full(slot), at.phase);
    const uint32_t weights = shared.weights(slot) + me.warpgroup_m * S::Fragments * S::BlockBytes;
    Packed<S, Rows> packed[S::Fragments][2];
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
      packed[f][0].load(weights + f * S::BlockBytes, me, 0);
      packed[f][1] = packed[f][0];
      packed[f][1].load(weights + f * S::BlockBytes, me, 1);
    }
    Activations<S> activations;
    activations.load(shared.activations(slot) + lane_row);
    __syncwarp();
    release<S>(shared, slot, me.lane);
    at.advance(S::WarpgroupsK);
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Fragments fragments;
        packed[f][half].dequantize_into(fragments);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            const auto& pair = activations.matrices[half][group][step / 2];
            multiply_by_warp(parts[step % kParts][f][group], fragments[step], pair[step % 2 * 2],
                             pair[step % 2 * 2 + 1]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
    for (int i = 0; i < S::Tokens / 2; ++i) {
      const auto part = [&](int step) { return parts[step][f][i / 4][i % 4]; };
      sum[f][i] = part(0) + part(1);
      if constexpr (kParts == 4) sum[f][i] += part(2) + part(3);
    }
  }
}

}  // namespace w4a16::native
