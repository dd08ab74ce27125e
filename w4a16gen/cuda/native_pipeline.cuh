// The ring of stages: where each lies in shared memory, which tile and k it holds, and the two threads that fill it.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include "native_ptx.cuh"
#include "native_shape.cuh"

namespace w4a16::native {

constexpr int kRasterTokens = 8;  // token tiles that are swept together over all channels, to share L2

struct Parameters {
  CUtensorMap activations;
  CUtensorMap output;
  const uint8_t* weights;
  const float* channel_factors;
  const half* bias;
  half* output_pointer;
  int m;
  int n;
  int k_blocks;
  int channel_blocks;
  int block_bytes;
  int channel_tiles;  // tiles of a whole cluster
  int token_tiles;
  float alpha;
};

// A place in the ring: which slot, and the parity of how often it came round.
template <int Stages>
struct Position {
  int slot = 0;
  uint32_t phase = 0;

  // By at most Stages.
  __device__ void advance(int by) {
    slot += by;
    if (slot >= Stages) {
      slot -= Stages;
      phase ^= 1;
    }
  }
};

// Where everything lies in shared memory, which starts at a multiple of 1024 bytes, as tiles with 128-byte swizzle
// must.
template <class S>
struct Shared {
  uint32_t base;

  __device__ explicit Shared(const void* memory) : base(shared_address(memory)) {}

  static constexpr int kOutput = S::Stages * S::ActivationBytes;
  static constexpr int kWeights = kOutput + S::OutputBytes;
  static constexpr int kPartials = kWeights + S::Stages * S::WeightBytes;
  static constexpr int kReceived = kPartials + S::PartialBytes;
  static constexpr int kBarriers = kReceived + 2 * S::ReceivedBytes;

  __device__ uint32_t activations(int slot) const { return base + slot * S::ActivationBytes; }
  __device__ uint32_t weights(int slot) const { return base + kWeights + slot * S::WeightBytes; }
  __device__ uint32_t output(int warpgroup) const { return base + kOutput + warpgroup * 2 * S::BoxBytes; }
  __device__ uint32_t partials() const { return base + kPartials; }
  __device__ uint32_t received(int buffer) const { return base + kReceived + buffer * S::ReceivedBytes; }
  __device__ uint32_t full(int slot) const { return base + kBarriers + slot * 8; }
  __device__ uint32_t empty(int slot) const { return base + kBarriers + (S::Stages + slot) * 8; }
  // Of sums from the cluster.
  __device__ uint32_t arrived(int buffer) const { return base + kBarriers + (2 * S::Stages + buffer) * 8; }
};

// One output tile, and the range of k blocks that this CTA sums.
struct Tile {
  int channel_block;
  int token;
  int first_block;
  int blocks;
};

// The tile that this CTA, of this rank in its cluster, computes when its cluster works on tile `index`.
template <class S>
__device__ inline Tile tile_at(const Parameters& p, int index, int rank) {
  int first = 0;
  int blocks = p.k_blocks;
  if constexpr (S::ClusterK > 1) {
    first = p.k_blocks * rank / S::ClusterK;
    blocks = p.k_blocks * (rank + 1) / S::ClusterK - first;
  }
  int channel_tile = index;
  int token_tile = 0;
  // Divisions cost hundreds of cycles before the first copy: with few tokens there is nothing to divide.
  if (p.token_tiles > 1) {
    const int per_sweep = kRasterTokens * p.channel_tiles;
    const int sweep = index / per_sweep;
    const int within = index - sweep * per_sweep;
    const int tokens = min(p.token_tiles - sweep * kRasterTokens, kRasterTokens);
    channel_tile = within / tokens;
    token_tile = sweep * kRasterTokens + within - channel_tile * tokens;
  }
  if constexpr (S::Multicasts) {
    channel_tile = channel_tile * S::ClusterChannels + rank % S::ClusterChannels;
    token_tile = token_tile * S::ClusterTokens + rank / S::ClusterChannels;
  }
  return {channel_tile * S::Blocks, token_tile * S::Tokens, first, blocks};
}

// CTAs whose shared memory a copy of this CTA fills, as bits of their ranks. They take turns: of `count` stages one
// after the other, this CTA copies those whose number leaves the remainder `turn`.
struct Sharers {
  uint16_t receivers;
  int count;
  int turn;

  __device__ bool is_turn(int stage) const { return stage % count == turn; }
};

// The first weights of each of the CTA's rows of blocks.
template <class S>
struct WeightRows {
  const uint8_t* block[S::Blocks];

  __device__ WeightRows(const Parameters& p, const Tile& tile) {
    const int64_t row = static_cast<int64_t>(p.k_blocks) * p.block_bytes;
#pragma unroll
    for (int b = 0; b < S::Blocks; ++b) {
      // Blocks past the last channel are fetched as copies of the last one and never stored: all stages are of one
      // size.
      const int from = min(tile.channel_block + b, p.channel_blocks - 1);
      block[b] = p.weights + from * row + static_cast<int64_t>(tile.first_block) * p.block_bytes;
    }
  }
};

// Fetches the weights of one of a tile's stages into a slot that is free in all CTAs that receive them.
template <class S>
__device__ inline void fetch_weights(const Parameters& p, const Shared<S>& shared, const WeightRows<S>& rows, int stage,
                                     int slot, bool is_turn, uint16_t receivers) {
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
      bulk_copy<S::ClusterTokens>(to, from, header + S::Halves * S::HalfNibbleBytes, full, receivers);
    } else {  // the second half of a block lies apart from its scales
      if (S::Scales) bulk_copy<S::ClusterTokens>(to, from, header, full, receivers);
      bulk_copy<S::ClusterTokens>(to + header, from + header + S::HalfNibbleBytes, S::HalfNibbleBytes, full, receivers);
    }
  }
}

// The same for activations.
template <class S>
__device__ inline void fetch_activations(const Parameters& p, const Shared<S>& shared, const Tile& tile, int stage,
                                         int slot, bool is_turn, uint16_t receivers) {
  const uint32_t full = shared.full(slot);
  barrier_arrive_expecting(full, S::ActivationBytes);
  if (!is_turn) return;
  const int k = tile.first_block * kBlockK + stage * S::K;
#pragma unroll
  for (int half = 0; half < S::Halves; ++half) {
    tensor_copy<S::ClusterChannels>(shared.activations(slot) + half * S::HalfActivationBytes, &p.activations,
                                    k + half * 64, tile.token, full, receivers);
  }
}

}  // namespace w4a16::native
