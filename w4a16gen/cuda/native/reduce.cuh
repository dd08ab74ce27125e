// Reduces the partial sums of a tile: across warpgroups, across the CTAs of a cluster, and across stream-K work units.
//
// The unit of reduction is a piece: the four accumulators that a thread has of 8 tokens and one fragment. A thread adds
// only pieces of threads with its own place in other warpgroups or CTAs, so that each moves 16 bytes next to its
// neighbour's. The order of all additions is fixed, and a result does not depend on who adds: where token tiles
// overlap, two CTAs store the same tokens, as different pieces.
#pragma once

#include "native/pipeline.cuh"
#include "native/roles.cuh"

namespace w4a16::native {

constexpr int kPieceBytes = 16;

template <int Count>
__device__ inline float4 piece_of(const float (&sum)[Count], int group) {
  return make_float4(sum[4 * group], sum[4 * group + 1], sum[4 * group + 2], sum[4 * group + 3]);
}

template <int Count>
__device__ inline void add_piece(float (&sum)[Count], int group, float4 other) {
  sum[4 * group] += other.x;
  sum[4 * group + 1] += other.y;
  sum[4 * group + 2] += other.z;
  sum[4 * group + 3] += other.w;
}

// Adds the partial sums of the others, of which load(source) returns one, in pairs: that of `me` and of the one two
// places away, and those of the other two. Whatever stage a warpgroup begins with, it has the same partner.
template <int Sources, int Count, class Load>
__device__ inline void add_others(float (&sum)[Count], int group, int me, const Load& load) {
  static_assert(Sources == 2 || Sources == 4, "sums are added in pairs");
  add_piece(sum, group, load(me ^ (Sources / 2)));
  if constexpr (Sources == 4) {
    float4 pair = load(me % 2 ^ 1);
    const float4 other = load((me % 2 ^ 1) + 2);
    pair = make_float4(pair.x + other.x, pair.y + other.y, pair.z + other.z, pair.w + other.w);
    add_piece(sum, group, pair);
  }
}

// Calls visit(fragment, group, number) for all pieces of the groups of 8 tokens from `begin` to `end`. Groups past the
// last token are included, since branches would keep loads from overlapping. Where registers are short, a warp barrier
// after every `Together` groups keeps ptxas from hoisting loads.
template <class S, int Together = 1, class Visit>
__device__ inline void for_pieces(int begin, int end, const Visit& visit) {
#pragma unroll
  for (int group = begin; group < end; ++group) {
    if (!S::SpareRegisters && (group - begin) % Together == 0) __syncwarp();
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) visit(f, group, group * S::Fragments + f);
  }
}

// Reduces across the warpgroups that split K. Each piece ends in one of them.
template <class S>
__device__ inline void reduce_warpgroups(const Shared<S>& shared, const Consumer& me, Accumulators<S>& sum) {
  constexpr int kPhaseGroups = S::ReductionTokens / 8;
  constexpr int kStride = S::WarpgroupsM * kWarpgroup * kPieceBytes;
  const uint32_t partials = shared.partials() + ((me.warpgroup_m * 4 + me.warp) * kWarp + me.lane) * kPieceBytes;
  // The address of one of the WarpgroupsK - 1 partial sums of a piece.
  const auto place = [&](int piece, int index) {
    const int in_phase = piece % (kPhaseGroups * S::Fragments);
    return partials + (in_phase * (S::WarpgroupsK - 1) + index) * kStride;
  };
  const int barrier = kWarpgroupBarrier + me.warpgroup_m;
#pragma unroll
  for (int begin = 0; begin < S::Tokens / 8; begin += kPhaseGroups) {
    if (begin > 0) named_barrier(barrier, S::WarpgroupsK * kWarpgroup);  // the sums that these overwrite have been read
    for_pieces<S>(begin, begin + kPhaseGroups, [&](int f, int group, int piece) {
      if (owns_piece<S>(me, piece)) return;
      const int index = me.warpgroup_k - (me.warpgroup_k > piece % S::WarpgroupsK);
      store_shared_floats(place(piece, index), piece_of(sum[f], group));
    });
    named_barrier(barrier, S::WarpgroupsK * kWarpgroup);
    for_pieces<S>(begin, begin + kPhaseGroups, [&](int f, int group, int piece) {
      if (!owns_piece<S>(me, piece)) return;
      add_others<S::WarpgroupsK>(sum[f], group, me.warpgroup_k, [&](int source) {
        return load_shared_floats(place(piece, source - (source > me.warpgroup_k)));
      });
    });
  }
}

// Reduces across the CTAs of a cluster. Each piece goes to the CTA that stores it. Returns whether this warp stores
// any.
//
// No CTA reads another's memory, so each may exit as soon as it is done.
template <class S>
__device__ inline bool reduce_cluster(const Shared<S>& shared, int rank, const Consumer& me, int turn,
                                      Accumulators<S>& sum) {
  constexpr int kPieces = S::Fragments * S::Tokens / 8;
  constexpr int kOwnPieces = S::DividesOutputByTokens ? kPieces / S::ClusterK : kPieces;
  constexpr int kWarps = S::DividesOutputByTokens ? 4 : 4 / S::ClusterK;  // of a warpgroup, which store
  constexpr int kStride = S::WarpgroupsM * kWarps * kWarp * kPieceBytes;
  const uint32_t arrived = shared.arrived(turn % 2);
  const uint32_t received =
      shared.received(turn % 2) + ((me.warpgroup_m * kWarps + me.warp % kWarps) * kWarp + me.lane) * kPieceBytes;
  for_pieces<S>(0, S::Tokens / 8, [&](int f, int group, int piece) {
    const int owner = owner_of<S>(me, group);
    if (owner == rank || !owns_piece<S>(me, piece)) return;
    const int place = (rank - (rank > owner)) * kOwnPieces + piece % kOwnPieces;
    store_in_cluster(address_in_cluster(received + place * kStride, owner), piece_of(sum[f], group),
                     address_in_cluster(arrived, owner));
  });
  if (!S::DividesOutputByTokens && owner_of<S>(me, 0) != rank) return false;
  barrier_wait(arrived, turn / 2 % 2);
  for_pieces<S>(0, S::Tokens / 8, [&](int f, int group, int piece) {
    if (owner_of<S>(me, group) != rank || !owns_piece<S>(me, piece)) return;
    add_others<S::ClusterK>(sum[f], group, rank, [&](int source) {
      const int place = (source - (source > rank)) * kOwnPieces + piece % kOwnPieces;
      return load_shared_floats(received + place * kStride);
    });
  });
  return true;
}

template <class S>
__device__ inline uint8_t* fixup_slot(const Parameters& p, int unit, int index, int rank) {
  return p.workspace + static_cast<int64_t>(slot_of(p.tiling, unit, index) * S::ClusterSize + rank) * S::FixupBytes;
}

// The stream-K fix-up: reduces across the work units that share a tile. The unit with the tile's first k block stores
// it. Every other unit writes its partial sums to the workspace. Returns whether this CTA stores the tile.
//
// Every warp has a flag. It holds the launch's epoch once the warp's sums are complete, and is cleared when they have
// been read, since a graph repeats a launch with the same epoch. The workspace may therefore hold anything before a
// launch.
template <class S>
__device__ inline bool fix_up(const Parameters& p, const Tile& tile, int index, const Work& work, const Consumer& me,
                              Accumulators<S>& sum) {
  if (index >= p.tiling.split_tiles) return true;
  // The registers of weight fragments are free now: they hold sums on their way from L2, which takes 900 cycles.
  constexpr int kTogether = max_of(S::MaxPiecesOnTheWay / S::Fragments, 1);
  constexpr int kStride = S::WarpgroupsM * kWarpgroup * kPieceBytes;
  const int warp_m = me.warpgroup_m * 4 + me.warp;
  const auto place = [&](uint8_t* partials, int piece) {
    uint8_t* const of_warp = partials + S::FlagBytes + warp_m * kWarp * kPieceBytes;
    return reinterpret_cast<float4*>(of_warp + piece * kStride) + me.lane;
  };
  const auto flag_of = [&](uint8_t* partials) {
    return reinterpret_cast<uint64_t*>(partials) + me.warpgroup_k * S::WarpgroupsM * 4 + warp_m;
  };
  if (tile.first_block > 0) {
    uint8_t* const partials = fixup_slot<S>(p, work.unit, index, work.rank);
    for_pieces<S>(0, S::Tokens / 8, [&](int f, int group, int piece) {
      if (owns_piece<S>(me, piece)) *place(partials, piece) = piece_of(sum[f], group);
    });
    if (p.tiling.heads > 0) {
      // A unit may give away sums of several tails, for which the spare warp may be too late.
      __syncwarp();
      if (me.lane == 0) publish(flag_of(partials), p.epoch);
    } else {
      named_barrier_arrive(kFixupBarrier, S::Consumers + kWarp);
    }
    return false;
  }
  const int begin = index * p.tiling.tail_blocks;
  const int end = begin + p.tiling.tail_blocks;
  const int first = p.tiling.heads > 0 ? unit_of(p.tiling, begin) : work.unit + 1;
  for (int unit = first; unit_begin(p.tiling, unit) < end; ++unit) {
    uint8_t* const partials = fixup_slot<S>(p, unit, index, work.rank);
    uint64_t* const flag = flag_of(partials);
    if (me.lane == 0) wait_until_published(flag, p.epoch);
    __syncwarp();
    for_pieces<S, kTogether>(0, S::Tokens / 8, [&](int f, int group, int piece) {
      if (owns_piece<S>(me, piece)) add_piece(sum[f], group, __ldcg(place(partials, piece)));
    });
    __syncwarp();
    if (me.lane == 0) *flag = 0;
  }
  return true;
}

// The work of a spare producer warp, where units give away sums of one tile at most: it waits until the stores of
// partial sums are visible and then sets the flags, so that the consumers need not stall.
template <class S>
__device__ inline void publish_fixup(const Parameters& p, const Work& work) {
  static_assert(kWarpgroupBarrier + S::Warpgroups <= kFixupBarrier, "named barriers must not overlap");
  if (p.tiling.heads > 0 || tile_at<S>(p.tiling, work, work.first_tile).first_block == 0) return;
  named_barrier(kFixupBarrier, S::Consumers + kWarp);
  const int lane = threadIdx.x % kWarp;
  auto* const flags = reinterpret_cast<uint64_t*>(fixup_slot<S>(p, work.unit, work.first_tile, work.rank));
  if (lane < S::Consumers / kWarp) publish(flags + lane, p.epoch);
}

// Reduces a tile's partial sums across warpgroups, cluster CTAs and stream-K work units. Returns whether this warp
// stores any results.
//
// Two buffers suffice for the sums from the cluster: a CTA sends those of tile i + 2 after it has received those of
// tile i + 1, which were sent after all of the sender's warps were done with tile i.
template <class S>
__device__ inline bool reduce(const Parameters& p, const Shared<S>& shared, const Tile& tile, int index,
                              const Work& work, const Consumer& me, int turn, Accumulators<S>& sum) {
  if constexpr (S::ClusterK > 1) {
    if (threadIdx.x == kWarpgroup) {
      barrier_arrive_expecting(shared.arrived(turn % 2), S::ReceivedBytes);
    }
  }
  if (S::ReducesOnChip && index != work.first_tile) named_barrier(kConsumersBarrier, S::Consumers);
  if constexpr (S::WarpgroupsK > 1) reduce_warpgroups<S>(shared, me, sum);
  if constexpr (S::ClusterK > 1) return reduce_cluster<S>(shared, work.rank, me, turn, sum);
  if constexpr (S::StreamK) return fix_up<S>(p, tile, index, work, me, sum);
  return true;
}

}  // namespace w4a16::native
