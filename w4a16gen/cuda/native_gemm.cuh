// Target `native`: the host side of the native kernel.
#pragma once

#include <atomic>

#include "kernel.h"
#include "native_kernel.cuh"

namespace w4a16::native {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that nothing links to the driver.
inline EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<EncodeTensorMap>(found) : nullptr;
  }();
  return function;
}

// The activations [m, k], k contiguous, in boxes of 64 k x the CTA's tokens, swizzled; what lies outside reads as 0.
inline bool describe_activations(CUtensorMap* map, const Launch& launch, int tokens) {
  const auto encode = encode_tensor_map();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(launch.problem.k), static_cast<cuuint64_t>(launch.problem.m)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(launch.problem.k) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(tokens)};
  const cuuint32_t steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(launch.arguments.activations), sizes,
                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The kernel's function for a number of scale rows, and on which devices it may use all shared memory.
struct Function {
  const void* address;
  std::atomic<uint64_t> raised{0};
};

template <class S>
Function& function_for(int scale_rows) {
  if constexpr (S::Scales) {
    static Function functions[3] = {{reinterpret_cast<const void*>(&kernel<S, 1>)},
                                    {reinterpret_cast<const void*>(&kernel<S, 2>)},
                                    {reinterpret_cast<const void*>(&kernel<S, 4>)}};
    return functions[scale_rows / 2];
  } else {
    static Function function{reinterpret_cast<const void*>(&kernel<S, 0>)};
    return function;
  }
}

template <class S>
cudaError_t launch(const Launch& launch) {
  const PackedLayout layout(launch.problem, S::Mode);
  auto& [function, raised] = function_for<S>(layout.scale_rows);
  const uint64_t bit = launch.device < 64 ? uint64_t{1} << launch.device : 0;
  if ((raised.load(std::memory_order_acquire) & bit) == 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SharedBytes);
    if (error != cudaSuccess) return error;
    raised.fetch_or(bit, std::memory_order_release);
  }

  const auto& [m, n, k, group_size] = launch.problem;
  const auto& given = launch.arguments;
  const auto* packed = static_cast<const uint8_t*>(given.packed);
  Parameters parameters{};
  if (!describe_activations(&parameters.activations, launch, S::Tokens)) return cudaErrorInvalidValue;
  parameters.weights = packed;
  parameters.channel_scales = reinterpret_cast<const half*>(packed + layout.channel_scales_offset);
  parameters.bias = static_cast<const half*>(given.bias);
  parameters.output = static_cast<half*>(given.output);
  parameters.m = static_cast<int>(m);
  parameters.n = static_cast<int>(n);
  parameters.k_blocks = layout.k_blocks;
  parameters.channel_blocks = layout.channel_blocks;
  parameters.block_bytes = layout.block_bytes;
  parameters.channel_tiles = (layout.channel_blocks + S::Blocks - 1) / S::Blocks;
  parameters.token_tiles = static_cast<int>((m + S::Tokens - 1) / S::Tokens);
  parameters.alpha = given.alpha;

  // Splitting kernels take one tile per cluster; the others stay and take several.
  const int64_t tiles = static_cast<int64_t>(parameters.channel_tiles) * parameters.token_tiles;
  const int64_t groups = S::Reduces || tiles < launch.sm_count ? tiles : launch.sm_count;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (S::ClusterK > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {S::ClusterK, 1, 1};
  }
  if (given.dependent_launch != 0) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = static_cast<unsigned>(groups * S::ClusterK);
  configuration.blockDim = S::Threads;
  configuration.dynamicSmemBytes = S::SharedBytes;
  configuration.stream = static_cast<cudaStream_t>(given.stream);
  configuration.attrs = attributes;
  configuration.numAttrs = count;
  void* arguments[] = {&parameters};
  return cudaLaunchKernelExC(&configuration, function, arguments);
}

template <class S>
constexpr Kernel make_kernel(const char* name) {
  return {{name,
           "native",
           "fragment_blocks_v1",
           S::Mode,
           {S::Channels, S::Tokens, kBlockK},
           {1, 1, S::ClusterK},
           S::Stages,
           S::Threads,
           kGroupMultiple,
           S::SharedBytes},
          [](const Problem& problem) { return PackedLayout(problem, S::Mode).bytes; },
          [](const Problem&, int) { return size_t{0}; },
          &launch<S>};
}

}  // namespace w4a16::native
