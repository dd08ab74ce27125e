// The list of token tiles of rows that name their experts themselves, as DeepGEMM's contiguous layout has them.
#pragma once

#include "native/routing.cuh"

namespace w4a16::native {

struct IndexedRowsParameters {
  const int32_t* experts_of_rows;  // [rows]; others than 0 to experts - 1 are rows of no expert
  int experts;
  int rows;
  int tile_tokens;
  int most_tiles;  // that the list has room for
  TokenTiles* token_tiles;
};

// One CTA finds the first and the last row of each expert, whose rows follow one another, and lists their token tiles.
// Where they do not, some rows of the expert are left out, and tiles that the list has no room for.
template <int Threads>
__global__ void __launch_bounds__(Threads) list_indexed_rows(const __grid_constant__ IndexedRowsParameters p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const RoutingMemory shared(memory, p.experts);
  int32_t* const ends = shared.counts;
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread < p.experts) shared.first_rows[thread] = ends[thread] = 0;
  wait_for_prerequisites();
  __syncthreads();
  const auto expert_at = [&](int row) { return row >= 0 && row < p.rows ? p.experts_of_rows[row] : kNoExpert; };
  for (int begin = thread; begin < p.rows; begin += kReadAhead * kRoutingThreads) {
    int experts[kReadAhead][3];  // of the row before, of this one, and of the next one
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
#pragma unroll
      for (int j = 0; j < 3; ++j) experts[i][j] = expert_at(begin + i * kRoutingThreads + j - 1);
    }
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      const int row = begin + i * kRoutingThreads;
      const int expert = experts[i][1];
      if (expert < 0 || expert >= p.experts) continue;
      if (experts[i][0] != expert) shared.first_rows[expert] = row;
      if (experts[i][2] != expert) ends[expert] = row + 1;
    }
  }
  __syncthreads();
  const auto rows_of = [&](int expert) {
    const int first = shared.first_rows[expert];
    return make_int2(first, max(first, ends[expert]));
  };
  list_tiles(p, shared, rows_of);
}

}  // namespace w4a16::native
