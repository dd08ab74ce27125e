// The channels of a consumer thread, with their factors and biases.
#pragma once

#include "native/dequantize.cuh"
#include "native/pipeline.cuh"
#include "native/roles.cuh"

namespace w4a16::native {

// The first of a consumer's 64 channels in one of its fragments.
template <class S>
__device__ inline int first_channel(const Tile& tile, const Consumer& me, int fragment) {
  return (tile.channel_block + me.warpgroup_m * S::Fragments + fragment) * kBlockChannels;
}

// The factors of the channels of a tile's weight.
template <class S>
__device__ inline const float* channel_factors(const Parameters& p, const Tile& tile) {
  return p.channel_factors + expert_offset<S>(p, tile) / static_cast<int>(sizeof(float));
}

// Factors of a consumer thread's channels: alpha times the weight's own. A thread has two channels of every fragment,
// 16 * warp + lane / 4 and the one 8 above (PTX ISA, "Register Fragments for wgmma.mma_async"). They are loaded before
// the main loop, which hides the latency, unless registers are short.
template <class S>
struct ChannelFactors {
  float value[S::Fragments][2];

  __device__ void load(const Parameters& p, const Tile& tile, const Consumer& me) {
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int channel = first_channel<S>(tile, me, f) + me.warp * 16 + upper * 8 + me.lane / 4;
        value[f][upper] = channel < p.n ? load_constant(channel_factors<S>(p, tile) + channel) : 0.f;
      }
    }
  }
};

template <class S>
__device__ inline float channel_bias(const Parameters& p, const Tile& tile, int channel) {
  const int64_t first = S::Grouped ? int64_t{tile.expert} * p.n : 0;
  return p.bias != nullptr && channel < p.n ? __half2float(p.bias[first + channel]) : 0.f;
}

// The two channels, 8 apart, of a thread's accumulators in one fragment.
template <class S>
struct PairOfChannels {
  float factor[2];
  float bias[2];

  __device__ PairOfChannels(const Parameters& p, const Tile& tile, int lower, const float* factors)
      : PairOfChannels(p, tile, lower, lower + 8, factors) {}

  // With biases that stand elsewhere than the channels.
  __device__ PairOfChannels(const Parameters& p, const Tile& tile, int lower_bias, int upper_bias, const float* factors)
      : factor{p.alpha * factors[0], p.alpha * factors[1]},
        bias{channel_bias<S>(p, tile, lower_bias), channel_bias<S>(p, tile, upper_bias)} {}

  __device__ float output(float sum, int upper) const { return fmaf(factor[upper], sum, bias[upper]); }

  // The outputs of two tokens: accumulator 4 * j + 2 * upper + i belongs to token 8 * j + 2 * (lane % 4) + i.
  template <int Count>
  __device__ uint32_t outputs(const float (&sum)[Count], int j, int upper) const {
    const float* two = &sum[4 * j + 2 * upper];
    return as_bits(__floats2half2_rn(output(two[0], upper), output(two[1], upper)));
  }
};

// Makes two words of one token each, with two lower and two upper channels, into four channels of one of these kinds:
// even lanes get the lower ones, odd lanes the upper ones.
__device__ inline uint2 exchange_halves(uint32_t lower, uint32_t upper, int lane) {
  const bool takes_upper = lane % 2 != 0;
  const uint32_t neighbours = __shfl_xor_sync(0xffffffff, takes_upper ? lower : upper, 1);
  return takes_upper ? make_uint2(neighbours, upper) : make_uint2(lower, neighbours);
}

}  // namespace w4a16::native
