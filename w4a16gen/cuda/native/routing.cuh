// From the experts that tokens chose to the rows and token tiles of grouped products.
//
// Rows are routes in the order of their experts, and within an expert in the order of their numbers. So bits repeat.
// Routes to no expert have no row.
#pragma once

#include "native/choices.cuh"
#include "native/rows.cuh"
#include "native/tiles.h"

namespace w4a16::native {

constexpr int kRoutingThreads = 1024;
constexpr int kRoutingWarps = kRoutingThreads / kWarp;
static_assert(kMaxExperts == kRoutingThreads, "a thread for each");

struct RoutingParameters {
  Ids ids;
  int part_routes;  // that a CTA sorts
  int32_t* counts;  // [parts][experts], if there are several: the routes of each part
  int tile_tokens;
  int32_t* offsets;         // [experts + 1], written: the first row of each expert, and their number
  int32_t* routes_of_rows;  // [routes], written
  int32_t* rows_of_routes;  // [routes], written; kNoExpert for a route without a row
  TokenTiles* token_tiles;  // written
  Gathered gathered;        // perhaps without hidden states
};

// The rows of each expert, given by offsets [experts + 1], or by counts [experts] where expert e begins at row
// e * stride.
struct ListingParameters {
  const int32_t* offsets;
  const int32_t* counts;
  int stride;
  int experts;
  int rows;  // that the activations have
  int tile_tokens;
  int most_tiles;  // that the list has room for
  TokenTiles* token_tiles;
};

// Shared memory: the rows of every expert that each warp has seen, each expert's first row and first tile, and if rows
// are gathered, the route of each row.
constexpr int routing_bytes(int experts, int gathered_rows = 0) {
  return (kRoutingWarps * experts + 2 * (experts + 1) + 2 * kRoutingWarps + gathered_rows) *
         static_cast<int>(sizeof(int32_t));
}

struct RoutingMemory {
  int32_t* counts;          // [warps][experts]
  int32_t* first_rows;      // [experts + 1]
  int32_t* first_tiles;     // [experts + 1]
  int32_t* sums;            // [2][warps]
  int32_t* routes_of_rows;  // [gathered rows]

  __device__ RoutingMemory(uint8_t* memory, int experts)
      : counts(reinterpret_cast<int32_t*>(memory)),
        first_rows(counts + kRoutingWarps * experts),
        first_tiles(first_rows + experts + 1),
        sums(first_tiles + experts + 1),
        routes_of_rows(sums + 2 * kRoutingWarps) {}
};

// The sum of the values of all threads before this one, and of all of them.
struct PrefixSum {
  int before;
  int total;
};

__device__ inline PrefixSum prefix_sum(int value, int32_t* sums) {
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  const auto warp = static_cast<int>(threadIdx.x / kWarp);
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  static_assert(kRoutingWarps == kWarp, "each warp sums up what all warps have, a lane for each");
  const int of_lane = sums[lane];
  int up_to_lane = of_lane;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to_lane, distance);
    if (lane >= distance) up_to_lane += other;
  }
  const int before_warp = __shfl_sync(kAllLanes, up_to_lane - of_lane, warp);
  return {before_warp + sum - value, __shfl_sync(kAllLanes, up_to_lane, kWarp - 1)};
}

// Writes the list of token tiles, of experts whose first tiles are in shared memory.
template <class RowsOf>
__device__ inline void write_token_tiles(TokenTiles* list, const int32_t* first_tiles, int experts, int tiles,
                                         const RowsOf& rows_of) {
  if (threadIdx.x == 0) list->count = tiles;
  for (auto tile = static_cast<int>(threadIdx.x); tile < tiles; tile += kRoutingThreads) {
    int expert = 0;  // the last one whose first tile is not after this one; those without tiles come before it
    for (int step = kRoutingThreads / 2; step > 0; step /= 2) {
      if (expert + step < experts && first_tiles[expert + step] <= tile) expert += step;
    }
    const int2 rows = rows_of(expert);
    (&list->first)[tile] = {expert, first_tiles[expert], rows.x, rows.y};
  }
}

constexpr int kReadAhead = 8;  // ids that a thread reads at once: each read takes long

// How warps divide the routes of a part: each takes `rounds` times 32 routes that follow one another.
struct Division {
  int first_route;
  int end;
  int rounds;
  int warps;  // that have routes

  __device__ Division(const RoutingParameters& p, int part)
      : first_route(part * p.part_routes),
        end(min(first_route + p.part_routes, p.ids.routes)),
        rounds((end - first_route + kRoutingThreads - 1) / kRoutingThreads),
        warps((end - first_route + kWarp * rounds - 1) / (kWarp * rounds)) {}
};

// Calls visit(route, expert, lanes of the warp with the same expert) for this warp's part of the routes. All lanes call
// it, with kNoExpert behind the end.
template <class Visit>
__device__ inline void for_routes(const RoutingParameters& p, const Division& division, const Visit& visit) {
  const auto warp = static_cast<int>(threadIdx.x / kWarp);
  if (warp >= division.warps) return;
  const int within = warp * division.rounds * kWarp + static_cast<int>(threadIdx.x % kWarp);
  const int first = division.first_route + within;
  for (int begin = 0; begin < division.rounds; begin += kReadAhead) {
    int experts[kReadAhead];
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      const int route = first + (begin + i) * kWarp;
      experts[i] = begin + i < division.rounds && route < division.end ? p.ids.expert_of(route) : kNoExpert;
    }
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      if (begin + i >= division.rounds) break;
      visit(first + (begin + i) * kWarp, experts[i], __match_any_sync(kAllLanes, experts[i]));
    }
  }
}

// Replaces the rows that each warp has counted for this thread's expert by those that warps before it have counted.
// Returns their sum.
__device__ inline int sum_up_warps(const RoutingMemory& shared, const Division& division, int experts) {
  const auto thread = static_cast<int>(threadIdx.x);
  int rows = 0;
  if (thread >= experts) return rows;
  for (int begin = 0; begin < division.warps; begin += kReadAhead) {
    int counts[kReadAhead];
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      counts[i] = begin + i < division.warps ? shared.counts[(begin + i) * experts + thread] : 0;
    }
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      if (begin + i < division.warps) shared.counts[(begin + i) * experts + thread] = rows;
      rows += counts[i];
    }
  }
  return rows;
}

// Counts the routes of each expert that each warp has.
__device__ inline void count_by_warps(const RoutingParameters& p, const Division& division,
                                      const RoutingMemory& shared) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  int32_t* const mine = shared.counts + thread / kWarp * p.ids.experts;
  for_routes(p, division, [&](int, int expert, uint32_t same) {
    if (expert != kNoExpert && lane == __ffs(static_cast<int>(same)) - 1) mine[expert] += __popc(same);
    __syncwarp();
  });
  __syncthreads();
}

// Where many routes are sorted in parts: each CTA counts the routes of each expert in its part.
template <int Threads>
__global__ void __launch_bounds__(Threads) count_routes(const __grid_constant__ RoutingParameters p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const RoutingMemory shared(memory, p.ids.experts);
  const auto thread = static_cast<int>(threadIdx.x);
  const auto part = static_cast<int>(blockIdx.x);
  const Division division(p, part);
  for (int i = thread; i < division.warps * p.ids.experts; i += kRoutingThreads) shared.counts[i] = 0;
  wait_for_prerequisites();
  launch_dependents();
  __syncthreads();
  count_by_warps(p, division, shared);
  const int rows = sum_up_warps(shared, division, p.ids.experts);
  if (thread < p.ids.experts) p.counts[part * p.ids.experts + thread] = rows;
}

// The routes of this thread's expert: those of all parts, and those of the parts before one.
struct CountedRoutes {
  int all;
  int before;
};

__device__ inline CountedRoutes sum_up_parts(const RoutingParameters& p, int part, int parts) {
  CountedRoutes found{0, 0};
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread >= p.ids.experts) return found;
  for (int begin = 0; begin < parts; begin += kReadAhead) {
    int counts[kReadAhead];
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      counts[i] = begin + i < parts ? p.counts[(begin + i) * p.ids.experts + thread] : 0;
    }
#pragma unroll
    for (int i = 0; i < kReadAhead; ++i) {
      if (begin + i < part) found.before += counts[i];
      found.all += counts[i];
    }
  }
  return found;
}

// Counts the routes of each expert, and then gives each route its row: a stable counting sort. Many routes are sorted
// in parts, a CTA for each. If hidden states are given, it gathers them as well: every CTA then sorts all routes, and
// copies its share of the rows.
//
// Kernels are templates, as all in headers that several compile units include.
template <int Threads>
__global__ void __launch_bounds__(Threads) route(const __grid_constant__ RoutingParameters p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const RoutingMemory shared(memory, p.ids.experts);
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const bool is_divided = p.counts != nullptr;
  const int part = is_divided ? static_cast<int>(blockIdx.x) : 0;
  const bool is_lister = blockIdx.x == 0;
  const bool is_writer = is_divided || is_lister;  // of its routes
  const Division division(p, part);
  int32_t* const mine = shared.counts + thread / kWarp * p.ids.experts;
  for (int i = thread; i < division.warps * p.ids.experts; i += kRoutingThreads) shared.counts[i] = 0;
  wait_for_prerequisites();
  launch_dependents();
  __syncthreads();
  count_by_warps(p, division, shared);
  CountedRoutes counted{sum_up_warps(shared, division, p.ids.experts), 0};
  if (is_divided) counted = sum_up_parts(p, part, static_cast<int>(gridDim.x));
  const int rows = counted.all;
  const PrefixSum all_rows = prefix_sum(rows, shared.sums);
  const PrefixSum all_tiles = prefix_sum((rows + p.tile_tokens - 1) / p.tile_tokens, shared.sums + kRoutingWarps);
  if (thread < p.ids.experts) {
    shared.first_rows[thread] = all_rows.before;
    shared.first_tiles[thread] = all_tiles.before;
    if (is_lister) p.offsets[thread] = all_rows.before;
  }
  if (thread == 0) {
    shared.first_rows[p.ids.experts] = all_rows.total;
    if (is_lister) p.offsets[p.ids.experts] = all_rows.total;
  }
  __syncthreads();
  if (is_lister) {
    write_token_tiles(p.token_tiles, shared.first_tiles, p.ids.experts, all_tiles.total,
                      [&](int expert) { return make_int2(shared.first_rows[expert], shared.first_rows[expert + 1]); });
  }
  if (is_divided) {  // the parts before this one have the first rows of each expert
    __syncthreads();
    if (thread < p.ids.experts) shared.first_rows[thread] += counted.before;
    __syncthreads();
  }
  const bool gathers = p.gathered.hidden != nullptr;
  for_routes(p, division, [&](int route, int expert, uint32_t same) {
    const int earlier = expert != kNoExpert ? mine[expert] : 0;
    __syncwarp();
    if (expert != kNoExpert) {
      const int row = shared.first_rows[expert] + earlier + __popc(same & lanes_below(lane));
      if (is_writer) {
        p.routes_of_rows[row] = route;
        p.rows_of_routes[route] = row;
      }
      if (gathers) shared.routes_of_rows[row] = route;
      if (lane == __ffs(static_cast<int>(same)) - 1) mine[expert] = earlier + __popc(same);
    } else if (is_writer && route < division.end) {
      p.rows_of_routes[route] = kNoExpert;
    }
    __syncwarp();
  });
  if (!gathers) return;
  __syncthreads();
  gather_rows_of<Threads>(p.gathered, shared.routes_of_rows, all_rows.total);
}

// Lists the token tiles of experts whose rows each thread can tell. All threads call it.
template <class ListingOf, class RowsOf>
__device__ inline void list_tiles(const ListingOf& p, const RoutingMemory& shared, const RowsOf& rows_of) {
  const auto thread = static_cast<int>(threadIdx.x);
  int tiles = 0;
  if (thread < p.experts) {
    const int2 rows = rows_of(thread);
    tiles = (rows.y - rows.x + p.tile_tokens - 1) / p.tile_tokens;
  }
  const PrefixSum all_tiles = prefix_sum(tiles, shared.sums);
  if (thread < p.experts) shared.first_tiles[thread] = all_tiles.before;
  __syncthreads();
  write_token_tiles(p.token_tiles, shared.first_tiles, p.experts, min(all_tiles.total, p.most_tiles), rows_of);
  launch_dependents();
}

// One CTA lists the token tiles of experts whose rows are given. Rows outside the activations are left out, and tiles
// that the list has no room for: those of offsets that decrease.
template <int Threads>
__global__ void __launch_bounds__(Threads) list_token_tiles(const __grid_constant__ ListingParameters p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const RoutingMemory shared(memory, p.experts);
  wait_for_prerequisites();
  const auto rows_of = [&](int expert) {
    const int64_t first = p.offsets != nullptr ? p.offsets[expert] : int64_t{expert} * p.stride;
    const int64_t end = p.offsets != nullptr ? p.offsets[expert + 1] : first + min(p.counts[expert], p.stride);
    const auto within = [&](int64_t row) { return static_cast<int>(max(int64_t{0}, min(row, int64_t{p.rows}))); };
    return make_int2(within(first), max(within(first), within(end)));
  };
  list_tiles(p, shared, rows_of);
}

}  // namespace w4a16::native
