// Epilogues with an activation, a gate or a residual: from sums to outputs, piece by piece.
//
// Each piece is stored as soon as it is finished. If all were finished before the first store, ptxas would lack
// registers, and spill or slow down the main loop.
#pragma once

#include "native/residual.cuh"

namespace w4a16::native {

// Outputs of 8 tokens that a thread has of a fragment, as pairs of tokens: those of its lower and of its upper channel,
// or of the channel that both are gated to.
template <bool Gated>
using PieceOfOutputs = uint32_t[Gated ? 1 : 2];

template <bool IsSilu>
__device__ inline void activate(const Activation& activation, float& x) {
  x = sigmoid_activation<IsSilu>(activation, x, exp2_approximate, reciprocal_approximate);
}

// A thread's channels of a fragment. The biases of gated ones are in the order of the canonical weight.
template <class S>
__device__ inline PairOfChannels<S> channels_of(const Parameters& p, const Tile& tile, const Consumer& me, int f,
                                                const ChannelFactors<S>& factors) {
  const int lower = first_channel<S>(tile, me, f) + me.warp * 16 + me.lane / 4;
  if constexpr (S::Gates) {
    return {p, tile, gated_source(lower, p.n), gated_source(lower + 8, p.n), factors.value[f]};
  } else {
    return {p, tile, lower, factors.value[f]};
  }
}

// Replaces the residual of a piece by its outputs.
template <class S, bool IsSilu, int Count>
__device__ inline void finish_piece(const Parameters& p, const PairOfChannels<S>& channels, const float (&sum)[Count],
                                    int group, PieceOfOutputs<S::Gates>& piece) {
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = channels.output(sum[4 * group + i], i / 2);
  if constexpr (S::Gates) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      activate<IsSilu>(p.activation, x[i]);
      x[i] *= x[i + 2];
    }
  } else if (IsSilu || p.activation.kind == EpilogueKind::kSigmoid) {
#pragma unroll
    for (int i = 0; i < 4; ++i) activate<IsSilu>(p.activation, x[i]);
  } else if (p.activation.kind == EpilogueKind::kSquare) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] *= fmaxf(x[i], 0.f);
  }
#pragma unroll
  for (int part = 0; part < (S::Gates ? 1 : 2); ++part) {
    const float2 added = __half22float2(as_half2(piece[part]));
    piece[part] = as_bits(__floats2half2_rn(x[2 * part] + added.x, x[2 * part + 1] + added.y));
  }
}

// As store_from_registers. A warp has 8 channels of a token if they are gated: half a sector, of which a neighbour has
// the rest.
template <class S, bool IsSilu>
__device__ inline void finish_from_registers(const Parameters& p, const Tile& tile, int rank, const Consumer& me,
                                             const ChannelFactors<S>& factors, const Accumulators<S>& sum) {
  constexpr int kGroups = S::Tokens / 8;
  constexpr int kTogether = min_of(kGroups, S::SpareRegisters ? 8 : 1);  // groups whose residual is read at once
  const auto is_stored = [&](int f, int group) { return group < kGroups && stores_piece<S>(me, rank, f, group); };
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const PairOfChannels<S> channels = channels_of<S>(p, tile, me, f, factors);
#pragma unroll
    for (int begin = 0; begin < kGroups; begin += kTogether) {
      PieceOfOutputs<S::Gates> pieces[kTogether] = {};
      if (p.residual_pointer != nullptr) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (!is_stored(f, begin + i)) continue;
          load_residual(p, PlaceOfPiece::of<S>(p, tile, me, f, begin + i), pieces[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (!is_stored(f, begin + i)) continue;
        PieceOfOutputs<S::Gates>& piece = pieces[i];
        if (p.residual_pointer != nullptr) to_sums(piece, me.lane);
        finish_piece<S, IsSilu>(p, channels, sum[f], begin + i, piece);
        const PlaceOfPiece place = PlaceOfPiece::of<S>(p, tile, me, f, begin + i);
        half* const to = p.output_pointer + place.offset();
        const uint32_t lower = transpose_8x8(piece[0]);
        if constexpr (S::Gates) {
          if (place.is_inside) *reinterpret_cast<uint32_t*>(to) = lower;
        } else {
          const uint2 four = exchange_halves(lower, transpose_8x8(piece[1]), me.lane);
          if (place.is_inside) *reinterpret_cast<uint2*>(to) = four;
        }
      }
    }
  }
}

// As store_through_shared. Boxes of gated outputs have 32 channels: rows of 64 bytes, with the 64-byte swizzle.
template <class S, bool IsSilu>
__device__ inline void finish_through_shared(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                                             const Consumer& me, const ChannelFactors<S>& factors,
                                             const Accumulators<S>& sum) {
  constexpr int kParts = S::Gates ? 1 : 2;
  constexpr int kRow = kParts * kBlockChannels;  // bytes
  constexpr int kGroups = S::StoredTokens / 8;
  constexpr int kTogether = S::WarpgroupsK == 1 && kGroups % 2 == 0 ? 2 : 1;  // groups of 8 tokens
  constexpr int kThreads = S::WarpgroupsK * kWarpgroup;
  const uint32_t boxes = shared.output(me.warpgroup_m);
  const int barrier = kWarpgroupBarrier + me.warpgroup_m;
  const int matrix = me.lane / 8 % (kParts * kTogether);  // whose row this lane addresses
  const int row = matrix / kParts * 8 + me.lane % 8;
  const int piece = (me.warp * kParts + matrix % kParts) ^ (S::Gates ? me.lane % 8 / 2 : me.lane % 8);
  const uint32_t offset = row * kRow + piece * 16;
  if (p.residual_pointer == nullptr) await_output_place<S>(me);
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    const PairOfChannels<S> channels = channels_of<S>(p, tile, me, f, factors);
#pragma unroll
    for (int group = 0; group < S::Tokens / 8; group += kTogether) {
      if (S::ClusterK > 1 && group / kGroups != rank) continue;
      if (!owns_piece<S>(me, group * S::Fragments + f)) continue;
      const uint32_t at = boxes + f * S::BoxBytes + offset + group % kGroups * 8 * kRow;
      uint32_t matrices[kTogether * kParts] = {};
      if (p.residual_pointer != nullptr) load_transposed(at, matrices);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        finish_piece<S, IsSilu>(p, channels, sum[f], group + i,
                                reinterpret_cast<PieceOfOutputs<S::Gates>&>(matrices[i * kParts]));
      }
      store_transposed(at, matrices);
    }
  }
  async_proxy_fence();
  named_barrier(barrier, kThreads);
  if (copies_output(me)) {
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
      tensor_store(&p.output, first_channel<S>(tile, me, f) / S::ChannelsPerOutput, stored_token<S>(tile, rank),
                   boxes + f * S::BoxBytes);
    }
  }
}

template <class S, bool IsSilu>
__device__ inline void finish_with(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                                   const Consumer& me, const ChannelFactors<S>& factors, const Accumulators<S>& sum) {
  if constexpr (S::StoresThroughShared) {
    finish_through_shared<S, IsSilu>(p, shared, tile, rank, me, factors, sum);
  } else {
    finish_from_registers<S, IsSilu>(p, tile, rank, me, factors, sum);
  }
}

template <class S>
__device__ inline void finish(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                              const Consumer& me, const ChannelFactors<S>& factors, const Accumulators<S>& sum) {
  if (p.activation.kind == EpilogueKind::kSilu) {
    finish_with<S, true>(p, shared, tile, rank, me, factors, sum);
  } else {
    finish_with<S, false>(p, shared, tile, rank, me, factors, sum);
  }
}

}  // namespace w4a16::native
