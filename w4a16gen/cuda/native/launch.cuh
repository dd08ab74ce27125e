// The host side of target `native`: tensor maps, launch configuration, workspace, and the kernel's table entry.
#pragma once

#include <atomic>

#include "library/driver.h"
#include "library/kernel.h"
#include "native/kernel.cuh"
#include "native/pack.cuh"
#include "native/probe.cuh"

namespace w4a16::native {

// Encodes the tensor map of a row-major fp16 matrix with boxes of 64 or 32 columns, whose rows are swizzled. Elements
// that are out of bounds read as 0 and are not written.
inline bool encode_tensor_map(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int box_rows,
                              int box_columns = kBlockChannels) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto swizzle = box_columns == kBlockChannels ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// How many clusters of a function run at once, with as many CTAs on an SM as there can be, and with one. The second
// number is 0 if no cluster fits so, and where no launch asks for it.
struct Occupancy {
  int clusters;
  int clusters_alone;
};

// A kernel's function for one number of scale rows. Per device: its driver handle, and its occupancy (0 before the
// first launch).
struct Function {
  const void* address;
  std::atomic<Occupancy> occupancy[kMaxDevices] = {};
  std::atomic<CUfunction> loaded[kMaxDevices] = {};

  explicit Function(const void* function) : address(function) {}
};

template <class S>
Function& function_for(int scale_rows) {
  if constexpr (S::Scales) {
    static Function functions[3] = {Function(reinterpret_cast<const void*>(&kernel<S, 1>)),
                                    Function(reinterpret_cast<const void*>(&kernel<S, 2>)),
                                    Function(reinterpret_cast<const void*>(&kernel<S, 4>))};
    return functions[scale_rows / 2];
  } else {
    static Function function(reinterpret_cast<const void*>(&kernel<S, 0>));
    return function;
  }
}

// Returns the launch configuration without grid and stream. `attributes` must outlive it.
template <class S>
cudaLaunchConfig_t configuration_of(cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t configuration{};
  configuration.blockDim = S::Threads;
  configuration.dynamicSmemBytes = S::SharedBytes;
  configuration.attrs = attributes;
  if (S::ClusterSize > 1) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {S::ClusterSize, 1, 1};
    configuration.numAttrs = 1;
  }
  return configuration;
}

// Finds how many clusters with some shared memory run at once, of which `ctas_per_sm` CTAs share an SM.
template <class S>
cudaError_t find_clusters(const Function& function, int sm_count, int ctas_per_sm, int shared_bytes, int* clusters) {
  *clusters = sm_count * ctas_per_sm;
  if (S::ClusterSize > 1) {
    cudaLaunchAttribute attributes[1] = {};
    cudaLaunchConfig_t configuration = configuration_of<S>(attributes);
    configuration.gridDim = static_cast<unsigned>(sm_count / S::ClusterSize * S::ClusterSize);
    configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    return cudaOccupancyMaxActiveClusters(clusters, function.address, &configuration);
  }
  return cudaSuccess;
}

// Before a function's first launch on a device: raises its shared memory limit and finds how many clusters run at once.
template <class S>
cudaError_t prepare(Function& function, const Launch& launch, Occupancy* occupancy) {
  std::atomic<Occupancy>* known = launch.device < kMaxDevices ? &function.occupancy[launch.device] : nullptr;
  if (known != nullptr) {
    *occupancy = known->load(std::memory_order_acquire);
    if (occupancy->clusters != 0) return cudaSuccess;
  }
  constexpr int kMostSharedBytes = S::PadsGrid ? S::SharedBytesAlone : S::SharedBytes;
  cudaError_t error =
      cudaFuncSetAttribute(function.address, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes);
  if (error != cudaSuccess) return error;
  // Two CTAs share an SM only if the carveout gives shared memory its maximum.
  error = cudaFuncSetAttribute(function.address, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  error = find_clusters<S>(function, launch.sm_count, S::CtasPerSm, S::SharedBytes, &occupancy->clusters);
  if (error != cudaSuccess) return error;
  if (occupancy->clusters < 1) return cudaErrorInvalidConfiguration;
  if (S::PadsGrid) {
    error = find_clusters<S>(function, launch.sm_count, 1, S::SharedBytesAlone, &occupancy->clusters_alone);
    if (error != cudaSuccess) return error;
  }
  if (known != nullptr) {
    cudaFunction_t loaded = nullptr;
    if (cudaGetFuncBySymbol(&loaded, function.address) == cudaSuccess) function.loaded[launch.device] = loaded;
    known->store(*occupancy, std::memory_order_release);
  }
  return cudaSuccess;
}

// Launches through the driver, which takes 3.7 us on the host instead of the runtime's 4 us (host of an H100, 2026-11).
// The runtime launches if this thread has no context yet, or another one than the function.
inline cudaError_t launch_function(const Function& function, int device, const cudaLaunchConfig_t& configuration,
                                   void** arguments) {
  static const auto launch = driver_function<decltype(&cuLaunchKernelEx)>("cuLaunchKernelEx");
  static_assert(sizeof(cudaLaunchAttribute) == sizeof(CUlaunchAttribute),
                "the runtime's launch attribute is the driver's");
  const CUfunction loaded = device < kMaxDevices ? function.loaded[device].load(std::memory_order_relaxed) : nullptr;
  if (launch != nullptr && loaded != nullptr) {
    const CUlaunchConfig same{configuration.gridDim.x,
                              configuration.gridDim.y,
                              configuration.gridDim.z,
                              configuration.blockDim.x,
                              configuration.blockDim.y,
                              configuration.blockDim.z,
                              static_cast<unsigned>(configuration.dynamicSmemBytes),
                              configuration.stream,
                              reinterpret_cast<CUlaunchAttribute*>(configuration.attrs),
                              configuration.numAttrs};
    const CUresult result = launch(&same, loaded, arguments, nullptr);
    const bool other_context = result == CUDA_ERROR_INVALID_CONTEXT || result == CUDA_ERROR_INVALID_HANDLE ||
                               result == CUDA_ERROR_CONTEXT_IS_DESTROYED || result == CUDA_ERROR_NOT_INITIALIZED;
    if (!other_context) return static_cast<cudaError_t>(result);  // both use the same error numbers
  }
  return cudaLaunchKernelExC(&configuration, function.address, arguments);
}

// Stream-K needs room for the partial sums of every CTA. How many clusters run at once is known only once the kernel is
// loaded; it is never more than this.
template <class S>
size_t workspace_bytes(const Problem& problem, int sm_count) {
  if (!S::StreamK) return 0;
  const PackedLayout layout(problem, S::Mode);
  Tiling tiling{};
  const int at_once = sm_count * S::CtasPerSm / S::ClusterSize;
  return size_t{S::FixupBytes} * make_tiling<S>(&tiling, problem.m, layout.channel_blocks, layout.k_blocks, at_once);
}

// Whether dependent launches may start as soon as this one runs. Otherwise they start when few weights are left to
// fetch (StagesAtTrigger), where two CTAs share an SM and both grids fit at once. An early start shortens chains of 1
// to 16 tokens by up to 8 % (28672x4096; H100, 2026-11). Launches whose CTAs take SMs alone start their dependents as
// if these fitted.
template <class S>
constexpr bool dependents_start_early(int ctas, int clusters_at_once) {
  return S::CtasPerSm == 1 || 2 * ctas > clusters_at_once * S::ClusterSize;
}

inline Ids ids_of(const w4a16_ids& given, int64_t experts, int64_t routes) {
  Ids ids{};
  if (given.id_bytes == sizeof(int64_t)) {
    ids.experts64 = static_cast<const int64_t*>(given.ids);
  } else {
    ids.experts32 = static_cast<const int32_t*>(given.ids);
  }
  ids.expert_map = static_cast<const int32_t*>(given.expert_map);
  ids.global_experts = static_cast<int>(given.expert_map != nullptr ? given.global_experts : experts);
  ids.experts = static_cast<int>(experts);
  ids.routes = static_cast<int>(routes);
  return ids;
}

// The rows of a product of unsorted routes: kUnsortedTokens for each expert that may be chosen.
inline int64_t rows_of_unsorted(const Launch& launch) {
  return unsorted_rows(launch.problem.m * launch.experts.slots, launch.experts.count);
}

template <class S>
cudaError_t launch(const Launch& launch) {
  const PackedLayout layout(launch.problem, S::Mode);
  Function& function = function_for<S>(layout.scale_rows);
  Occupancy occupancy{};
  cudaError_t error = prepare<S>(function, launch, &occupancy);
  if (error != cudaSuccess) return error;
  const int clusters_at_once = occupancy.clusters;

  const auto& [m, n, k, group_size] = launch.problem;
  const auto& given = launch.arguments;
  const auto* packed = static_cast<const uint8_t*>(given.packed);
  Parameters parameters{};
  const int fetched_tokens = S::SkipsOutOfBoundsRows && m < S::Tokens ? static_cast<int>(m) : S::Tokens;
  const bool is_unsorted = S::FindsExperts && launch.experts.unsorted.ids != nullptr;
  const bool shares_rows = is_unsorted && launch.experts.rows_are_shared != 0;
  const int64_t rows = is_unsorted && !shares_rows ? rows_of_unsorted(launch) : m;
  if (!encode_tensor_map(&parameters.activations, given.activations, rows, k, fetched_tokens))
    return cudaErrorInvalidValue;
  const auto encode_output = [m = m, n = n](CUtensorMap* map, const void* matrix) {
    return encode_tensor_map(map, matrix, m, n / S::ChannelsPerOutput, S::StoredTokens,
                             kBlockChannels / S::ChannelsPerOutput);
  };
  if (S::StoresThroughShared && !encode_output(&parameters.output, given.output)) return cudaErrorInvalidValue;
  bool in_place = false;
  if constexpr (S::HasEpilogue) {
    parameters.activation = activation_of(given.activation);
    parameters.residual_pointer = static_cast<const half*>(given.residual);
    in_place = given.residual != nullptr && given.residual == given.output;
    if (S::StoresThroughShared && given.residual != nullptr && !encode_output(&parameters.residual, given.residual)) {
      return cudaErrorInvalidValue;
    }
  }
  parameters.weights = packed;
  parameters.channel_factors = reinterpret_cast<const float*>(packed + layout.channel_factors_offset);
  parameters.bias = static_cast<const half*>(given.bias);
  parameters.output_pointer = static_cast<half*>(given.output);
  parameters.m = static_cast<int>(m);
  parameters.n = static_cast<int>(n);
  parameters.activation_bytes = fetched_tokens * S::Halves * 128;
  parameters.channel_blocks = layout.channel_blocks;
  parameters.block_bytes = layout.block_bytes;
  parameters.alpha = given.alpha;
  int64_t tiled_tokens = m;
  if constexpr (S::Grouped) {
    const w4a16_experts& experts = launch.experts;
    tiled_tokens = is_unsorted ? rows_of_unsorted(launch) : max_token_tiles(m, experts.count, S::Tokens) * S::Tokens;
    if (is_unsorted) parameters.ids = ids_of(experts.unsorted, experts.count, m * experts.slots);
    parameters.routes_are_unsorted = is_unsorted;
    parameters.rows_are_shared = shares_rows;
    parameters.expert_bytes = static_cast<int64_t>(experts.packed_stride);
    parameters.token_tiles = static_cast<const TokenTiles*>(experts.token_tiles);
    parameters.list_is_complete = experts.list_is_complete != 0;
  }
  const int ctas = make_tiling<S>(&parameters.tiling, tiled_tokens, layout.channel_blocks, layout.k_blocks,
                                  clusters_at_once, !in_place);
  if (ctas == 0) return cudaErrorInvalidValue;
  parameters.is_dependent = given.dependent_launch != 0;
  parameters.dependents_start_early = dependents_start_early<S>(ctas, clusters_at_once);
  if constexpr (S::StreamK) {
    parameters.workspace = static_cast<uint8_t*>(given.workspace);
    parameters.epoch = launch.epoch;
  }

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t configuration = configuration_of<S>(attributes);
  const bool is_alone = S::PadsGrid && launch.one_cta_per_sm && ctas <= occupancy.clusters_alone * S::ClusterSize;
  if (is_alone) configuration.dynamicSmemBytes = S::SharedBytesAlone;
  const bool is_padded = parameters.is_dependent && !is_alone;
  configuration.gridDim = static_cast<unsigned>(is_padded ? padded_grid<S>(ctas, clusters_at_once) : ctas);
  configuration.stream = static_cast<cudaStream_t>(given.stream);
  if (given.dependent_launch != 0) {
    attributes[configuration.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[configuration.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {&parameters};
  return launch_function(function, launch.device, configuration, arguments);
}

// `experts` is given for grouped kernels only, by native/grouped.cuh.
template <class S>
constexpr Kernel make_kernel(const char* name, const ExpertFunctions* experts = nullptr) {
  return {{name,
           "native",
           kLayout,
           S::Mode,
           {S::Channels, S::Tokens, S::K},
           {S::ClusterChannels, S::ClusterTokens, S::ClusterK},
           S::Stages,
           S::Threads,
           kGroupMultiple,
           S::SharedBytes,
           S::Gates         ? W4A16_GATED
           : S::HasEpilogue ? W4A16_ELEMENTWISE
                            : W4A16_NO_EPILOGUE,
           S::Grouped ? 1 : 0},
          [](const Problem& problem) { return PackedLayout(problem, S::Mode).bytes; },
          &workspace_bytes<S>,
          &launch<S>,
          &pack<S::Mode>,
          &kProbes,
          experts};
}

}  // namespace w4a16::native
