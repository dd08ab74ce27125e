// What the GPU can do at most, for comparison with what kernels reach: reading bytes, and multiplying.
#pragma once

#include <algorithm>

#include "kernel.h"
#include "native_mainloop.cuh"

namespace w4a16::native {

constexpr int kProbeStages = 8;
constexpr int kProbeTokens = 256;
constexpr int kProbeCopyBytes = 16384;
constexpr int kProbeThreads = 2 * kWarpgroup;
constexpr int kProbeTileBytes = kProbeTokens * 64 * 2;
constexpr int kProbeTiles = 4;

// Reads `bytes` once, each CTA an equal part, and does nothing with them: no kernel that needs these bytes is faster.
// Under dependent launch it reads before the kernel before has finished, as the native kernels do with weights.
template <int Stages>
__global__ void __launch_bounds__(kWarp) probe_read(const uint8_t* data, int64_t bytes, int64_t bytes_per_cta) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t slots = shared_address(memory);
  const uint32_t barriers = slots + Stages * kProbeCopyBytes;
  const int64_t begin = blockIdx.x * bytes_per_cta;
  const int64_t end = min(begin + bytes_per_cta, bytes);
  if (elected()) {
    for (int slot = 0; slot < Stages; ++slot) barrier_init(barriers + slot * 8, 1);
    barrier_init_fence();
    async_proxy_fence();
    Position<Stages> to_fetch;
    Position<Stages> to_await;
    int64_t awaited = begin;
    for (int64_t at = begin; at < end; at += kProbeCopyBytes) {
      if (at - awaited == Stages * kProbeCopyBytes) {
        barrier_wait(barriers + to_await.slot * 8, to_await.phase);
        to_await.advance(1);
        awaited += kProbeCopyBytes;
      }
      const uint32_t barrier = barriers + to_fetch.slot * 8;
      const auto size = static_cast<uint32_t>(min(end - at, int64_t{kProbeCopyBytes}));
      barrier_arrive_expecting(barrier, size);
      bulk_copy<1>(slots + to_fetch.slot * kProbeCopyBytes, data + at, size, barrier, 0);
      to_fetch.advance(1);
    }
    launch_dependents();
    for (; awaited < end; awaited += kProbeCopyBytes) {
      barrier_wait(barriers + to_await.slot * 8, to_await.phase);
      to_await.advance(1);
    }
    wait_for_prerequisites();
  }
}

// Numbers of 0.5 to 1 of either sign, two to a word: what tensor cores are given decides how much power they take.
__device__ inline uint32_t probe_operand(uint32_t seed) {
  uint32_t bits = seed * 2654435761u;
  bits = (bits ^ bits >> 15) * 2246822519u;
  return ((bits ^ bits >> 13) & 0x83ff83ff) | 0x38003800;
}

// Two warpgroups multiply operands that are there already, as fast as they can.
template <int Tokens>
__global__ void __launch_bounds__(kProbeThreads) probe_multiply(int rounds, float* sums) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t tiles = shared_address(memory);
  for (int at = threadIdx.x; at < kProbeTiles * kProbeTileBytes / 4; at += kProbeThreads) {
    reinterpret_cast<uint32_t*>(memory)[at] = probe_operand(at);
  }
  async_proxy_fence();
  __syncthreads();
  Fragments fragments;
  for (int i = 0; i < 16; ++i) fragments[i / 4][i % 4] = probe_operand(threadIdx.x * 16 + i);
  float sum[Tokens / 2] = {};
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    multiply<Tokens, true>(sum, fragments, descriptor(descriptor_low(tiles + round % kProbeTiles * kProbeTileBytes)));
    wgmma_wait<0>();
  }
  if (sums == nullptr) return;  // nobody wants them, but the compiler must not know
  for (int i = 0; i < Tokens / 2; ++i) sums[i * kProbeThreads + threadIdx.x] = sum[i];
}

inline cudaError_t launch_probe_read(const void* data, size_t bytes, int sm_count, bool dependent,
                                     cudaStream_t stream) {
  constexpr int kSharedBytes = kProbeStages * (kProbeCopyBytes + 8);
  const void* const function = reinterpret_cast<const void*>(&probe_read<kProbeStages>);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = static_cast<unsigned>(sm_count);
  configuration.blockDim = kWarp;
  configuration.dynamicSmemBytes = kSharedBytes;
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = dependent ? 1 : 0;
  auto total = static_cast<int64_t>(bytes);
  int64_t per_cta = (total + sm_count - 1) / sm_count;
  per_cta = (per_cta + 127) / 128 * 128;
  void* arguments[] = {&data, &total, &per_cta};
  return cudaLaunchKernelExC(&configuration, function, arguments);
}

inline cudaError_t launch_probe_multiply(int rounds, int sm_count, cudaStream_t stream) {
  constexpr int kSharedBytes = kProbeTiles * kProbeTileBytes;
  const void* const function = reinterpret_cast<const void*>(&probe_multiply<kProbeTokens>);
  const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  probe_multiply<kProbeTokens>
      <<<static_cast<unsigned>(sm_count), kProbeThreads, kSharedBytes, stream>>>(rounds, nullptr);
  return cudaGetLastError();
}

// Of one round on one SM.
constexpr int64_t kProbeFlops = int64_t{2} * 64 * kProbeTokens * 64 * (kProbeThreads / kWarpgroup);

constexpr Probes kProbes{&launch_probe_read, &launch_probe_multiply, kProbeFlops};

}  // namespace w4a16::native
