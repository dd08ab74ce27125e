// From a tile's sums to the output: straight from registers, through shared memory, or summed over warpgroups and CTAs.
#pragma once

#include "native_dequantize.cuh"
#include "native_mainloop.cuh"

namespace w4a16::native {

// Where in a tile, counted in channels, a consumer thread's share of the output lies, and its factors: alpha times the
// weight's own. They are read before the main loop, which hides what that takes, unless registers are short.
//
// A thread that stores its own accumulators has two channels of every fragment: 16 * warp + lane / 4 and the one 8
// above it (PTX ISA, "Register Fragments for wgmma.mma_async"). Where sums are reduced, it has four that lie together.
template <class S>
struct ChannelFactors {
  static constexpr int kCount = S::Reduces ? 4 : 2 * S::Fragments;
  float value[kCount];

  __device__ static int channel(const Consumer& me, int index) {
    if constexpr (S::Reduces) return (threadIdx.x - kWarpgroup) % (S::Channels / 4) * 4 + index;
    const int block = me.warpgroup_m * S::Fragments + index / 2;
    return block * kBlockChannels + me.warp * 16 + index % 2 * 8 + me.lane / 4;
  }

  __device__ void load(const Parameters& p, const Tile& tile, const Consumer& me) {
    const int first = tile.channel_block * kBlockChannels;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int of_output = first + channel(me, i);
      value[i] = of_output < p.n ? p.alpha * load_constant(p.channel_factors + of_output) : 0.f;
    }
  }
};

__device__ inline float channel_bias(const Parameters& p, int channel) {
  return p.bias != nullptr && channel < p.n ? __half2float(p.bias[channel]) : 0.f;
}

// The two channels, 8 apart, whose accumulators a thread has in one fragment.
struct PairOfChannels {
  float factor[2];
  float bias[2];

  __device__ PairOfChannels(const Parameters& p, int lower, const float* factors)
      : factor{factors[0], factors[1]}, bias{channel_bias(p, lower), channel_bias(p, lower + 8)} {}

  // Their outputs of tokens 8 * j + 2 * (lane % 4) and the next: accumulator 4 * j + 2 * upper + i is of token
  // 8 * j + 2 * (lane % 4) + i.
  template <int Sums>
  __device__ uint32_t outputs(const float (&sum)[Sums], int j, int upper) const {
    const float* two = &sum[4 * j + 2 * upper];
    return as_bits(
        __floats2half2_rn(fmaf(factor[upper], two[0], bias[upper]), fmaf(factor[upper], two[1], bias[upper])));
  }
};

// Few tokens: 8x8 transpositions turn the tokens of a thread into channels, which it stores.
template <class S>
__device__ inline void store_from_registers(const Parameters& p, const Tile& tile, const Consumer& me,
                                            const ChannelFactors<S>& factors, const Sums<S>& sum) {
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const int first = (tile.channel_block + me.warpgroup_m * S::Fragments + f) * kBlockChannels;
    const PairOfChannels channels(p, first + me.warp * 16 + me.lane / 4, &factors.value[2 * f]);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int channel = first + me.warp * 16 + upper * 8 + me.lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < S::Tokens / 8; ++j) {
        const uint32_t transposed = transpose_8x8(channels.outputs(sum[f], j, upper));
        const int token = tile.token + j * 8 + me.lane / 4;
        if (token < p.m && channel < p.n) {
          *reinterpret_cast<uint32_t*>(p.output_pointer + static_cast<int64_t>(token) * p.n + channel) = transposed;
        }
      }
    }
  }
}

// Many tokens: boxes of 32 tokens x 64 channels go through shared memory, so that the copy engine writes whole rows of
// 128 bytes while the warpgroup fills the other box.
template <class S>
__device__ inline void store_through_shared(const Parameters& p, const Shared<S>& shared, const Tile& tile,
                                            const Consumer& me, const ChannelFactors<S>& factors, const Sums<S>& sum) {
  const uint32_t boxes = shared.output(me.warpgroup_m);
  const int barrier = 2 + me.warpgroup_m;
  const bool stores = me.warp == 0 && me.lane == 0;
  // The lane's row for stmatrix: matrices 0 and 1 are 8 tokens of the lower and upper 8 channels, 2 and 3 the next 8.
  const int row = me.lane / 16 * 8 + me.lane % 8;
  const int piece = (me.warp * 2 + me.lane / 8 % 2) ^ (me.lane % 8);  // 128-byte swizzle
  const uint32_t offset = row * 128 + piece * 16;
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const int first = (tile.channel_block + me.warpgroup_m * S::Fragments + f) * kBlockChannels;
    const PairOfChannels channels(p, first + me.warp * 16 + me.lane / 4, &factors.value[2 * f]);
#pragma unroll
    for (int box = 0; box < S::Tokens / S::BoxTokens; ++box) {
      const uint32_t to = boxes + box % 2 * S::BoxBytes;
      if (stores) wait_for_store_reads<1>();
      named_barrier(barrier, kWarpgroup);
#pragma unroll
      for (int j = 0; j < S::BoxTokens / 8; j += 2) {
        const int group = box * S::BoxTokens / 8 + j;
        const uint32_t matrices[4] = {channels.outputs(sum[f], group, 0), channels.outputs(sum[f], group, 1),
                                      channels.outputs(sum[f], group + 1, 0), channels.outputs(sum[f], group + 1, 1)};
        store_transposed(to + offset + j * 8 * 128, matrices);
      }
      async_proxy_fence();
      named_barrier(barrier, kWarpgroup);
      if (stores) tensor_store(&p.output, first, tile.token + box * S::BoxTokens, to);
    }
  }
}

// Puts one warpgroup's sums of some tokens into shared memory, [token][channel].
template <class S>
__device__ inline void write_partials(uint32_t partials, const Consumer& me, int first_token, const Sums<S>& sum) {
  const uint32_t to = partials + me.warpgroup_k * S::PhaseTokens * S::PartialStride * 4;
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const int channel = (me.warpgroup_m * S::Fragments + f) * kBlockChannels + me.warp * 16 + me.lane / 4;
#pragma unroll
    for (int i = 0; i < S::PhaseTokens / 2; ++i) {
      const int token = i / 4 * 8 + me.lane % 4 * 2 + i % 2;
      store_shared_float(to + (token * S::PartialStride + channel + i / 2 % 2 * 8) * 4, sum[f][first_token / 2 + i]);
    }
  }
}

__device__ inline float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Scales and stores four channels of one token.
__device__ inline void store_four(const Parameters& p, int token, int channel, const float (&factors)[4], float4 sum) {
  if (token >= p.m || channel >= p.n) return;
  const float value[4] = {sum.x, sum.y, sum.z, sum.w};
  float result[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result[i] = fmaf(factors[i], value[i], channel_bias(p, channel + i));
  }
  const uint2 packed =
      make_uint2(as_bits(__floats2half2_rn(result[0], result[1])), as_bits(__floats2half2_rn(result[2], result[3])));
  *reinterpret_cast<uint2*>(p.output_pointer + static_cast<int64_t>(token) * p.n + channel) = packed;
}

// Four channels of one token of the tile, as one thread sums them.
template <class S>
struct Piece {
  int token;    // in the tile
  int channel;  // in the tile
  bool wanted;

  __device__ Piece(int index, int phase, const Tile& tile, int m)
      : token(phase * S::PhaseTokens + index / (S::Channels / 4)),
        channel(index % (S::Channels / 4) * 4),
        wanted(index < S::PhaseTokens * S::Channels / 4 && tile.token + token < m) {}

  // The rank of the CTA that stores it.
  __device__ int owner() const { return channel / S::ShareChannels; }

  // Where the owner receives it from another CTA.
  __device__ uint32_t received_offset(int source, int owner) const {
    const int place = source < owner ? source : source - 1;
    return ((place * S::Tokens + token) * S::ShareChannels + channel % S::ShareChannels) * 4;
  }
};

// Sums over the warpgroups along K and over the cluster, each in a fixed order, and stores.
//
// Each CTA of a cluster stores a share of the channels. It sends the others their shares of its sums, and stores its
// own when theirs have arrived: no CTA reads another's memory, so each may leave as soon as it is done. Two buffers
// suffice: a CTA sends the sums of tile i + 2 after it has received those of tile i + 1, which were sent after tile i
// was stored.
template <class S>
__device__ inline void reduce_and_store(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                                        const Consumer& me, const ChannelFactors<S>& factors, int turn,
                                        const Sums<S>& sum) {
  constexpr int kPieces = S::Channels / 4;  // per token
  static_assert(S::Consumers % kPieces == 0, "a thread's pieces must all be of the channels whose factors it has");
  const int thread = threadIdx.x - kWarpgroup;
  const uint32_t partials = shared.partials();
  const uint32_t received = shared.received(turn % 2);
  const uint32_t arrived = shared.arrived(turn % 2);
  if (S::ClusterK > 1 && thread == 0) {
    const int tokens = min(p.m - tile.token, S::Tokens);
    barrier_arrive_expecting(arrived, (S::ClusterK - 1) * tokens * S::ShareChannels * 4);
  }
  // Each thread sums the same pieces in every turn. Those of the own share wait for the others' sums in registers, or
  // where those are short, in the last phase, in place of a partial sum.
  constexpr int kTurns = (S::PhaseTokens * kPieces + S::Consumers - 1) / S::Consumers;
  constexpr int kPhases = S::Tokens / S::PhaseTokens;
  float4 own[kPhases][kTurns];
  const auto partial = [&](int wk, const Piece<S>& piece) {
    const int row = wk * S::PhaseTokens + piece.token % S::PhaseTokens;
    return partials + (row * S::PartialStride + piece.channel) * 4;
  };
  constexpr bool kOwnInRegisters = S::SpareRegisters && kPhases * kTurns <= 8;
  const auto waits_in_place = [](int phase) { return !kOwnInRegisters && phase == kPhases - 1; };
  const auto store = [&](const Piece<S>& piece, float4 total) {
    const int channel = tile.channel_block * kBlockChannels + piece.channel;
    store_four(p, tile.token + piece.token, channel, factors.value, total);
  };
#pragma unroll
  for (int phase = 0; phase < kPhases; ++phase) {
    // The partial sums before these are read: these may overwrite them.
    if (phase > 0 || turn > 0) named_barrier(1, S::Consumers);
    write_partials<S>(partials, me, phase * S::PhaseTokens, sum);
    named_barrier(1, S::Consumers);
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      const Piece<S> piece(thread + t * S::Consumers, phase, tile, p.m);
      if (!piece.wanted) continue;
      float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int wk = 0; wk < S::WarpgroupsK; ++wk) total = total + load_shared_floats(partial(wk, piece));
      if constexpr (S::ClusterK == 1) {
        store(piece, total);
      } else if (piece.owner() != rank) {
        const uint32_t to = received + piece.received_offset(rank, piece.owner());
        send(address_in_cluster(to, piece.owner()), total, address_in_cluster(arrived, piece.owner()));
      } else if (waits_in_place(phase)) {
        store_shared_floats(partial(0, piece), total);
      } else {
        own[phase][t] = total;
      }
    }
  }
  if constexpr (S::ClusterK > 1) {
    barrier_wait(arrived, turn / 2 % 2);
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase) {
#pragma unroll
      for (int t = 0; t < kTurns; ++t) {
        const Piece<S> piece(thread + t * S::Consumers, phase, tile, p.m);
        if (!piece.wanted || piece.owner() != rank) continue;
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int source = 0; source < S::ClusterK; ++source) {
          if (source != rank) {
            total = total + load_shared_floats(received + piece.received_offset(source, rank));
          } else {
            total = total + (waits_in_place(phase) ? load_shared_floats(partial(0, piece)) : own[phase][t]);
          }
        }
        store(piece, total);
      }
    }
  }
}

}  // namespace w4a16::native
