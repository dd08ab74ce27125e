// The native kernel: C^T = W^T A^T with 4-bit weights as WGMMA's register operand.
//
// One producer warpgroup (a warp for weights, a warp for activations) fills a ring of stages; a stage is 128 k of the
// CTA's channels and tokens. The consumer warpgroups divide the channels, or share them and take stages in turn, which
// splits K within the CTA; the CTAs of a cluster split it again.
#pragma once

#include <cuda.h>

#include "native_dequantize.cuh"
#include "native_layout.h"
#include "native_ptx.cuh"

namespace w4a16::native {

constexpr int kWarpgroup = 128;
constexpr int kSharedBytes = 232448;  // what one CTA of compute capability 9.0 may have
constexpr int kMaxScaledSumTokens = 16;
constexpr int kRasterTokens = 8;  // token tiles that are swept together over all channels, to share L2

struct Parameters {
  CUtensorMap activations;
  const uint8_t* weights;
  const half* channel_scales;
  const half* bias;
  half* output;
  int m;
  int n;
  int k_blocks;
  int channel_blocks;
  int block_bytes;
  int channel_tiles;
  int token_tiles;
  float alpha;
};

template <int Channels_, int Tokens_, int WarpgroupsM_, int WarpgroupsK_, int ClusterK_, int Mode_>
struct Shape {
  static constexpr int Channels = Channels_;
  static constexpr int Tokens = Tokens_;
  static constexpr int WarpgroupsM = WarpgroupsM_;  // consumer warpgroups along channels
  static constexpr int WarpgroupsK = WarpgroupsK_;  // and along K
  static constexpr int ClusterK = ClusterK_;
  static constexpr int Mode = Mode_;
  static constexpr bool Scales = Mode != W4A16_PER_COLUMN_SCALE_ONLY;
  static constexpr bool Zeros = Mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS;
  static constexpr bool Reduces = WarpgroupsK > 1 || ClusterK > 1;

  static constexpr int Blocks = Channels / kBlockChannels;
  static constexpr int Fragments = Blocks / WarpgroupsM;  // of 64 channels, per warpgroup
  static constexpr int Consumers = kWarpgroup * WarpgroupsM * WarpgroupsK;
  static constexpr int Threads = Consumers + kWarpgroup;

  static constexpr int BlockBytes = kNibbleBytes + (Scales ? kMaxScaleRows * kRowBytes * (Zeros ? 2 : 1) : 0);
  static constexpr int WeightBytes = Blocks * BlockBytes;
  static constexpr int HalfBytes = Tokens * 128;  // activations of 64 k: rows of 128 bytes, swizzled
  static constexpr int StageBytes = WeightBytes + 2 * HalfBytes;
  static constexpr int Alignment = 1024;  // of swizzled tiles
  // Weights in flight: enough to cover the memory's latency; a bound chosen, not tuned.
  static constexpr int MaxWeightsInFlight = 72 * 1024;
  static constexpr int Fitting = (kSharedBytes - Alignment - 512) / StageBytes;
  static constexpr int Useful = MaxWeightsInFlight / WeightBytes;
  static constexpr int Wanted = Fitting < Useful ? Fitting : Useful;
  // A slot of the ring must always fall to the same warpgroup along K, which otherwise mistakes the barrier's phase.
  static constexpr int Stages = Wanted / WarpgroupsK * WarpgroupsK;
  // A warpgroup releases a stage while it works on its next one.
  static_assert(Stages >= 2 * WarpgroupsK, "the ring must hold two stages of every warpgroup along K");

  // Partial sums, after the ring's last use and in its place: per warpgroup along K [token][channel], rows padded so
  // that a warp's eight channels of four tokens fall into 32 banks.
  static constexpr int PartialStride = Channels + 4;
  static constexpr int PartialFloats = Tokens * PartialStride;
  static_assert(!Reduces || WarpgroupsK * PartialFloats * 4 <= Stages * StageBytes, "partial sums must fit the ring");

  static constexpr int SharedBytes = Alignment + Stages * StageBytes + Stages * 16;

  // What the warpgroups may have after they divide the registers that the CTA was launched with anew; asking for more
  // than those waits for ever.
  static constexpr int LaunchRegisters = 65536 / Threads / 8 * 8;
  static constexpr int ProducerRegisters = Consumers == 4 * kWarpgroup ? 64 : 56;
  static constexpr int ConsumerRegisters = Consumers == 4 * kWarpgroup ? 104 : 224;
  static_assert(ProducerRegisters * kWarpgroup + ConsumerRegisters * Consumers <= LaunchRegisters * Threads,
                "the warpgroups must not ask for more registers than the CTA was launched with");
  static constexpr int header_bytes(int rows) { return rows * kRowBytes * (Zeros ? 2 : 1); }
  static constexpr bool scales_sums(int rows) {
    return rows == 1 && !Zeros && Tokens <= kMaxScaledSumTokens && (WarpgroupsK < 4 || Tokens > 8);
  }
  static_assert(Blocks % WarpgroupsM == 0, "channels must divide among the warpgroups");
  static_assert(SharedBytes <= kSharedBytes, "the ring must fit shared memory");
};

// The ring's position: which slot, and how often it came round.
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

template <class S>
struct Ring {
  uint32_t base;      // activations [Stages][2][Tokens][64], then weights [Stages][Blocks][BlockBytes]
  uint32_t barriers;  // full [Stages], then empty [Stages]

  __device__ uint32_t activations(int slot) const { return base + slot * 2 * S::HalfBytes; }
  __device__ uint32_t weights(int slot) const { return base + S::Stages * 2 * S::HalfBytes + slot * S::WeightBytes; }
  __device__ uint32_t full(int slot) const { return barriers + slot * 8; }
  __device__ uint32_t empty(int slot) const { return barriers + (S::Stages + slot) * 8; }
};

// One output tile, and the range of k blocks that this CTA sums.
struct Tile {
  int channel_block;
  int token;
  int first_block;
  int blocks;
};

template <class S>
__device__ inline Tile tile_at(const Parameters& p, int index, int rank) {
  const int first = p.k_blocks * rank / S::ClusterK;
  const int blocks = p.k_blocks * (rank + 1) / S::ClusterK - first;
  // Divisions cost hundreds of cycles before the first copy: with few tokens there is nothing to divide.
  if (p.token_tiles == 1) return {index * S::Blocks, 0, first, blocks};
  const int per_sweep = kRasterTokens * p.channel_tiles;
  const int sweep = index / per_sweep;
  const int within = index - sweep * per_sweep;
  const int left = p.token_tiles - sweep * kRasterTokens;
  const int tokens = left < kRasterTokens ? left : kRasterTokens;
  return {within / tokens * S::Blocks, (sweep * kRasterTokens + within % tokens) * S::Tokens, first, blocks};
}

template <class S>
__device__ inline void produce_weights(const Parameters& p, const Ring<S>& ring, const Tile& tile,
                                       Position<S::Stages>& at) {
  // Blocks past the last channel are fetched as copies of the last one and never stored: all stages are of one size.
  const int last = min(S::Blocks, p.channel_blocks - tile.channel_block) - 1;
  const int64_t row = static_cast<int64_t>(p.k_blocks) * p.block_bytes;
  const uint8_t* source = p.weights + tile.channel_block * row + static_cast<int64_t>(tile.first_block) * p.block_bytes;
  for (int i = 0; i < tile.blocks; ++i) {
    barrier_wait(ring.empty(at.slot), at.phase ^ 1);
    barrier_arrive_expecting(ring.full(at.slot), S::Blocks * p.block_bytes);
#pragma unroll
    for (int b = 0; b < S::Blocks; ++b) {
      bulk_copy(ring.weights(at.slot) + b * S::BlockBytes, source + min(b, last) * row, p.block_bytes,
                ring.full(at.slot));
    }
    source += p.block_bytes;
    at.advance(1);
  }
}

template <class S>
__device__ inline void produce_activations(const Parameters& p, const Ring<S>& ring, const Tile& tile,
                                           Position<S::Stages>& at) {
  int k = tile.first_block * kBlockK;
  for (int i = 0; i < tile.blocks; ++i) {
    barrier_wait(ring.empty(at.slot), at.phase ^ 1);
    barrier_arrive_expecting(ring.full(at.slot), 2 * S::HalfBytes);
    tensor_copy(ring.activations(at.slot), &p.activations, k, tile.token, ring.full(at.slot));
    tensor_copy(ring.activations(at.slot) + S::HalfBytes, &p.activations, k + 64, tile.token, ring.full(at.slot));
    k += kBlockK;
    at.advance(1);
  }
}

// The scales of a thread's two channels for one group, from a row in shared memory.
template <class S>
__device__ inline ChannelScales load_scales(uint32_t row, int zeros_offset) {
  ChannelScales scales;
  const half2 pair = as_half2(load_shared_word(row));
  scales.scale[0] = __low2half2(pair);
  scales.scale[1] = __high2half2(pair);
  if constexpr (S::Zeros) {
    const half2 zeros = as_half2(load_shared_word(row + zeros_offset));
    scales.zero[0] = __low2half2(zeros);
    scales.zero[1] = __high2half2(zeros);
  }
  return scales;
}

// Dequantises 64 k of a stage into fragments.
template <class S, int Rows, bool Scales>
__device__ inline void load_fragments(uint32_t weights, int words, int scale_offset, int half,
                                      uint32_t (&fragment)[S::Fragments][4][4]) {
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const uint32_t block = weights + f * S::BlockBytes;
    const uint4 four = load_shared(block + words + half * (kNibbleBytes / 2));
    const uint32_t word[4] = {four.x, four.y, four.z, four.w};
    ChannelScales scales;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if constexpr (Scales) {
        if (step % 2 == 0) {
          const int row = scale_row(half, step, Rows);
          scales = load_scales<S>(block + scale_offset + row * kRowBytes, Rows * kRowBytes);
        }
      }
      dequantize<Scales, S::Zeros>(word[step], scales, fragment[f][step]);
    }
  }
}

// Issues the WGMMAs of 64 k; the first ones start a new sum unless `add`.
template <class S>
__device__ inline void multiply(float (&sum)[S::Fragments][S::Tokens / 2],
                                const uint32_t (&fragment)[S::Fragments][4][4], uint32_t activations, bool add) {
  wgmma_fence();
  const uint64_t descriptor = swizzled_descriptor(activations);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
      wgmma<S::Tokens>(sum[f], fragment[f][step], descriptor + step * 2, add || step > 0);  // 16 k are 32 bytes
    }
  }
  wgmma_commit();
}

// Sums the stages of one tile that fall to this warpgroup, scaling weights.
//
// While the WGMMAs of 64 k run, the next 64 k are dequantised into the other half of the fragments.
template <class S, int Rows>
__device__ inline void consume_scaling_weights(const Ring<S>& ring, int stages, int warpgroup_m, int thread,
                                               Position<S::Stages>& at, float (&sum)[S::Fragments][S::Tokens / 2]) {
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int scale_offset = (warp * 8 + lane / 4) * 4;
  const int words = S::header_bytes(Rows) + words_offset(0, warp, lane);
  uint32_t fragment[2][S::Fragments][4][4];
  int held = -1;  // slot of the stage before, whose last WGMMAs may still be reading it
  for (int i = 0; i < stages; ++i) {
    barrier_wait(ring.full(at.slot), at.phase);
    const uint32_t weights = ring.weights(at.slot) + warpgroup_m * S::Fragments * S::BlockBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_fragments<S, Rows, S::Scales>(weights, words, scale_offset, half, fragment[half]);
      multiply<S>(sum, fragment[half], ring.activations(at.slot) + half * S::HalfBytes, true);
      wgmma_wait<1>();  // the WGMMAs of 64 k before are done: their registers are free, and a stage may be
      if (half == 0 && held >= 0 && lane == 0) barrier_arrive(ring.empty(held));
    }
    held = at.slot;
    at.advance(S::WarpgroupsK);
  }
  wgmma_wait<0>();
  if (held >= 0 && lane == 0) barrier_arrive(ring.empty(held));
}

// The same, scaling sums: with few tokens that is fewer instructions. Needs one group per stage.
//
// A stage is summed by itself. ptxas serialises WGMMAs around reads of accumulators while others run (C7514), so the
// warpgroup waits for all of them; the other warpgroups fill the gap.
template <class S>
__device__ inline void consume_scaling_sums(const Ring<S>& ring, int stages, int warpgroup_m, int thread,
                                            Position<S::Stages>& at, float (&sum)[S::Fragments][S::Tokens / 2]) {
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int scale_offset = (warp * 8 + lane / 4) * 4;
  const int words = S::header_bytes(1) + words_offset(0, warp, lane);
  uint32_t fragment[2][S::Fragments][4][4];
  float group[S::Fragments][S::Tokens / 2];
  for (int i = 0; i < stages; ++i) {
    barrier_wait(ring.full(at.slot), at.phase);
    const uint32_t weights = ring.weights(at.slot) + warpgroup_m * S::Fragments * S::BlockBytes;
    float2 scale[S::Fragments];
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
      scale[f] = __half22float2(as_half2(load_shared_word(weights + f * S::BlockBytes + scale_offset)));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_fragments<S, 1, false>(weights, words, scale_offset, half, fragment[half]);
      multiply<S>(group, fragment[half], ring.activations(at.slot) + half * S::HalfBytes, half > 0);
    }
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(ring.empty(at.slot));
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
      for (int j = 0; j < S::Tokens / 2; ++j) {
        sum[f][j] = fmaf(j / 2 % 2 == 0 ? scale[f].x : scale[f].y, group[f][j], sum[f][j]);
      }
    }
    at.advance(S::WarpgroupsK);
  }
}

// alpha, times the channel's scale in per-column mode.
template <class S>
__device__ inline float channel_factor(const Parameters& p, int channel) {
  if constexpr (S::Scales) return p.alpha;
  return channel < p.n ? p.alpha * __half2float(p.channel_scales[channel]) : 0.f;
}

__device__ inline float channel_bias(const Parameters& p, int channel) {
  return p.bias != nullptr && channel < p.n ? __half2float(p.bias[channel]) : 0.f;
}

// Stores accumulators straight from registers: 8x8 transpositions turn channels of a thread into channels of a row.
template <class S>
__device__ inline void store_tile(const Parameters& p, const Tile& tile, int warpgroup_m, int thread,
                                  const float (&sum)[S::Fragments][S::Tokens / 2]) {
  const int warp = thread / 32;
  const int row = thread % 32 / 4;
  const int pair = thread % 4;
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const int first =
        (tile.channel_block + warpgroup_m * S::Fragments + f) * kBlockChannels + warp * 16;  // the warp's 16 channels
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int owned = first + upper * 8 + row;  // before the transposition
      const float factor = channel_factor<S>(p, owned);
      const float bias = channel_bias(p, owned);
      const int channel = first + upper * 8 + pair * 2;  // after it
#pragma unroll
      for (int j = 0; j < S::Tokens / 8; ++j) {
        const half2 values = __floats2half2_rn(fmaf(factor, sum[f][4 * j + 2 * upper], bias),
                                               fmaf(factor, sum[f][4 * j + 2 * upper + 1], bias));
        const uint32_t transposed = transpose_8x8(as_bits(values));
        const int token = tile.token + j * 8 + row;
        if (token < p.m && channel < p.n) {
          *reinterpret_cast<uint32_t*>(p.output + static_cast<int64_t>(token) * p.n + channel) = transposed;
        }
      }
    }
  }
}

// Puts one warpgroup's partial sums into shared memory, [token][channel].
template <class S>
__device__ inline void write_partial(uint32_t partial, int warpgroup_m, int thread,
                                     const float (&sum)[S::Fragments][S::Tokens / 2]) {
  const int row = thread % 32 / 4;
  const int pair = thread % 4;
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const int channel = (warpgroup_m * S::Fragments + f) * kBlockChannels + thread / 32 * 16 + row;
#pragma unroll
    for (int i = 0; i < S::Tokens / 2; ++i) {
      const int token = i / 4 * 8 + pair * 2 + i % 2;
      const uint32_t address = partial + (token * S::PartialStride + channel + i / 2 % 2 * 8) * 4;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(sum[f][i]) : "memory");
    }
  }
}

// Sums the partial tiles of all warpgroups of all CTAs of the cluster, in a fixed order; each CTA stores its share.
template <class S>
__device__ inline void reduce_and_store(const Parameters& p, const Tile& tile, uint32_t partials, int rank,
                                        int thread) {
  constexpr int kPerToken = S::Channels / 4;  // four channels at a time
  constexpr int kChunks = S::Tokens * kPerToken;
  for (int chunk = thread * S::ClusterK + rank; chunk < kChunks; chunk += S::Consumers * S::ClusterK) {
    const int token = tile.token + chunk / kPerToken;
    const int local = chunk % kPerToken * 4;
    const int channel = tile.channel_block * kBlockChannels + local;
    if (token >= p.m || channel >= p.n) continue;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int source = 0; source < S::ClusterK; ++source) {
#pragma unroll
      for (int wk = 0; wk < S::WarpgroupsK; ++wk) {
        const uint32_t address = partials + (wk * S::PartialFloats + chunk / kPerToken * S::PartialStride + local) * 4;
        float4 part;
        if constexpr (S::ClusterK > 1) {
          part = load_from_cluster(address, source);
        } else {
          const uint4 bits = load_shared(address);
          part = *reinterpret_cast<const float4*>(&bits);
        }
        total = make_float4(total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w);
      }
    }
    const float value[4] = {total.x, total.y, total.z, total.w};
    float result[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result[i] = fmaf(channel_factor<S>(p, channel + i), value[i], channel_bias(p, channel + i));
    }
    const uint2 packed =
        make_uint2(as_bits(__floats2half2_rn(result[0], result[1])), as_bits(__floats2half2_rn(result[2], result[3])));
    *reinterpret_cast<uint2*>(p.output + static_cast<int64_t>(token) * p.n + channel) = packed;
  }
}

template <class S, int Rows>
__device__ inline void run(const Parameters& p) {
  extern __shared__ uint8_t shared[];
  Ring<S> ring;
  ring.base = (shared_address(shared) + S::Alignment - 1) / S::Alignment * S::Alignment;
  ring.barriers = ring.base + S::Stages * S::StageBytes;
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
  const int rank = S::ClusterK > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int first_tile = blockIdx.x / S::ClusterK;
  const int tile_step = gridDim.x / S::ClusterK;
  const int tiles = p.channel_tiles * p.token_tiles;
  if (threadIdx.x % 32 == 0) {  // one lane of each warp: the hardware takes one barrier after the other from a warp
    for (int slot = threadIdx.x / 32; slot < S::Stages; slot += S::Threads / 32) {
      barrier_init(ring.full(slot), 2);
      barrier_init(ring.empty(slot), 4 * S::WarpgroupsM);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<S::ProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp < 2 && threadIdx.x % 32 == 0) {
      if (warp == 1) {
        prefetch_tensor_map(&p.activations);
        wait_for_prerequisites();  // the kernel before may be writing the activations; it never writes weights
      }
      Position<S::Stages> at;
      for (int index = first_tile; index < tiles; index += tile_step) {
        const Tile tile = tile_at<S>(p, index, rank);
        if (warp == 0) {
          produce_weights<S>(p, ring, tile, at);
        } else {
          produce_activations<S>(p, ring, tile, at);
        }
      }
    }
    __syncwarp();
    if constexpr (S::ClusterK > 1) {
      cluster_sync();
      cluster_sync();
    }
  } else {
    take_registers<S::ConsumerRegisters>();
    const int consumer = warpgroup - 1;
    const int warpgroup_m = consumer % S::WarpgroupsM;
    const int warpgroup_k = consumer / S::WarpgroupsM;
    const int thread = threadIdx.x % kWarpgroup;
    launch_dependents();  // the next kernel may fetch its weights as SMs fall free
    Position<S::Stages> at;
    at.advance(warpgroup_k);
    for (int index = first_tile; index < tiles; index += tile_step) {
      const Tile tile = tile_at<S>(p, index, rank);
      float sum[S::Fragments][S::Tokens / 2];
#pragma unroll
      for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
        for (int i = 0; i < S::Tokens / 2; ++i) sum[f][i] = 0;
      }
      const int stages = (tile.blocks - warpgroup_k + S::WarpgroupsK - 1) / S::WarpgroupsK;
      if constexpr (S::scales_sums(Rows)) {
        consume_scaling_sums<S>(ring, stages, warpgroup_m, thread, at, sum);
      } else {
        consume_scaling_weights<S, Rows>(ring, stages, warpgroup_m, thread, at, sum);
      }
      wait_for_prerequisites();  // over by now; makes the writes before visible to this thread's reads of the bias
      if constexpr (S::Reduces) {
        // The host launches one tile per CTA here: the ring is not used again.
        named_barrier(1, S::Consumers);
        write_partial<S>(ring.base + warpgroup_k * S::PartialFloats * 4, warpgroup_m, thread, sum);
        if constexpr (S::ClusterK > 1) {
          cluster_sync();
        } else {
          named_barrier(1, S::Consumers);
        }
        reduce_and_store<S>(p, tile, ring.base, rank, threadIdx.x - kWarpgroup);
        if constexpr (S::ClusterK > 1) cluster_sync();  // nobody leaves while its sums are being read
      } else {
        store_tile<S>(p, tile, warpgroup_m, thread, sum);
      }
    }
  }
}

// Named is a type derived from the shape whose name is the kernel's, so that profilers and cuobjdump show it. Rows is
// the number of scale rows in a block: the group size is the problem's, and each number of rows has a function of its
// own.
template <class Named, int Rows>
__global__ void __launch_bounds__(Named::Threads, 1) kernel(const __grid_constant__ Parameters parameters) {
  run<Named, Rows>(parameters);
}

}  // namespace w4a16::native
