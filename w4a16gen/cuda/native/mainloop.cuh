// The main loop of a consumer warpgroup: nibbles to fragments, fragments times activations.
#pragma once

#include "native/dequantize.cuh"
#include "native/pipeline.cuh"
#include "native/roles.cuh"
#include "native/wgmma.cuh"

namespace w4a16::native {

// The packed words of 64 channels x 64 k of one thread, and the scales (and zeros) of their groups.
template <class S, int Rows>
struct Packed {
  static constexpr int kGroups = Rows == 4 ? 2 : Rows == 0 ? 0 : 1;  // of these 64 k
  uint4 words;
  uint32_t scales[kGroups + 1];  // one more than needed, since an array cannot be empty
  uint32_t zeros[kGroups + 1];

  // Loads from the shared memory of a block or of half a block. `half` says which 64 of the block's k. With one scale
  // row per block, the scales of the second half are loaded already, unless another fragment came between.
  __device__ void load(uint32_t block, const Consumer& me, int half) {
    words = load_shared(block + S::header_bytes(Rows) + words_offset(S::K == 64 ? 0 : half, me.warp, me.lane));
    if ((S::Fragments == 1 || S::ByWarps) && S::K == kBlockK && Rows == 1 && half == 1) return;
    const uint32_t scales_at = block + (me.warp * 8 + me.lane / 4) * 4;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t row = scales_at + scale_row(half, 2 * g, Rows) * kRowBytes;
      scales[g] = load_shared_word(row);
      if constexpr (S::Zeros) zeros[g] = load_shared_word(row + Rows * kRowBytes);
    }
  }

  __device__ void dequantize_into(Fragments& fragments) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      half2 scale = as_half2(0);
      half2 addend = as_half2(0);
      if constexpr (S::Scales) {
        const int g = step * kGroups / 4;
        scale = as_half2(scales[g]);
        addend = S::Zeros ? as_half2(zeros[g]) : offset_of(scale);
      }
      dequantize<S::Scales, S::Zeros>(word[step], scale, addend, fragments[step]);
    }
  }
};

// Whether to add to all 64 bits of a descriptor instead of its low word. With one fragment per warpgroup this takes
// ptxas one instruction instead of three and shortens the loop by 8 %. With two fragments the low word is faster
// (256x64x128: 0.7 %; H100, 2026-11), and with four warpgroups and many accumulators registers run out.
template <class S>
constexpr bool k64BitDescriptorAdd = S::Fragments == 1 && (S::Warpgroups == 2 || S::SpareRegisters);

// Signals the producers of every CTA that fills this CTA's ring that a warp is done with a slot. It follows a
// wgmma_wait, after which the reads of all lanes are complete. A __syncwarp here would make ptxas serialise WGMMAs in
// warpgroups with two fragments (C7513).
template <class S>
__device__ inline void release(const Shared<S>& shared, int slot, int lane) {
  if constexpr (S::Multicasts) {
    constexpr int kArrivals = kReleasingLanes * S::ClusterSize;
#pragma unroll
    for (int first = 0; first < kArrivals; first += kWarp) {
      if (const int arrival = first + lane; arrival < kArrivals) {
        barrier_arrive_in_cluster(address_in_cluster(shared.empty(slot), arrival / kReleasingLanes));
      }
    }
  } else {
    if (lane < kReleasingLanes) barrier_arrive(shared.empty(slot));
  }
}

// The sums of the first tokens of a fragment.
template <int Tokens, int Count>
__device__ inline auto first_sums(float (&sum)[Count]) -> float (&)[Tokens / 2] {
  return reinterpret_cast<float (&)[Tokens / 2]>(sum);
}

// Whether a tile's first products overwrite the sums, which then need no zeros before. With stages of 128 k that gains
// nothing, and 128x96x128 loses 3 % (H200, 2026-12).
template <class S>
constexpr bool kOverwritesSums = S::K != kBlockK;

// Accumulates this warpgroup's stages of one tile, for its first `Tokens` tokens. Without stages the sums stay.
//
// The work is divided into pieces of 64 channels x 64 k. While the WGMMAs of one piece run, the next piece is
// dequantised into the other of two buffers. Pieces alternate between the fragments, so that a buffer holds only one
// piece. Calls `before_drain` while the last WGMMAs run.
template <class S, int Rows, int Tokens, class BeforeDrain>
__device__ inline void consume_stages(const Shared<S>& shared, int stages, const Consumer& me, Position<S::Stages>& at,
                                      Accumulators<S>& sum, const BeforeDrain& before_drain) {
  constexpr bool kHalfStages = S::K != kBlockK;
  constexpr bool kOnePiece = S::Fragments * S::Halves == 1;  // per stage
  Fragments fragments[2];
  Packed<S, Rows> packed;
  const uint64_t first = descriptor(descriptor_low(shared.activations(0)));
  constexpr bool kAdd64 = k64BitDescriptorAdd<S>;
  uint32_t weights = 0;
  int adds = kOverwritesSums<S> ? 0 : 1;
  int in_flight = -1;  // slot of the previous stage, which its last WGMMAs may still read
  const auto begin_stage = [&](int half) {
    // A warpgroup that takes every second or fourth stage of 64 k always has the same half of a block.
    if (kHalfStages && S::WarpgroupsK > 1) half = me.warpgroup_k % 2;
    barrier_wait(shared.full(at.slot), at.phase);
    weights = shared.weights(at.slot) + me.warpgroup_m * S::Fragments * S::BlockBytes;
    packed.load(weights, me, half);
  };
  const auto work_on_half = [&](int half) {
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
      const bool begins = f == 0 && (kHalfStages || half == 0);
      const bool ends = f == S::Fragments - 1 && (kHalfStages || half == 1);
      Fragments& buffer = fragments[(half * S::Fragments + f) % 2];
      const int slot = at.slot;
      const auto load_next_of_stage = [&] {
        const int next = (f + 1) % S::Fragments;
        if (!ends) packed.load(weights + next * S::BlockBytes, me, next == 0 ? half + 1 : half);
      };
      if constexpr (S::SpareRegisters) {  // the next piece's words arrive while this piece is dequantised
        const Packed<S, Rows> now = packed;
        load_next_of_stage();
        now.dequantize_into(buffer);
      } else {
        packed.dequantize_into(buffer);
        load_next_of_stage();
      }
      if (ends) {
        at.advance(S::WarpgroupsK);
        --stages;
      }
      uint64_t activations = advance_descriptor<kAdd64>(first, slot * (S::ActivationBytes / 16));
      if (!kHalfStages) activations = advance_descriptor<kAdd64>(activations, half * (S::HalfActivationBytes / 16));
      multiply<Tokens, kAdd64>(first_sums<Tokens>(sum[f]), buffer, activations, half == 0 ? adds : 1);
      if (f == S::Fragments - 1) adds = 1;
      const bool more = ends && stages > 0;
      const int next_half = kHalfStages ? 1 - half : 0;
      // A stage of one piece is released before the wait for the next: the ring may hold only two.
      if (!kOnePiece && more) begin_stage(next_half);
      wgmma_wait<1>();  // the WGMMAs of the previous piece are done: its buffer is free, and perhaps its stage
      if (begins && in_flight >= 0) release<S>(shared, in_flight, me.lane);
      if (ends) in_flight = slot;
      if (kOnePiece && more) begin_stage(next_half);
    }
  };
  if (stages > 0) begin_stage(0);
#pragma unroll 1
  while (stages > (kHalfStages ? 1 : 0)) {
    work_on_half(0);
    work_on_half(1);
  }
  if (kHalfStages && S::WarpgroupsK > 1 && stages > 0) work_on_half(0);
  before_drain();
  wgmma_wait<0>();
  if (in_flight >= 0) release<S>(shared, in_flight, me.lane);
}

}  // namespace w4a16::native
