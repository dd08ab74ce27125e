// The experts that routes choose, and how the warps of a product of few tokens find them by themselves.
//
// A route is a token's choice of one expert; its number is token * slots + slot.
#pragma once

#include "native/ptx.cuh"
#include "native/shape.h"

namespace w4a16::native {

constexpr uint32_t kAllLanes = 0xffffffff;
constexpr int kNoExpert = -1;

struct Ids {
  const int32_t* experts32;   // of each route; or
  const int64_t* experts64;   // the same with 64 bits
  const int32_t* expert_map;  // [global experts], to the experts here or kNoExpert; may be null
  int global_experts;
  int experts;
  int routes;

  __device__ int expert_of(int route) const {
    const int64_t global = experts64 != nullptr ? experts64[route] : experts32[route];
    if (global < 0 || global >= global_experts) return kNoExpert;
    const int expert = expert_map != nullptr ? expert_map[global] : static_cast<int>(global);
    return expert >= 0 && expert < experts ? expert : kNoExpert;
  }
};

__device__ inline uint32_t lanes_below(int lane) { return (1u << lane) - 1; }

// The experts of at most kMaxUnsortedRoutes routes, in the registers of a warp. They are numbered in the order in which
// routes first choose them. All lanes of a warp call all functions.
struct Choices {
  static constexpr int kParts = kMaxUnsortedRoutes / kWarp;
  int expert[kParts];      // of this lane's routes, one in each part of 32
  int number[kParts];      // of that expert
  uint32_t first[kParts];  // the lanes whose routes choose their expert first

  __device__ explicit Choices(const Ids& ids) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int route = part * kWarp + lane;
      expert[part] = route < ids.routes ? ids.expert_of(route) : kNoExpert;
    }
    int known = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int earlier = kNoExpert;  // the number of the same expert in the part before
      if (part > 0 && part * kWarp < ids.routes) {
        for (int other = 0; other < kWarp; ++other) {
          const int same = __shfl_sync(kAllLanes, expert[0], other);
          const int its_number = __shfl_sync(kAllLanes, number[0], other);
          if (same == expert[part]) earlier = its_number;
        }
      }
      const uint32_t same = __match_any_sync(kAllLanes, expert[part]);
      const bool is_first = expert[part] != kNoExpert && earlier == kNoExpert && (same & lanes_below(lane)) == 0;
      first[part] = __ballot_sync(kAllLanes, is_first);
      const int new_number = known + __popc(first[part] & lanes_below(__ffs(static_cast<int>(same)) - 1));
      number[part] = expert[part] == kNoExpert ? kNoExpert : earlier != kNoExpert ? earlier : new_number;
      known += __popc(first[part]);
    }
    static_assert(kParts == 2, "a part looks at the one before it");
  }

  __device__ int count() const { return __popc(first[0]) + __popc(first[1]); }

  __device__ bool is_first(int part) const { return (first[part] >> threadIdx.x % kWarp & 1) != 0; }

  // kNoExpert if there are not as many.
  __device__ int expert_of_number(int wanted) const {
    int found = kNoExpert;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t lanes = __ballot_sync(kAllLanes, is_first(part) && number[part] == wanted);
      const int of_lane = __shfl_sync(kAllLanes, expert[part], max(__ffs(static_cast<int>(lanes)) - 1, 0));
      if (lanes != 0) found = of_lane;
    }
    return found;
  }

  // kNoExpert for a route to none.
  __device__ int number_of_route(int route) const {
    const int low = __shfl_sync(kAllLanes, number[0], route % kWarp);
    const int high = __shfl_sync(kAllLanes, number[1], route % kWarp);
    return route < kWarp ? low : high;
  }
};

}  // namespace w4a16::native
