// Target `cutlass`: CUTLASS's SM90 mixed-input collective computes C^T = W^T A^T, with W as the register operand.
//
// CUTLASS's M is our output channels, its N our tokens.
#pragma once

#include <atomic>

// Only the SM90 main loop builders. CUTLASS's umbrella header also includes SM100 and SM120.
#include "cutlass/gemm/collective/builders/sm90_gmma_builder.inl"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_mma_tma_gmma_rs_warpspecialized_mixed_input.hpp"
//
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"
//
#include "cutlass/layout.h"
#include "library/kernel.h"

namespace w4a16::cutlass_target {

template <int Channels, int Tokens, int K>
using Shape = cute::Shape<cute::Int<Channels>, cute::Int<Tokens>, cute::Int<K>>;

// Schedules and schedulers, by the names that kernels have.
namespace schedule {
struct pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
struct cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
}  // namespace schedule

namespace scheduler {
using persistent = cutlass::gemm::PersistentScheduler;
using streamk = cutlass::gemm::StreamKScheduler;
}  // namespace scheduler

using Half = cutlass::half_t;
using Weight = cutlass::int4b_t;  // q XOR 8 as a signed value is exactly q - 8, without an operand for the 8

// D = factor * accumulator + bias in fp32, rounded once to fp16. The factor is alpha, or in per-column mode alpha times
// the channel's scale: the main loop then multiplies by the exact q - 8 and loads no scales.
template <class Cta, bool ScalesChannels>
struct Fusion {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using Alpha = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>;
  using PerChannel =
      cutlass::epilogue::fusion::Sm90ColBroadcast<0, Cta, Half, float, cute::Stride<cute::_1, cute::_0, cute::_0>, 1>;
  using Multiply = cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>;
  using MultiplyAdd = cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Half, float, kRound>;
  using Factor =
      cute::conditional_t<ScalesChannels, cutlass::epilogue::fusion::Sm90EVT<Multiply, Alpha, PerChannel>, Alpha>;
  using Type =
      cutlass::epilogue::fusion::Sm90EVT<MultiplyAdd, Factor, cutlass::epilogue::fusion::Sm90AccFetch, PerChannel>;
};

// The CUTLASS kernel of one configuration.
template <class Cta_, class Cluster_, w4a16_mode Mode, class Schedule, class Scheduler>
struct Gemm {
  using Cta = Cta_;
  using Cluster = Cluster_;
  static constexpr w4a16_mode kMode = Mode;
  static constexpr bool kScalesChannels = Mode == W4A16_PER_COLUMN_SCALE_ONLY;
  static constexpr bool kHasZeros = Mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS;

  using Sm90 = cutlass::arch::Sm90;
  using TensorOp = cutlass::arch::OpClassTensorOp;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Sm90, TensorOp, Cta, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,  //
      void, ColumnMajor, 8, Half, ColumnMajor, 8, typename Schedule::Epilogue,
      typename Fusion<Cta, kScalesChannels>::Type>::CollectiveOp;
  using WeightOperand =
      cute::conditional_t<kScalesChannels, cute::tuple<Weight>,
                          cute::conditional_t<kHasZeros, cute::tuple<Weight, Half, Half>, cute::tuple<Weight, Half>>>;
  using Stages =
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop =
      typename cutlass::gemm::collective::CollectiveBuilder<Sm90, TensorOp, WeightOperand, cutlass::layout::RowMajor,
                                                            32, Half, ColumnMajor, 8, float, Cta, Cluster, Stages,
                                                            typename Schedule::Mainloop>::CollectiveOp;
  using Operator = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
};

template <class Gemm>
typename Gemm::Operator::Arguments make_arguments(const Launch& launch) {
  const auto& [m, n, k, group_size] = launch.problem;
  const auto& given = launch.arguments;
  const PackedLayout layout(launch.problem, Gemm::kHasZeros);
  const auto* packed = static_cast<const char*>(given.packed);
  const auto* scales = reinterpret_cast<const Half*>(packed + layout.scales_offset);

  typename Gemm::Operator::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), 1};

  auto& mainloop = arguments.mainloop;
  mainloop.ptr_A = reinterpret_cast<const Weight*>(packed);
  mainloop.dA = {layout.row_values, cute::_1{}, 0};
  mainloop.ptr_B = static_cast<const Half*>(given.activations);
  mainloop.dB = {k, cute::_1{}, 0};
  if constexpr (!Gemm::kScalesChannels) {
    mainloop.ptr_S = scales;
    mainloop.dS = {cute::_1{}, n, 0};
    mainloop.group_size = static_cast<int>(group_size);
  }
  if constexpr (Gemm::kHasZeros) mainloop.ptr_Z = reinterpret_cast<const Half*>(packed + layout.zeros_offset);

  auto& epilogue = arguments.epilogue;
  epilogue.ptr_D = static_cast<Half*>(given.output);
  epilogue.dD = {cute::_1{}, n, 0};
  [[maybe_unused]] const auto* bias = static_cast<const Half*>(given.bias);
  if constexpr (Gemm::kScalesChannels) {
    epilogue.thread = {{{{given.alpha}}, {scales}, {}}, {}, {bias}, {}};
  } else {
    epilogue.thread = {{{given.alpha}}, {}, {bias}, {}};
  }
  arguments.hw_info = {launch.device, launch.sm_count};
  return arguments;
}

template <class Gemm>
size_t workspace_bytes(const Problem& problem, int sm_count) {
  Launch launch{};
  launch.problem = problem;
  launch.sm_count = sm_count;
  return Gemm::Operator::get_workspace_size(make_arguments<Gemm>(launch));
}

// Puts the kernel's name into the device function's symbol, for profilers and cuobjdump.
template <class Gemm>
struct Named : Gemm::Operator {};

template <class Gemm>
cudaError_t launch(const Launch& launch) {
  using Operator = typename Gemm::Operator;
  const auto* function = reinterpret_cast<const void*>(&cutlass::device_kernel<Named<Gemm>>);
  constexpr int kSharedBytes = Operator::SharedStorageSize;

  // The shared memory limit is raised once per device. Two threads may do so at once without harm.
  static std::atomic<uint64_t> raised{0};
  static_assert(kMaxDevices <= 64, "a bit per device");
  const uint64_t bit = launch.device < kMaxDevices ? uint64_t{1} << launch.device : 0;
  if ((raised.load(std::memory_order_acquire) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    raised.fetch_or(bit, std::memory_order_release);
  }

  const auto stream = static_cast<cudaStream_t>(launch.arguments.stream);
  const auto arguments = make_arguments<Gemm>(launch);
  void* workspace = launch.arguments.workspace;
  // Stream-K clears its barriers with an asynchronous memset. The other schedulers do nothing here.
  if (Operator::initialize_workspace(arguments, workspace, stream) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorInvalidValue : error;
  }
  auto parameters = Operator::to_underlying_arguments(arguments, workspace);

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(typename Gemm::Cluster{}), cute::size<1>(typename Gemm::Cluster{}),
                            cute::size<2>(typename Gemm::Cluster{})};
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = Operator::get_grid_shape(parameters);
  configuration.blockDim = Operator::get_block_shape();
  configuration.dynamicSmemBytes = kSharedBytes;
  configuration.stream = stream;
  configuration.attrs = &cluster;
  configuration.numAttrs = 1;
  void* kernel_parameters[] = {&parameters};
  return cudaLaunchKernelExC(&configuration, function, kernel_parameters);
}

template <class Gemm>
constexpr Kernel make_kernel(const char* name) {
  using Cta = typename Gemm::Cta;
  using Cluster = typename Gemm::Cluster;
  return {{name,
           "cutlass",
           kLayout,
           Gemm::kMode,
           {cute::size<0>(Cta{}), cute::size<1>(Cta{}), cute::size<2>(Cta{})},
           {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), cute::size<2>(Cluster{})},
           Gemm::Mainloop::DispatchPolicy::Stages,
           static_cast<int32_t>(Gemm::Operator::MaxThreadsPerBlock),
           cute::size<2>(Cta{}),
           Gemm::Operator::SharedStorageSize,
           W4A16_NO_EPILOGUE,
           /*grouped=*/0},
          [](const Problem& problem) { return PackedLayout(problem, Gemm::kHasZeros).bytes; },
          &workspace_bytes<Gemm>,
          &launch<Gemm>,
          nullptr,
          nullptr,
          nullptr};
}

}  // namespace w4a16::cutlass_target
