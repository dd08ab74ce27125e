// The entry of a kernel that can be described but not launched, as tests/fakes/nvcc.py compiles it.
#pragma once

#include "cutlass/layout.h"
#include "library/kernel.h"

// Defines the entry of a kernel from the parts of its name; the last three sizes are those of its cluster.
#define W4A16_FAKE_KERNEL(NAME, TARGET, LAYOUT, MODE, HAS_ZEROS, EPILOGUE, CHANNELS, TOKENS, K, ...)          \
  namespace w4a16 {                                                                                           \
  extern const Kernel NAME##_kernel;                                                                          \
  const Kernel NAME##_kernel = {                                                                              \
      {#NAME, TARGET, LAYOUT, mode::MODE, {CHANNELS, TOKENS, K}, {__VA_ARGS__}, 4, 384, K, 100000, EPILOGUE}, \
      [](const Problem& problem) { return cutlass_target::PackedLayout(problem, HAS_ZEROS).bytes; },          \
      [](const Problem& problem, int sm_count) { return static_cast<size_t>(problem.m * sm_count); },         \
      [](const Launch&) { return cudaErrorNotSupported; },                                                    \
      nullptr,                                                                                                \
      nullptr};                                                                                               \
  }
