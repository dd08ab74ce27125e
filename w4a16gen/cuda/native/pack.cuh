// Packs a canonical weight into layout `fragment_blocks_v2` on the GPU, as w4a16gen/weights/layouts/fragments.py does
// on the host.
#pragma once

#include <cuda_fp16.h>

#include "library/kernel.h"
#include "native/layout.h"

namespace w4a16::native {

struct PackParameters {
  const uint8_t* q;    // [n, k], one value per byte
  const half* scales;  // [groups, n]
  const half* zeros;   // [groups, n], or null
  uint8_t* packed;
  float* factors;    // of channels, inside `packed`
  uint32_t* faults;  // W4A16_FAULT_ bits are set here; may be null
  int n;
  int k;
  int groups;
  int group_size;
  int k_blocks;
  int block_bytes;
  int scale_rows;
  bool gated;

  // The channel of the canonical weight that is packed as `channel`.
  __device__ int source(int channel) const { return gated ? gated_source(channel, n) : channel; }
};

__device__ inline void report_fault(const PackParameters& p, uint32_t fault) {
  if (p.faults != nullptr) atomicOr(p.faults, fault);
}

// One thread per channel, padding included.
template <int Mode>
__global__ void pack_factors(const PackParameters p, int channels) {
  constexpr bool kZeros = Mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS;
  const int channel = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (channel >= channels) return;
  float factor = 0.f;
  bool finite = true;
  if (channel < p.n) {
    if constexpr (Mode == W4A16_PER_COLUMN_SCALE_ONLY) {
      const float scale = __half2float(p.scales[p.source(channel)]);
      finite = isfinite(scale);
      factor = ldexpf(scale, -unit_exponent(channel, false));
    } else {
      float largest = 0.f;
      for (int group = 0; group < p.groups; ++group) {
        const int64_t at = static_cast<int64_t>(group) * p.n + p.source(channel);
        const float scale = __half2float(p.scales[at]);
        finite = finite && isfinite(scale);
        if constexpr (kZeros) finite = finite && isfinite(__half2float(p.zeros[at]));
        largest = fmaxf(largest, fabsf(scale));
      }
      int exponent = 0;
      frexpf(largest, &exponent);
      const int excess = largest > 0.f ? exponent - max_scale_exponent(kZeros) : 0;
      factor = ldexpf(1.f, excess > 0 ? excess : 0);
    }
  }
  if (!finite) report_fault(p, W4A16_FAULT_NOT_FINITE);
  p.factors[channel] = factor;
}

constexpr int kPackThreads = 2 * 128;  // each writes the four words of one consumer thread for 64 k
constexpr int kTilePitch = kBlockK + 8;

// Loads 64 channels x 128 k into shared memory, eight values at a time. Padding is 8, which stands for a weight of 0.
__device__ inline void load_tile(const PackParameters& p, uint8_t (*tile)[kTilePitch], int first_channel, int first_k) {
  constexpr int kPieces = kBlockK / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockChannels * kPieces; i += kPackThreads) {
    const int row = i / kPieces;
    const int column = i % kPieces * 8;
    uint2 values = make_uint2(0x08080808, 0x08080808);
    if (first_channel + row < p.n && first_k + column < p.k) {
      const int64_t source = p.source(first_channel + row);
      values = *reinterpret_cast<const uint2*>(p.q + source * p.k + first_k + column);
      if (((values.x | values.y) & 0xf0f0f0f0) != 0) report_fault(p, W4A16_FAULT_VALUE);
    }
    *reinterpret_cast<uint2*>(&tile[row][column]) = values;
  }
}

// Writes a block's rows of scales or of zeros, times each channel's power of two.
template <bool Zeros>
__device__ inline void pack_rows(const PackParameters& p, const half* values, bool are_scales, half* rows) {
  const int k_block = static_cast<int>(blockIdx.x);
  for (int i = static_cast<int>(threadIdx.x); i < p.scale_rows * kBlockChannels; i += kPackThreads) {
    const int row = i / kBlockChannels;
    const int in_block = i % kBlockChannels;
    const int channel = static_cast<int>(blockIdx.y) * kBlockChannels + in_block;
    half packed = __float2half(0.f);
    if (channel < p.n) {
      const int group = min((k_block * kBlockK + row * (kBlockK / p.scale_rows)) / p.group_size, p.groups - 1);
      const int exponent = -ilogbf(p.factors[channel]) - (are_scales ? unit_exponent(channel, Zeros) : 0);
      const float wanted =
          ldexpf(__half2float(values[static_cast<int64_t>(group) * p.n + p.source(channel)]), exponent);
      packed = __float2half(wanted);
      if (__half2float(packed) != wanted) report_fault(p, W4A16_FAULT_RANGE);
    }
    rows[row * kBlockChannels + scale_index(in_block)] = packed;
  }
}

// One CTA per block of 64 channels x 128 k.
template <int Mode>
__global__ void __launch_bounds__(kPackThreads) pack_blocks(const PackParameters p) {
  constexpr bool kZeros = Mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS;
  __shared__ __align__(16) uint8_t tile[kBlockChannels][kTilePitch];
  const int64_t block_index = static_cast<int64_t>(blockIdx.y) * p.k_blocks + blockIdx.x;
  uint8_t* block = p.packed + block_index * p.block_bytes;
  load_tile(p, tile, static_cast<int>(blockIdx.y) * kBlockChannels, static_cast<int>(blockIdx.x) * kBlockK);
  if constexpr (Mode != W4A16_PER_COLUMN_SCALE_ONLY) {
    auto* rows = reinterpret_cast<half*>(block);
    pack_rows<kZeros>(p, p.scales, true, rows);
    if constexpr (kZeros) pack_rows<kZeros>(p, p.zeros, false, rows + p.scale_rows * kBlockChannels);
  }
  __syncthreads();
  const int half_of_k = static_cast<int>(threadIdx.x) / 128;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t words[4];
  for (int word = 0; word < 4; ++word) {
    words[word] = 0;
#pragma unroll
    for (int position = 0; position < 8; ++position) {
      const Nibble at = nibble_at(half_of_k, warp, lane, word, position);
      const uint32_t value = tile[at.channel][at.k] & 15u;
      words[word] |= __funnelshift_l(value, value, bit_of(position));
    }
  }
  uint8_t* to = block + (p.block_bytes - kNibbleBytes) + words_offset(half_of_k, warp, lane);
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Launches the packing of a whole weight and does not wait for it.
template <int Mode>
cudaError_t pack(const Problem& problem, const w4a16_pack_arguments& given) {
  const PackedLayout layout(problem, Mode);
  auto* packed = static_cast<uint8_t*>(given.packed);
  PackParameters p{};
  p.q = static_cast<const uint8_t*>(given.q);
  p.scales = static_cast<const half*>(given.scales);
  p.zeros = static_cast<const half*>(given.zeros);
  p.packed = packed;
  p.factors = reinterpret_cast<float*>(packed + layout.channel_factors_offset);
  p.faults = static_cast<uint32_t*>(given.faults);
  p.n = static_cast<int>(problem.n);
  p.k = static_cast<int>(problem.k);
  p.groups = static_cast<int>(problem.k / problem.group_size);
  p.group_size = static_cast<int>(problem.group_size);
  p.k_blocks = layout.k_blocks;
  p.block_bytes = layout.block_bytes;
  p.scale_rows = layout.scale_rows;
  p.gated = given.gated != 0;
  const auto stream = static_cast<cudaStream_t>(given.stream);
  const int channels = layout.channel_blocks * kBlockChannels;
  cudaGetLastError();  // forget the failure of an earlier call, which is not this launch's
  pack_factors<Mode><<<(channels + kPackThreads - 1) / kPackThreads, kPackThreads, 0, stream>>>(p, channels);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(layout.k_blocks), static_cast<unsigned>(layout.channel_blocks));
  pack_blocks<Mode><<<grid, kPackThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace w4a16::native
