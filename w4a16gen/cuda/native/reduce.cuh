// Sums of one tile that several hold are added up: over warpgroups, over the CTAs of a cluster, over CTAs of stream-K.
//
// Sums meet in pieces: a thread's four of one group of 8 tokens and one fragment. A thread adds only what threads of
// the same place in other warpgroups or CTAs have, so that each moves 16 bytes beside its neighbour's. All orders are
// fixed.
#pragma once

#include "native/epilogue.cuh"

namespace w4a16::native {

constexpr int kPieceBytes = 16;

template <int Sums>
__device__ inline float4 piece_of(const float (&sum)[Sums], int group) {
  return make_float4(sum[4 * group], sum[4 * group + 1], sum[4 * group + 2], sum[4 * group + 3]);
}

template <int Sums>
__device__ inline void add_piece(float (&sum)[Sums], int group, float4 other) {
  sum[4 * group] += other.x;
  sum[4 * group + 1] += other.y;
  sum[4 * group + 2] += other.z;
  sum[4 * group + 3] += other.w;
}

// Calls visit(fragment, group, number) for all pieces of the groups from `begin` to `end`. (Also for those without
// tokens of the problem: branches would keep loads from overlapping. Where registers are short, a warp barrier keeps
// loads from being moved into registers that are not there.)
template <class S, class Visit>
__device__ inline void for_pieces(int begin, int end, const Visit& visit) {
#pragma unroll
  for (int group = begin; group < end; ++group) {
    if constexpr (!S::SpareRegisters) __syncwarp();
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) visit(f, group, group * S::Fragments + f);
  }
}

// Adds up the sums of the warpgroups that divide K, each piece in one of them.
template <class S>
__device__ inline void reduce_warpgroups(const Shared<S>& shared, const Consumer& me, Accumulators<S>& sum) {
  constexpr int kPhaseGroups = S::ReductionTokens / 8;
  constexpr int kStride = S::WarpgroupsM * kWarpgroup * kPieceBytes;
  const uint32_t partials = shared.partials() + ((me.warpgroup_m * 4 + me.warp) * kWarp + me.lane) * kPieceBytes;
  // Of a piece's WarpgroupsK - 1 places.
  const auto place = [&](int piece, int index) {
    const int in_phase = piece % (kPhaseGroups * S::Fragments);
    return partials + (in_phase * (S::WarpgroupsK - 1) + index) * kStride;
  };
  const int barrier = kWarpgroupBarrier + me.warpgroup_m;
#pragma unroll
  for (int begin = 0; begin < S::Tokens / 8; begin += kPhaseGroups) {
    if (begin > 0) named_barrier(barrier, S::WarpgroupsK * kWarpgroup);  // what these overwrite has been read
    for_pieces<S>(begin, begin + kPhaseGroups, [&](int f, int group, int piece) {
      if (owns_piece<S>(me, piece)) return;
      const int index = me.warpgroup_k - (me.warpgroup_k > piece % S::WarpgroupsK);
      store_shared_floats(place(piece, index), piece_of(sum[f], group));
    });
    named_barrier(barrier, S::WarpgroupsK * kWarpgroup);
    for_pieces<S>(begin, begin + kPhaseGroups, [&](int f, int group, int piece) {
      if (!owns_piece<S>(me, piece)) return;
#pragma unroll
      for (int i = 0; i < S::WarpgroupsK - 1; ++i) add_piece(sum[f], group, load_shared_floats(place(piece, i)));
    });
  }
}

// Adds up the sums of the CTAs of a cluster, each piece in the CTA that stores it: the others send it theirs. Returns
// whether this warp stores any.
//
// No CTA reads another's memory, so each may leave as soon as it is done.
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
    send(address_in_cluster(received + place * kStride, owner), piece_of(sum[f], group),
         address_in_cluster(arrived, owner));
  });
  if (!S::DividesOutputByTokens && owner_of<S>(me, 0) != rank) return false;
  barrier_wait(arrived, turn / 2 % 2);
  for_pieces<S>(0, S::Tokens / 8, [&](int f, int group, int piece) {
    if (owner_of<S>(me, group) != rank || !owns_piece<S>(me, piece)) return;
#pragma unroll
    for (int source = 0; source < S::ClusterK - 1; ++source) {
      const int place = source * kOwnPieces + piece % kOwnPieces;
      add_piece(sum[f], group, load_shared_floats(received + place * kStride));
    }
  });
  return true;
}

template <class S>
__device__ inline uint8_t* fixup_slot(const Parameters& p, int unit) {
  return p.workspace + static_cast<int64_t>(unit) * S::FixupBytes;
}

// Adds up the sums of a tile that shares of stream-K divide. The CTA with a tile's first k block stores it; the others
// hand over their sums, of the first thing that they work on, through the workspace. Returns whether the tile is this
// CTA's to store.
//
// Every warp has a flag of its own. It holds the launch's ticket once its sums are there, and is cleared when they have
// been read, since a graph may launch again with the same ticket: so the workspace may hold anything before.
template <class S>
__device__ inline bool fix_up(const Parameters& p, const Tile& tile, int index, const Work& work, const Consumer& me,
                              Accumulators<S>& sum) {
  constexpr int kStride = S::WarpgroupsM * kWarpgroup * kPieceBytes;
  const int warp_m = me.warpgroup_m * 4 + me.warp;
  const auto place = [&](uint8_t* slot, int piece) {
    uint8_t* const of_warp = slot + S::FlagBytes + warp_m * kWarp * kPieceBytes;
    return reinterpret_cast<float4*>(of_warp + piece * kStride) + me.lane;
  };
  if (tile.first_block > 0) {
    uint8_t* const slot = fixup_slot<S>(p, work.unit);
    for_pieces<S>(0, S::Tokens / 8, [&](int f, int group, int piece) {
      if (owns_piece<S>(me, piece)) *place(slot, piece) = piece_of(sum[f], group);
    });
    named_barrier_arrive(kFixupBarrier, S::Consumers + kWarp);
    return false;
  }
  const int end = (index + 1) * p.tiling.k_blocks;
  for (int unit = work.unit + 1; unit_begin(p.tiling, unit) < end; ++unit) {
    uint8_t* const slot = fixup_slot<S>(p, unit);
    uint64_t* const flag = reinterpret_cast<uint64_t*>(slot) + me.warpgroup_k * S::WarpgroupsM * 4 + warp_m;
    if (me.lane == 0) wait_until_published(flag, p.epoch);
    __syncwarp();
    for_pieces<S>(0, S::Tokens / 8, [&](int f, int group, int piece) {
      if (owns_piece<S>(me, piece)) add_piece(sum[f], group, __ldcg(place(slot, piece)));
    });
    __syncwarp();
    if (me.lane == 0) *flag = 0;
  }
  return true;
}

// What a warp of the producers does for them: it waits until all sums are on their way and memory has them, which would
// hold up the consumers, and sets the flags.
template <class S>
__device__ inline void publish_fixup(const Parameters& p, const Work& work) {
  static_assert(kWarpgroupBarrier + S::Warpgroups <= kFixupBarrier, "no two uses of one named barrier at a time");
  if (work.first_block == 0) return;
  named_barrier(kFixupBarrier, S::Consumers + kWarp);
  const int lane = threadIdx.x % kWarp;
  auto* const flags = reinterpret_cast<uint64_t*>(fixup_slot<S>(p, work.unit));
  if (lane < S::Consumers / kWarp) publish(flags + lane, p.epoch);
}

// Adds up what others have of this CTA's sums of a tile. Returns whether this warp stores any.
//
// Two buffers suffice for what a cluster sends: a CTA sends the sums of tile i + 2 after it has received those of tile
// i + 1, which were sent after all of the sender's warps were done with tile i.
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
