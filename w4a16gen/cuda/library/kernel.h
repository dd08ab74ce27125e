// The interface between the library and a kernel family: the table entry of a kernel and its functions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "w4a16.h"

namespace w4a16 {

using Problem = w4a16_problem;

// GPUs of a process for which per-device state is kept. The CUDA runtime enumerates no more.
constexpr int kMaxDevices = 64;

constexpr int kPackedAlignment = 128;  // bytes, of packed weights, of the sections in them, and of workspaces

// Quantisation modes, by the tags that kernel names have.
namespace mode {
constexpr w4a16_mode cs = W4A16_PER_COLUMN_SCALE_ONLY;
constexpr w4a16_mode fgs = W4A16_FINEGRAINED_SCALE_ONLY;
constexpr w4a16_mode fgsz = W4A16_FINEGRAINED_SCALE_AND_ZEROS;
}  // namespace mode

// A launch whose arguments have been checked. All pointers are device pointers of the current device.
struct Launch {
  Problem problem;
  w4a16_gemm_arguments arguments;
  int device;
  int sm_count;
  w4a16_experts experts = {};  // of a grouped product
  // Whether each SM takes one CTA of a dependent launch at most, if all CTAs fit so. Those of a launch that finds no
  // room beside the CTAs before it go to the first SMs that become free, two to each if they can, and others stay idle.
  bool one_cta_per_sm = false;
  uint64_t epoch = 0;  // no other launch has the same
};

// Functions that measure the GPU instead of a kernel: see w4a16_probe_read and w4a16_probe_multiply.
struct Probes {
  cudaError_t (*read)(const void* data, size_t bytes, int sm_count, bool dependent_launch, cudaStream_t stream);
  cudaError_t (*multiply)(int rounds, int sm_count, cudaStream_t stream);
  int64_t flops_per_round;  // of one multiprocessor
};

// What a mixture of experts does around its grouped products. The arguments have been checked.
struct ExpertFunctions {
  cudaError_t (*route)(const w4a16_route_arguments&, int sm_count);
  cudaError_t (*list_token_tiles)(const w4a16_listing_arguments&);
  cudaError_t (*gather_rows)(const w4a16_gather_arguments&, int sm_count);
  cudaError_t (*activate_rows)(const w4a16_activate_arguments&, int sm_count);
  cudaError_t (*combine_rows)(const w4a16_combine_arguments&, int sm_count);
};

// One built kernel. Its family fills in the functions; the library calls them without knowing the family.
struct Kernel {
  w4a16_kernel_info info;
  size_t (*packed_bytes)(const Problem&);
  size_t (*workspace_bytes)(const Problem&, int sm_count);
  cudaError_t (*launch)(const Launch&);
  // Packs a weight on the GPU; its arguments have been checked. Null if the family packs on the host only.
  cudaError_t (*pack)(const Problem&, const w4a16_pack_arguments&);
  // Null if the family has none.
  const Probes* probes;
  // Null if the kernel is not grouped.
  const ExpertFunctions* experts;
};

}  // namespace w4a16

// Defines the entry of a kernel in the table. `family` is the namespace whose make_kernel knows the kernel's type.
#define W4A16_DEFINE_KERNEL(family, name) \
  extern const Kernel name##_kernel;      \
  const Kernel name##_kernel = family::make_kernel<name>(#name);
