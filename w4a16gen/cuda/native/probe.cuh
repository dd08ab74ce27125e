// Probes that measure the GPU's limits: reading bytes, and multiplying on the tensor cores.
#pragma once

#include <algorithm>

#include "library/kernel.h"
#include "native/pipeline.cuh"
#include "native/wgmma.cuh"

namespace w4a16::native {

constexpr int kReaders = 4;  // warps of a CTA, each with its own ring
constexpr int kReaderStages = 3;
constexpr int kReaderCopyBytes = 8192;
constexpr int kProbeTokens = 256;
constexpr int kProbeThreads = 2 * kWarpgroup;
constexpr int kProbeTileBytes = kProbeTokens * 64 * 2;
constexpr int kProbeTiles = 4;

// Reads `bytes` once, each CTA an equal part, and discards them. Of dependent launches two read at a time, and each
// ends after the previous one. A launch that started reading only after the previous launch's last request would take
// up to 0.7 us longer (H100, 2026-11).
template <int Stages>
__global__ void __launch_bounds__(kReaders* kWarp)
    probe_read(const uint8_t* data, int64_t bytes, int64_t bytes_per_cta) {
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kStep = kReaders * kReaderCopyBytes;
  constexpr int kRingBytes = Stages * kReaderCopyBytes;
  const int reader = static_cast<int>(threadIdx.x) / kWarp;
  const uint32_t slots = shared_address(memory) + reader * kRingBytes;
  const uint32_t barriers = shared_address(memory) + kReaders * kRingBytes + reader * Stages * 8;
  const int64_t end = min((blockIdx.x + 1) * bytes_per_cta, bytes);
  int64_t at = blockIdx.x * bytes_per_cta + reader * kReaderCopyBytes;
  if (elected()) {
    const auto fetch_next = [&](int slot) {
      if (at >= end) return;
      const auto size = static_cast<uint32_t>(min(end - at, int64_t{kReaderCopyBytes}));
      barrier_arrive_expecting(barriers + slot * 8, size);
      bulk_copy<1>(slots + slot * kReaderCopyBytes, data + at, size, barriers + slot * 8, 0);
      at += kStep;
    };
    int64_t awaited = at;
#pragma unroll
    for (int slot = 0; slot < Stages; ++slot) {
      barrier_init(barriers + slot * 8, 1);
      async_proxy_fence();
      fetch_next(slot);
    }
    launch_dependents();
    for (Position<Stages> place; awaited < end; awaited += kStep, place.advance(1)) {
      barrier_wait(barriers + place.slot * 8, place.phase);
      fetch_next(place.slot);
    }
    wait_for_prerequisites();
  }
}

// Two numbers of either sign with magnitudes from 0.5 to 1 in a word. The operands decide how much power tensor cores
// take.
__device__ inline uint32_t probe_operand(uint32_t seed) {
  uint32_t bits = seed * 2654435761u;
  bits = (bits ^ bits >> 15) * 2246822519u;
  return ((bits ^ bits >> 13) & 0x83ff83ff) | 0x38003800;
}

// Two warpgroups multiply operands that are in registers and shared memory already.
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
  if (sums == nullptr) return;  // the sums are not used, but the compiler must not know
  for (int i = 0; i < Tokens / 2; ++i) sums[i * kProbeThreads + threadIdx.x] = sum[i];
}

inline cudaError_t launch_probe_read(const void* data, size_t bytes, int sm_count, bool dependent,
                                     cudaStream_t stream) {
  constexpr int kSharedBytes = kReaders * kReaderStages * (kReaderCopyBytes + 8);
  const void* const function = reinterpret_cast<const void*>(&probe_read<kReaderStages>);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = static_cast<unsigned>(sm_count);
  configuration.blockDim = kReaders * kWarp;
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
  cudaGetLastError();  // forget the failure of an earlier call, which is not this launch's
  probe_multiply<kProbeTokens>
      <<<static_cast<unsigned>(sm_count), kProbeThreads, kSharedBytes, stream>>>(rounds, nullptr);
  return cudaGetLastError();
}

// Operations of one round on one SM.
constexpr int64_t kProbeFlops = int64_t{2} * 64 * kProbeTokens * 64 * (kProbeThreads / kWarpgroup);

constexpr Probes kProbes{&launch_probe_read, &launch_probe_multiply, kProbeFlops};

}  // namespace w4a16::native
