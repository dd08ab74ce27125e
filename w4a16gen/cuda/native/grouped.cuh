// The host side of grouped kernels: launches of what a mixture of experts does around its products, and the kernel's
// table entry.
#pragma once

#include <algorithm>

#include "native/experts.cuh"
#include "native/indexed_rows.cuh"
#include "native/launch.cuh"
#include "native/routing.cuh"

namespace w4a16::native::grouped {

// CTAs of kernels that work on rows: as many as run at once on a multiprocessor of 2048 threads.
constexpr int kRowCtasPerSm = 2048 / kRowThreads;

constexpr int kSharedBytesWithoutAsking = 48 * 1024;

// How a kernel is started: nothing that the device must say first.
struct Start {
  int64_t ctas;
  int threads;
  int shared_bytes;
  void* stream;
  int32_t dependent_launch;
};

template <class Parameters>
cudaError_t start(void (*kernel)(Parameters), Parameters parameters, const Start& how) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (how.shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = static_cast<unsigned>(how.ctas);
  configuration.blockDim = static_cast<unsigned>(how.threads);
  configuration.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  configuration.stream = static_cast<cudaStream_t>(how.stream);
  configuration.attrs = &attribute;
  configuration.numAttrs = how.dependent_launch != 0 ? 1 : 0;
  void* arguments[] = {&parameters};
  return cudaLaunchKernelExC(&configuration, function, arguments);
}

// A CTA for each part of some work, but no more than run at once.
template <class Given>
Start cta_per_part(const Given& given, int64_t parts, int sm_count) {
  const int64_t ctas = std::min(std::max(parts, int64_t{1}), int64_t{sm_count} * kRowCtasPerSm);
  return {ctas, kRowThreads, 0, given.stream, given.dependent_launch};
}

inline int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

inline Gathered gathered_by(const void* hidden, const void* weights, void* rows, int64_t slots, int64_t columns) {
  return {static_cast<const Halves*>(hidden), static_cast<const float*>(weights), static_cast<Halves*>(rows),
          static_cast<int>(slots), static_cast<int>(columns / kVector)};
}

inline cudaError_t launch_gathering(const w4a16_gather_arguments& given, int sm_count) {
  GatherParameters p{};
  p.gathered = gathered_by(given.hidden, given.weights, given.rows, given.slots, given.columns);
  p.row_count = static_cast<const int32_t*>(given.row_count);
  p.routes_of_rows = static_cast<const int32_t*>(given.routes_of_rows);
  p.routes = static_cast<int>(given.tokens * given.slots);
  return start(&gather_rows<kRowThreads>, p, cta_per_part(given, parts_of(p.routes, kRowThreads / kWarp), sm_count));
}

inline cudaError_t launch_route(const w4a16_route_arguments& given, int sm_count) {
  RoutingParameters p{};
  p.ids = ids_of({given.ids, given.expert_map, given.global_experts, given.id_bytes}, given.experts,
                 given.tokens * given.slots);
  p.tile_tokens = static_cast<int>(given.tile_tokens);
  p.offsets = static_cast<int32_t*>(given.offsets);
  p.routes_of_rows = static_cast<int32_t*>(given.routes_of_rows);
  p.rows_of_routes = static_cast<int32_t*>(given.rows_of_routes);
  p.token_tiles = static_cast<TokenTiles*>(given.token_tiles);
  const int64_t routes = given.tokens * given.slots;
  const auto parts = static_cast<int>(sorted_parts(routes));
  p.part_routes = static_cast<int>(parts_of(routes, parts));
  const bool gathers = given.hidden != nullptr;
  const bool at_once = gathers && routes <= kMaxRoutesOfCta;
  const int gathered_rows = at_once ? p.ids.routes : 0;
  const int64_t ctas = at_once ? parts_of(p.ids.routes, kRoutingWarps) : parts;
  if (at_once) p.gathered = gathered_by(given.hidden, given.weights, given.rows, given.slots, given.columns);
  int32_t dependent_launch = given.dependent_launch;
  if (parts > 1) {
    const int64_t listed = listed_bytes(routes, given.experts, given.tile_tokens);
    p.counts = reinterpret_cast<int32_t*>(static_cast<uint8_t*>(given.token_tiles) + listed);
    const cudaError_t error =
        start(&count_routes<kRoutingThreads>, p,
              {parts, kRoutingThreads, routing_bytes(p.ids.experts), given.stream, dependent_launch});
    if (error != cudaSuccess) return error;
    dependent_launch = 1;
  }
  const int64_t at_most = parts > 1 ? parts : sm_count;
  const cudaError_t error = start(&route<kRoutingThreads>, p,
                                  {std::min(ctas, at_most), kRoutingThreads,
                                   routing_bytes(p.ids.experts, gathered_rows), given.stream, dependent_launch});
  if (error != cudaSuccess || !gathers || at_once) return error;
  return launch_gathering({given.hidden, p.offsets + p.ids.experts, given.routes_of_rows, given.weights, given.rows,
                           given.tokens, given.slots, given.columns, given.stream, 1},
                          sm_count);
}

inline cudaError_t launch_indexed_listing(const w4a16_listing_arguments& given) {
  IndexedRowsParameters p{};
  p.experts_of_rows = static_cast<const int32_t*>(given.indices);
  p.experts = static_cast<int>(given.experts);
  p.rows = static_cast<int>(given.rows);
  p.tile_tokens = static_cast<int>(given.tile_tokens);
  p.most_tiles = static_cast<int>(max_token_tiles(given.rows, given.experts, given.tile_tokens));
  p.token_tiles = static_cast<TokenTiles*>(given.token_tiles);
  return start(&list_indexed_rows<kRoutingThreads>, p,
               {1, kRoutingThreads, routing_bytes(p.experts), given.stream, given.dependent_launch});
}

inline cudaError_t launch_listing(const w4a16_listing_arguments& given) {
  if (given.indices != nullptr) return launch_indexed_listing(given);
  ListingParameters p{};
  p.offsets = static_cast<const int32_t*>(given.offsets);
  p.counts = static_cast<const int32_t*>(given.counts);
  p.stride = static_cast<int>(given.stride);
  p.experts = static_cast<int>(given.experts);
  p.rows = static_cast<int>(given.rows);
  p.tile_tokens = static_cast<int>(given.tile_tokens);
  p.most_tiles = static_cast<int>(max_token_tiles(given.rows, given.experts, given.tile_tokens));
  p.token_tiles = static_cast<TokenTiles*>(given.token_tiles);
  return start(&list_token_tiles<kRoutingThreads>, p,
               {1, kRoutingThreads, routing_bytes(p.experts), given.stream, given.dependent_launch});
}

inline cudaError_t launch_activating(const w4a16_activate_arguments& given, int sm_count) {
  ActivationParameters p{};
  p.gates_and_factors = static_cast<const Halves*>(given.gates_and_factors);
  p.row_count = static_cast<const int32_t*>(given.row_count);
  p.output = static_cast<Halves*>(given.output);
  p.rows = static_cast<int>(given.rows);
  p.vectors = static_cast<int>(given.columns / kVector);
  p.activation = activation_of(given.activation);
  return start(&activate_rows<kRowThreads>, p,
               cta_per_part(given, parts_of(given.rows * p.vectors, kRowThreads), sm_count));
}

inline cudaError_t launch_combining(const w4a16_combine_arguments& given, int sm_count) {
  CombineParameters p{};
  p.rows = static_cast<const Halves*>(given.rows);
  p.rows_of_routes = static_cast<const int32_t*>(given.rows_of_routes);
  if (given.rows_of_routes == nullptr) p.ids = ids_of(given.unsorted, given.experts, given.tokens * given.slots);
  p.weights = static_cast<const float*>(given.weights);
  p.output = static_cast<Halves*>(given.output);
  p.tokens = static_cast<int>(given.tokens);
  p.slots = static_cast<int>(given.slots);
  p.vectors = static_cast<int>(given.columns / kVector);
  return start(&combine_rows<kRowThreads>, p,
               cta_per_part(given, given.tokens * parts_of(p.vectors, kRowThreads), sm_count));
}

constexpr ExpertFunctions kExpertFunctions{&launch_route, &launch_listing, &launch_gathering, &launch_activating,
                                           &launch_combining};

template <class S>
constexpr Kernel make_kernel(const char* name) {
  static_assert(S::Grouped, "kernels of one weight come without the functions of experts");
  return native::make_kernel<S>(name, &kExpertFunctions);
}

}  // namespace w4a16::native::grouped
