// The ring of stages: its place in shared memory, and the copies that fill it.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "native/activation.h"
#include "native/choices.cuh"
#include "native/tiles.h"

namespace w4a16::native {

struct Parameters {
  CUtensorMap activations;
  CUtensorMap output;
  // The first copies of a launch wait for these members, up to `tiling.by_channel_tiles`. They fill one line of 64
  // bytes. Only stream-K and grouped products need more.
  const uint8_t* weights;
  int block_bytes;
  int channel_blocks;
  int activation_bytes;  // of a stage, where out-of-bounds rows are not copied
  bool is_dependent;
  bool list_is_complete;     // grouped: before the previous kernel asked for this one
  bool routes_are_unsorted;  // grouped: there is no list
  bool rows_are_shared;      // of unsorted routes: every expert multiplies the same rows
  Tiling tiling;
  const float* channel_factors;
  const half* bias;
  half* output_pointer;
  int m;
  int n;
  float alpha;
  bool dependents_start_early;
  uint8_t* workspace;             // stream-K: the partial sums of every work unit
  uint64_t epoch;                 // stream-K: the value of a flag whose sums are complete, unique to this launch
  const TokenTiles* token_tiles;  // grouped
  int64_t expert_bytes;           // grouped: from one expert's packed weight to the next
  Ids ids;                        // grouped, of unsorted routes
  // Of kernels with an epilogue. They come last, so that the others find theirs where they were.
  CUtensorMap residual;          // of the output's boxes
  const half* residual_pointer;  // of the output's shape, possibly the output itself; or null
  Activation activation;
};

static_assert(offsetof(Parameters, weights) % 64 == 0 &&
                  offsetof(Parameters, tiling) + offsetof(Tiling, split_tiles) == offsetof(Parameters, weights) + 64,
              "what the first copies need fills a line");

// The bytes from the first expert's weights to those of a tile.
template <class S>
__device__ inline int64_t expert_offset(const Parameters& p, const Tile& tile) {
  return S::Grouped ? tile.expert * p.expert_bytes : 0;
}

// The first token that a tile must not store.
template <class S>
__device__ inline int end_token(const Parameters& p, const Tile& tile) {
  return S::Grouped ? tile.end_token : p.m;
}

// compute-sanitizer's racecheck does not understand some of the synchronisation. -DW4A16_RACECHECK replaces it.
#ifdef W4A16_RACECHECK
constexpr bool kForRacecheck = true;
#else
constexpr bool kForRacecheck = false;
#endif

// Lanes of a warp that release a slot. Racecheck sees no order for the reads of lanes that do not arrive themselves.
constexpr int kReleasingLanes = kForRacecheck ? kWarp : 1;

// Whether the CTAs of a cluster that splits K wait for each other only where a role first needs it. Racecheck turns
// that wait into a barrier of all threads, where consumers and producers would deadlock.
constexpr bool kWaitsLate = !kForRacecheck;

// A position in the ring: a slot, and the parity of the ring's round.
template <int Stages>
struct Position {
  int slot = 0;
  uint32_t phase = 0;

  // Advances by at most Stages.
  __device__ void advance(int by) {
    slot += by;
    if (slot >= Stages) {
      slot -= Stages;
      phase ^= 1;
    }
  }
};

// Addresses in shared memory, which starts at a multiple of 1024 bytes as the 128-byte swizzle needs.
template <class S>
struct Shared {
  uint32_t base;

  __device__ explicit Shared(const void* memory) : base(shared_address(memory)) {}

  static constexpr int kOutput = S::Stages * S::ActivationBytes;
  static constexpr int kWeights = kOutput + S::OutputBytes;
  static constexpr int kPartials = kWeights + S::Stages * S::WeightBytes;
  static constexpr int kReceived = kPartials + S::PartialBytes;
  static constexpr int kBarriers = kReceived + 2 * S::ReceivedBytes;
  static constexpr int kExperts = kBarriers + S::BarrierBytes - kMaxUnsortedRoutes * 2;
  static_assert(!S::FindsExperts || kBarriers + (2 * S::Stages + 3) * 8 <= kExperts, "experts lie behind the barriers");

  __device__ uint32_t activations(int slot) const { return base + slot * S::ActivationBytes; }
  __device__ uint32_t weights(int slot) const { return base + kWeights + slot * S::WeightBytes; }
  __device__ uint32_t output(int warpgroup) const { return base + kOutput + warpgroup * S::Fragments * S::BoxBytes; }
  __device__ uint32_t partials() const { return base + kPartials; }
  __device__ uint32_t received(int buffer) const { return base + kReceived + buffer * S::ReceivedBytes; }
  __device__ uint32_t full(int slot) const { return base + kBarriers + slot * 8; }
  __device__ uint32_t empty(int slot) const { return base + kBarriers + (S::Stages + slot) * 8; }
  // The barrier of partial sums from the cluster.
  __device__ uint32_t arrived(int buffer) const { return base + kBarriers + (2 * S::Stages + buffer) * 8; }
  // The expert with a number, of unsorted routes: 16 bits.
  __device__ uint32_t expert(int number) const { return base + kExperts + number * 2; }
  // The barrier of a tile's residual, where the output goes through shared memory.
  __device__ uint32_t residual() const { return base + kBarriers + (2 * S::Stages + 2) * 8; }
};

// What a CTA works on. Grouped products read the list, which an earlier kernel has written, or the experts of unsorted
// routes. Where that is not the previous kernel, weights are fetched while the previous one still runs. All threads
// call it, and its result is complete behind the next __syncthreads.
template <class S>
__device__ inline Work work_of(const Parameters& p, const Shared<S>& shared, int rank) {
  const auto cta = static_cast<int>(blockIdx.x);
  const auto ctas = static_cast<int>(gridDim.x);
  if constexpr (S::Grouped) {
    if (!p.list_is_complete) wait_for_prerequisites();
    if constexpr (S::FindsExperts) {
      if (p.routes_are_unsorted) {
        const Choices choices(p.ids);
#pragma unroll
        for (int part = 0; part < Choices::kParts; ++part) {
          if (threadIdx.x < kWarp && choices.is_first(part)) {
            store_shared_half(shared.expert(choices.number[part]), choices.expert[part]);
          }
        }
        Work work = S::Scheduler::template work_of<S>(p.tiling, cta, ctas, rank, choices.count());
        work.first_expert = choices.expert_of_number(p.tiling.by_channel_tiles.quotient(work.first_tile));
        return work;
      }
    }
    // The entry of the first tile comes with the number of entries, not after it.
    prefetch_line(S::Scheduler::template first_entry<S>(p.tiling, cta, *p.token_tiles));
    return S::Scheduler::template work_of<S>(p.tiling, cta, ctas, rank, p.token_tiles->count);
  } else {
    return work_of<S>(p.tiling, cta, ctas, rank);
  }
}

template <class S>
__device__ inline Tile tile_at(const Parameters& p, const Shared<S>& shared, const Work& work, int index) {
  if constexpr (S::Grouped) {
    if constexpr (S::FindsExperts) {
      if (p.routes_are_unsorted) {
        const int number = p.tiling.by_channel_tiles.quotient(index);
        const bool is_first = index == work.first_tile;
        const int expert = is_first ? work.first_expert : static_cast<int>(load_shared_half(shared.expert(number)));
        return S::Scheduler::template tile_of<S>(p.tiling, work, index, number, expert, p.m);
      }
    }
    return S::Scheduler::template tile_at<S>(p.tiling, work, index, *p.token_tiles);
  } else {
    return tile_at<S>(p.tiling, work, index);
  }
}

// How the CTAs of a cluster share one operand. A copy of this CTA fills the shared memory of all CTAs in `mask`. The
// `count` CTAs take turns: this one copies the stages whose number has the remainder `turn`.
struct Multicast {
  uint16_t mask;
  int count;
  int turn;

  __device__ bool is_turn(int stage) const { return stage % count == turn; }
};

// The first block of a tile in each of the CTA's rows of blocks.
template <class S>
struct WeightRows {
  const uint8_t* block[S::Blocks];

  __device__ WeightRows(const Parameters& p, const Tile& tile) {
    // In units of kRowBytes, of which a row of blocks has at most 2^29: one multiplication of 32 bits is enough.
    const unsigned block_units = static_cast<unsigned>(p.block_bytes) / kRowBytes;
    const unsigned row_units = p.tiling.k_blocks * block_units;
    const uint8_t* const first = p.weights + expert_offset<S>(p, tile);
#pragma unroll
    for (int b = 0; b < S::Blocks; ++b) {
      // Past the last channel the last row is read again and its results are not stored: all stages have one size.
      const int from = min(tile.channel_block + b, p.channel_blocks - 1);
      block[b] = first + multiply_add_wide(from, row_units, tile.first_block * block_units) * kRowBytes;
    }
  }
};

// Fetches the weights of a stage into a slot that is free in all CTAs of the multicast.
template <class S>
__device__ inline void fetch_weights(const Parameters& p, const Shared<S>& shared, const WeightRows<S>& rows, int stage,
                                     int slot, bool is_turn, uint16_t mask) {
  const uint32_t full = shared.full(slot);
  const int header = p.block_bytes - kNibbleBytes;
  barrier_arrive_expecting(full, S::Blocks * (header + S::Halves * S::HalfNibbleBytes));
  if (!is_turn) return;
  const int64_t offset = static_cast<int64_t>(stage / S::StagesPerBlock) * p.block_bytes;
#pragma unroll
  for (int b = 0; b < S::Blocks; ++b) {
    const uint32_t to = shared.weights(slot) + b * S::BlockBytes;
    const uint8_t* from = rows.block[b] + offset;
    if (stage % S::StagesPerBlock == 0) {
      bulk_copy<S::ClusterTokens>(to, from, header + S::Halves * S::HalfNibbleBytes, full, mask);
    } else {  // the second half of a block does not follow its scales
      if (S::Scales) bulk_copy<S::ClusterTokens>(to, from, header, full, mask);
      bulk_copy<S::ClusterTokens>(to + header, from + header + S::HalfNibbleBytes, S::HalfNibbleBytes, full, mask);
    }
  }
}

// Prefetches the weights of a tile's stages from `begin` on into L2.
template <class S>
__device__ inline void prefetch_weights(const Parameters& p, const Tile& tile, int begin) {
  const WeightRows<S> rows(p, tile);
#pragma unroll 1
  for (int block = begin / S::StagesPerBlock; block < tile.blocks; ++block) {
#pragma unroll
    for (int b = 0; b < S::Blocks; ++b)
      bulk_prefetch(rows.block[b] + static_cast<int64_t>(block) * p.block_bytes, p.block_bytes);
  }
}

// Activations are fetched in two steps: the barrier expects their bytes, then the copies start.
template <class S>
__device__ inline void expect_activations(const Parameters& p, const Shared<S>& shared, int slot) {
  barrier_arrive_expecting(shared.full(slot), S::SkipsOutOfBoundsRows ? p.activation_bytes : S::ActivationBytes);
}

template <class S>
__device__ inline void copy_activations(const Parameters& p, const Shared<S>& shared, const Tile& tile, int stage,
                                        int slot, const Multicast& multicast) {
  if (!multicast.is_turn(stage)) return;
  const uint32_t full = shared.full(slot);
  const int k = tile.first_block * kBlockK + stage * S::K;
  const int token = S::FindsExperts && p.rows_are_shared ? 0 : tile.token;
#pragma unroll
  for (int half = 0; half < S::Halves; ++half) {
    tensor_copy<S::ClusterChannels>(shared.activations(slot) + half * S::HalfActivationBytes, &p.activations,
                                    k + half * 64, token, full, multicast.mask);
  }
}

}  // namespace w4a16::native
