// Calls of the emulation that the C interface does not have: mixtures of experts.
#include "native/experts.cuh"

#include "library/registry.h"

namespace native = w4a16::native;

namespace {

template <class Parameter>
int start(void (*kernel)(Parameter), int grid, int threads, int shared_bytes, Parameter parameter) {
  emulation::add_kernel(kernel);
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = static_cast<unsigned>(grid);
  configuration.blockDim = static_cast<unsigned>(threads);
  configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  void* arguments[] = {&parameter};
  return cudaLaunchKernelExC(&configuration, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace

extern "C" {

#define EMULATION_API __attribute__((visibility("default")))

EMULATION_API int emulated_route(const native::RoutingParameters* given) {
  return start(&native::route, 1, native::kRoutingThreads, native::routing_bytes(given->experts), *given);
}

EMULATION_API int emulated_list_token_tiles(const native::ListingParameters* given) {
  return start(&native::list_token_tiles, 1, native::kRoutingThreads, native::routing_bytes(given->experts), *given);
}

EMULATION_API int emulated_gather(const native::GatherParameters* given) {
  return start(&native::gather_rows, 3, native::kRowThreads, 0, *given);
}

EMULATION_API int emulated_activate(const native::ActivationParameters* given) {
  return start(&native::activate_rows, 3, native::kRowThreads, 0, *given);
}

EMULATION_API int emulated_combine(const native::CombineParameters* given) {
  return start(&native::combine_rows, 3, native::kRowThreads, 0, *given);
}

EMULATION_API int64_t emulated_max_token_tiles(int64_t tokens, int64_t experts, int tile_tokens) {
  return native::max_token_tiles(tokens, experts, tile_tokens);
}

EMULATION_API int emulated_grouped(const char* name, const w4a16_problem* problem,
                                   const w4a16_gemm_arguments* arguments, const w4a16::Experts* experts, int sm_count) {
  for (int i = 0; i < w4a16::kKernelCount; ++i) {
    if (std::strcmp(w4a16::kKernels[i]->info.name, name) == 0) {
      return w4a16::kKernels[i]->launch({*problem, *arguments, sm_count, sm_count, *experts});
    }
  }
  return -1;
}

}  // extern "C"
