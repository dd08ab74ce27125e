// The residual that an epilogue adds, on its way to the threads that have the sums.
//
// Where the output goes through shared memory, the copy engine brings a tile's residual to the place of its output
// before the main loop ends. There each warp reads the values that it replaces. Elsewhere threads read what they will
// write. So nobody else reads an element of the residual, which may be the output itself.
#pragma once

#include "native/channels.cuh"

namespace w4a16::native {

// The first token of those that this CTA stores of a tile.
template <class S>
__device__ inline int stored_token(const Tile& tile, int rank) {
  return tile.token + (S::ClusterK > 1 ? rank * S::StoredTokens : 0);
}

// The thread of the warpgroups of some channels that starts copies of their output.
__device__ inline bool copies_output(const Consumer& me) { return me.warpgroup_k == 0 && me.warp == 0 && me.lane == 0; }

// Waits until the copy engine has read the previous tile's outputs.
template <class S>
__device__ inline void await_output_place(const Consumer& me) {
  if (copies_output(me)) wait_for_store_reads<0>();
  named_barrier(kWarpgroupBarrier + me.warpgroup_m, S::WarpgroupsK * kWarpgroup);
}

// Requests a tile's residual as soon as the previous tile's output has left its place.
template <class S>
__device__ inline void request_residual(const Parameters& p, const Shared<S>& shared, const Tile& tile, int rank,
                                        const Consumer& me) {
  if (p.residual_pointer == nullptr || !copies_output(me)) return;
  wait_for_prerequisites();
  wait_for_store_reads<0>();
  barrier_arrive_expecting(shared.residual(), S::Fragments * S::BoxBytes / S::ChannelsPerOutput);
#pragma unroll
  for (int f = 0; f < S::Fragments; ++f) {
    tensor_copy<1>(shared.output(me.warpgroup_m) + f * S::BoxBytes, &p.residual,
                   first_channel<S>(tile, me, f) / S::ChannelsPerOutput, stored_token<S>(tile, rank), shared.residual(),
                   0);
  }
}

// Waits for the residual of this CTA's tile number `turn`, also where another CTA stores the tile.
template <class S>
__device__ inline void await_residual(const Parameters& p, const Shared<S>& shared, int turn) {
  if (p.residual_pointer != nullptr) barrier_wait(shared.residual(), turn % 2);
}

// Whether this warp stores a piece.
template <class S>
__device__ inline bool stores_piece(const Consumer& me, int rank, int f, int group) {
  return owns_piece<S>(me, group * S::Fragments + f) && (S::ClusterK == 1 || owner_of<S>(me, group) == rank);
}

// Where a lane reads and writes a piece of outputs, without shared memory: some channels of one token. Gated outputs
// are two channels per lane, the others four: even lanes have lower channels, odd lanes upper ones.
struct PlaceOfPiece {
  int channel;
  int token;
  int columns;
  bool is_inside;

  template <class S>
  __device__ static PlaceOfPiece of(const Parameters& p, const Tile& tile, const Consumer& me, int f, int group) {
    const int first = first_channel<S>(tile, me, f) + me.warp * 16;
    const int channel = S::Gates ? first / 2 + me.lane % 4 * 2 : first + me.lane % 2 * 8 + me.lane % 4 / 2 * 4;
    const int token = tile.token + group * 8 + me.lane / 4;
    const int columns = p.n / S::ChannelsPerOutput;
    return {channel, token, columns, token < end_token<S>(p, tile) && channel < columns};
  }

  __device__ int64_t offset() const { return static_cast<int64_t>(token) * columns + channel; }
};

// The residual of gated outputs, or of others, in a lane's place.
__device__ inline void load_residual(const Parameters& p, const PlaceOfPiece& place, uint32_t (&words)[1]) {
  if (place.is_inside) load_global(p.residual_pointer + place.offset(), words[0]);
}
__device__ inline void load_residual(const Parameters& p, const PlaceOfPiece& place, uint32_t (&words)[2]) {
  if (place.is_inside) load_global(p.residual_pointer + place.offset(), words[0], words[1]);
}

// Brings words from the places of lanes to the threads that have the sums: the inverse of what store_from_registers
// does.
__device__ inline void to_sums(uint32_t (&words)[2], int lane) {
  const bool upper = lane % 2 != 0;
  const uint32_t neighbours = __shfl_xor_sync(0xffffffff, upper ? words[0] : words[1], 1);
  const uint32_t two[2] = {upper ? neighbours : words[0], upper ? words[1] : neighbours};
  words[0] = transpose_8x8(two[0]);
  words[1] = transpose_8x8(two[1]);
}

__device__ inline void to_sums(uint32_t (&word)[1], int) { word[0] = transpose_8x8(word[0]); }

}  // namespace w4a16::native
