// From accumulators to the output: directly from registers, or through shared memory.
#pragma once

#include "native/finish.cuh"

namespace w4a16::native {

// Stores directly from registers. 8x8 transpositions turn a thread's tokens into channels, and neighbouring lanes swap
// two of them. A warp then writes 16 channels of a token at once: whole sectors of 32 bytes, which L2 need not read
// first.
template <class S>
__device__ inline void store_from_registers(const Parameters& p, const Tile& tile, int rank, const Consumer& me,
                                            const ChannelFactors<S>& factors, const Accumulators<S>& sum) {
  const int upper = me.lane % 2;  // even lanes store the lower 8 channels, odd lanes the upper 8
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const int first = first_channel<S>(tile, me, f) + me.warp * 16;
    const PairOfChannels<S> channels(p, tile, first + me.lane / 4, factors.value[f]);
#pragma unroll
    for (int group = 0; group < S::Tokens / 8; ++group) {
      if (!owns_piece<S>(me, group * S::Fragments + f)) continue;
      if (S::ClusterK > 1 && owner_of<S>(me, group) != rank) continue;
      const uint32_t two[2] = {transpose_8x8(channels.outputs(sum[f], group, 0)),
                               transpose_8x8(channels.outputs(sum[f], group, 1))};
      const uint32_t neighbours = __shfl_xor_sync(0xffffffff, upper ? two[0] : two[1], 1);
      const uint2 four = upper ? make_uint2(neighbours, two[1]) : make_uint2(two[0], neighbours);
      const int channel = first + upper * 8 + me.lane % 4 / 2 * 4;
      const int token = tile.token + group * 8 + me.lane / 4;
      if (token < end_token<S>(p, tile) && channel < p.n) {
        *reinterpret_cast<uint2*>(p.output_pointer + static_cast<int64_t>(token) * p.n + channel) = four;
      }
    }
  }
}

// Stores through shared memory, from which the copy engine writes whole rows of 128 bytes while the next tile is
// computed. Shared memory holds the whole tile: all CTAs store at about the same time, and waiting for L2 to take a
// part of it, to reuse its place, would leave the tensor cores idle.
template <class S>
__device__ inline void store_through_shared(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                                            const Consumer& me, const ChannelFactors<S>& factors,
                                            const Accumulators<S>& sum) {
  constexpr int kGroups = S::StoredTokens / 8;
  constexpr bool kInPairs = S::WarpgroupsK == 1 && kGroups % 2 == 0;  // 16 tokens at a time
  constexpr int kThreads = S::WarpgroupsK * kWarpgroup;
  const uint32_t boxes = shared.output(me.warpgroup_m);
  const int barrier = kWarpgroupBarrier + me.warpgroup_m;
  // The lane's row for stmatrix: matrices 0 and 1 are 8 tokens of the lower and upper 8 channels, 2 and 3 the next 8.
  const int row = (kInPairs ? me.lane / 16 * 8 : 0) + me.lane % 8;
  const int piece = (me.warp * 2 + me.lane / 8 % 2) ^ (me.lane % 8);  // 128-byte swizzle
  const uint32_t offset = row * 128 + piece * 16;
  if constexpr (S::StreamK) await_output_place<S>(me);  // others did while the last products ran
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const PairOfChannels<S> channels(p, tile, first_channel<S>(tile, me, f) + me.warp * 16 + me.lane / 4,
                                     factors.value[f]);
#pragma unroll
    for (int group = 0; group < S::Tokens / 8; group += kInPairs ? 2 : 1) {
      if (S::ClusterK > 1 && group / kGroups != rank) continue;
      const uint32_t to = boxes + f * S::BoxBytes + offset + group % kGroups * 8 * 128;
      if constexpr (kInPairs) {
        const uint32_t matrices[4] = {channels.outputs(sum[f], group, 0), channels.outputs(sum[f], group, 1),
                                      channels.outputs(sum[f], group + 1, 0), channels.outputs(sum[f], group + 1, 1)};
        store_transposed(to, matrices);
      } else if (owns_piece<S>(me, group * S::Fragments + f)) {
        const uint32_t matrices[2] = {channels.outputs(sum[f], group, 0), channels.outputs(sum[f], group, 1)};
        store_transposed(to, matrices);
      }
    }
    async_proxy_fence();
    named_barrier(barrier, kThreads);
    if (copies_output(me)) {
      const int token = tile.token + (S::ClusterK > 1 ? rank * S::StoredTokens : 0);
      tensor_store(&p.output, first_channel<S>(tile, me, f), token, boxes + f * S::BoxBytes);
    }
  }
}

// Stores a tile. A kernel has the code of one epilogue. With a branch between two, plain products of few tokens took
// longer by 1 %, because their instructions lay far from the main loop's.
template <class S>
__device__ inline void store(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                             const Consumer& me, const ChannelFactors<S>& factors, const Accumulators<S>& sum) {
  if constexpr (S::HasEpilogue) {
    finish<S>(p, shared, tile, rank, me, factors, sum);
  } else if constexpr (S::StoresThroughShared) {
    store_through_shared<S>(p, shared, tile, rank, me, factors, sum);
  } else {
    store_from_registers<S>(p, tile, rank, me, factors, sum);
  }
}

}  // namespace w4a16::native
