// The interface between the library and a kernel target: what a kernel is, what it needs, how it is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "w4a16.h"

namespace w4a16 {

using Problem = w4a16_problem;

// Everything one launch needs, already checked; all pointers are device pointers on the current device.
struct Launch {
  Problem problem;
  w4a16_gemm_arguments arguments;
  int device;
  int sm_count;
};

// What measures the GPU rather than a kernel: see w4a16_probe_read and w4a16_probe_multiply.
struct Probes {
  cudaError_t (*read)(const void* data, size_t bytes, int sm_count, bool dependent_launch, cudaStream_t stream);
  cudaError_t (*multiply)(int rounds, int sm_count, cudaStream_t stream);
  int64_t flops_per_round;  // and multiprocessor
};

// One built kernel. A target fills the functions from its own templates; nothing above them knows the target.
struct Kernel {
  w4a16_kernel_info info;
  size_t (*packed_bytes)(const Problem&);
  size_t (*workspace_bytes)(const Problem&, int sm_count);
  cudaError_t (*launch)(const Launch&);
  // Packs a weight on the GPU, arguments already checked; null where the target has no such thing.
  cudaError_t (*pack)(const Problem&, const w4a16_pack_arguments&);
  // Null where the target brings none.
  const Probes* probes;
};

}  // namespace w4a16
