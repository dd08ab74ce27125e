// The entry of a kernel that can be described but not launched, as tests/fakes/nvcc.py compiles it.
#pragma once

#include "cutlass/layout.h"
#include "library/kernel.h"

// Defines the entry of a kernel from the parts of its name; the last three sizes are those of its cluster.
#define W4A16_FAKE_KERNEL(NAME, TARGET, LAYOUT, MODE, HAS_ZEROS, EPILOGUE, GROUPED, CHANNELS, TOKENS, K, ...)          \
  namespace w4a16 {                                                                                                    \
  extern const Kernel NAME##_kernel;                                                                                   \
  const Kernel NAME##_kernel = {                                                                                       \
      {#NAME, TARGET, LAYOUT, mode::MODE, {CHANNELS, TOKENS, K}, {__VA_ARGS__}, 4, 384, K, 100000, EPILOGUE, GROUPED}, \
      [](const Problem& problem) { return cutlass_target::PackedLayout(problem, HAS_ZEROS).bytes; },                   \
      [](const Problem& problem, int sm_count) { return static_cast<size_t>(problem.m * sm_count); },                  \
      [](const Launch&) { return cudaErrorNotSupported; },                                                             \
      nullptr,                                                                                                         \
      nullptr,                                                                                                         \
      GROUPED ? &kFakeExpertFunctions : nullptr};                                                                      \
  }

namespace w4a16 {

constexpr ExpertFunctions kFakeExpertFunctions{
    [](const w4a16_route_arguments&, int) { return cudaErrorNotSupported; },
    [](const w4a16_listing_arguments&) { return cudaErrorNotSupported; },
    [](const w4a16_gather_arguments&, int) { return cudaErrorNotSupported; },
    [](const w4a16_activate_arguments&, int) { return cudaErrorNotSupported; },
    [](const w4a16_combine_arguments&, int) { return cudaErrorNotSupported; },
};

}  // namespace w4a16
