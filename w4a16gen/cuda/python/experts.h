// The module's calls of mixtures of experts.
#pragma once

#include <cstdint>

#include "python/kernel_library.h"
#include "python/outcome.h"

namespace w4a16 {

// Makes a call that launches work on a device; other threads of Python run meanwhile.
template <class Call>
Outcome launched_on(int device, const Call& call) {
  Message message;
  w4a16_status status;
  {
    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    status = call(message.data(), message.size());
  }
  return py::make_tuple(static_cast<int>(status), message.data());
}

// Makes a call of a function whose arguments say how it is launched.
template <class Arguments>
Outcome launched(w4a16_status (*function)(const Arguments*, char*, size_t), Arguments arguments, uintptr_t stream,
                 int dependent_launch, int device) {
  arguments.stream = pointer(stream);
  arguments.dependent_launch = dependent_launch;
  return launched_on(device, [&](char* message, size_t bytes) { return function(&arguments, message, bytes); });
}

inline Outcome token_tiles_bytes(const KernelLibrary& library, int64_t rows, int64_t experts, int64_t tile_tokens) {
  Message message;
  size_t bytes = 0;
  const w4a16_status status =
      library.token_tiles_bytes(rows, experts, tile_tokens, &bytes, message.data(), message.size());
  return py::make_tuple(static_cast<int>(status), message.data(), bytes);
}

inline Outcome grouped_gemm(const KernelLibrary& library, int kernel, int64_t m, int64_t n, int64_t k,
                            int64_t group_size, uintptr_t activations, uintptr_t packed, size_t packed_bytes,
                            uintptr_t bias, uintptr_t output, float alpha, int activation, uintptr_t residual,
                            int64_t experts, size_t packed_stride, uintptr_t token_tiles, size_t token_tiles_bytes,
                            int64_t tile_tokens, bool list_is_complete, uintptr_t ids, int id_bytes,
                            uintptr_t expert_map, int64_t global_experts, int64_t slots, bool rows_are_shared,
                            uintptr_t stream, int dependent_launch, int device) {
  const w4a16_problem problem{m, n, k, group_size};
  w4a16_gemm_arguments arguments{};
  arguments.activations = pointer(activations);
  arguments.packed = pointer(packed);
  arguments.packed_bytes = packed_bytes;
  arguments.bias = pointer(bias);
  arguments.output = pointer(output);
  arguments.stream = pointer(stream);
  arguments.alpha = alpha;
  arguments.activation = activation;
  arguments.residual = pointer(residual);
  arguments.dependent_launch = dependent_launch;
  w4a16_experts grouped{};
  grouped.count = experts;
  grouped.packed_stride = packed_stride;
  grouped.token_tiles = pointer(token_tiles);
  grouped.token_tiles_bytes = token_tiles_bytes;
  grouped.tile_tokens = tile_tokens;
  grouped.list_is_complete = list_is_complete ? 1 : 0;
  grouped.unsorted = {pointer(ids), pointer(expert_map), global_experts, id_bytes};
  grouped.slots = slots;
  grouped.rows_are_shared = rows_are_shared ? 1 : 0;
  return launched_on(device, [&](char* message, size_t bytes) {
    return library.grouped_gemm(kernel, &problem, &arguments, &grouped, message, bytes);
  });
}

inline Outcome route(const KernelLibrary& library, uintptr_t ids, int id_bytes, uintptr_t expert_map,
                     int64_t global_experts, int64_t experts, int64_t tokens, int64_t slots, int64_t tile_tokens,
                     uintptr_t offsets, uintptr_t routes_of_rows, uintptr_t rows_of_routes, uintptr_t token_tiles,
                     size_t token_tiles_bytes, uintptr_t hidden, uintptr_t weights, uintptr_t rows, int64_t columns,
                     uintptr_t stream, int dependent_launch, int device) {
  w4a16_route_arguments arguments{};
  arguments.ids = pointer(ids);
  arguments.id_bytes = id_bytes;
  arguments.expert_map = pointer(expert_map);
  arguments.global_experts = global_experts;
  arguments.experts = experts;
  arguments.tokens = tokens;
  arguments.slots = slots;
  arguments.tile_tokens = tile_tokens;
  arguments.offsets = pointer(offsets);
  arguments.routes_of_rows = pointer(routes_of_rows);
  arguments.rows_of_routes = pointer(rows_of_routes);
  arguments.token_tiles = pointer(token_tiles);
  arguments.token_tiles_bytes = token_tiles_bytes;
  arguments.hidden = pointer(hidden);
  arguments.weights = pointer(weights);
  arguments.rows = pointer(rows);
  arguments.columns = columns;
  return launched(library.route, arguments, stream, dependent_launch, device);
}

inline Outcome list_token_tiles(const KernelLibrary& library, uintptr_t offsets, uintptr_t counts, int64_t stride,
                                uintptr_t indices, int64_t experts, int64_t rows, int64_t tile_tokens,
                                uintptr_t token_tiles, size_t token_tiles_bytes, uintptr_t stream, int dependent_launch,
                                int device) {
  w4a16_listing_arguments arguments{};
  arguments.offsets = pointer(offsets);
  arguments.counts = pointer(counts);
  arguments.stride = stride;
  arguments.indices = pointer(indices);
  arguments.experts = experts;
  arguments.rows = rows;
  arguments.tile_tokens = tile_tokens;
  arguments.token_tiles = pointer(token_tiles);
  arguments.token_tiles_bytes = token_tiles_bytes;
  return launched(library.list_token_tiles, arguments, stream, dependent_launch, device);
}

inline Outcome gather_rows(const KernelLibrary& library, uintptr_t hidden, uintptr_t row_count,
                           uintptr_t routes_of_rows, uintptr_t weights, uintptr_t rows, int64_t tokens, int64_t slots,
                           int64_t columns, uintptr_t stream, int dependent_launch, int device) {
  w4a16_gather_arguments arguments{};
  arguments.hidden = pointer(hidden);
  arguments.row_count = pointer(row_count);
  arguments.routes_of_rows = pointer(routes_of_rows);
  arguments.weights = pointer(weights);
  arguments.rows = pointer(rows);
  arguments.tokens = tokens;
  arguments.slots = slots;
  arguments.columns = columns;
  return launched(library.gather_rows, arguments, stream, dependent_launch, device);
}

inline Outcome activate_rows(const KernelLibrary& library, uintptr_t gates_and_factors, uintptr_t row_count,
                             uintptr_t output, int64_t rows, int64_t columns, int activation, uintptr_t stream,
                             int dependent_launch, int device) {
  w4a16_activate_arguments arguments{};
  arguments.gates_and_factors = pointer(gates_and_factors);
  arguments.row_count = pointer(row_count);
  arguments.output = pointer(output);
  arguments.rows = rows;
  arguments.columns = columns;
  arguments.activation = activation;
  return launched(library.activate_rows, arguments, stream, dependent_launch, device);
}

inline Outcome combine_rows(const KernelLibrary& library, uintptr_t rows, uintptr_t rows_of_routes, uintptr_t weights,
                            uintptr_t output, int64_t tokens, int64_t slots, int64_t columns, uintptr_t ids,
                            int id_bytes, uintptr_t expert_map, int64_t global_experts, int64_t experts,
                            uintptr_t stream, int dependent_launch, int device) {
  w4a16_combine_arguments arguments{};
  arguments.rows = pointer(rows);
  arguments.rows_of_routes = pointer(rows_of_routes);
  arguments.weights = pointer(weights);
  arguments.output = pointer(output);
  arguments.tokens = tokens;
  arguments.slots = slots;
  arguments.columns = columns;
  arguments.unsorted = {pointer(ids), pointer(expert_map), global_experts, id_bytes};
  arguments.experts = experts;
  return launched(library.combine_rows, arguments, stream, dependent_launch, device);
}

}  // namespace w4a16
