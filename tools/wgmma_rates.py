"""Measure how near the tensor cores come to their peak with one operand in registers, by tokens and warpgroups.

    python tools/wgmma_rates.py --tokens 64 96 128 256 --warpgroups 1 2 3 4

Needs nvcc and a Hopper GPU. Warpgroups multiply pieces of 64 channels x 64 k, as the main loop of a native kernel does,
without a ring of stages. Columns are shares of the peak, by the cycles of the slowest warpgroup:

    registers     the weights are in registers, and nothing is done between pieces
    shared        the weights are in shared memory
    2 buffers     each piece is dequantised while the one before it is multiplied
    3 buffers     the same, two pieces ahead
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.build.toolchain import find_toolchain

ROWS = ("registers", "shared", "2 buffers", "3 buffers")
REGISTERS_OF_SM, MOST_REGISTERS = 65_536, 255
OTHER_REGISTERS = 70
"""Of a thread, for three buffers of fragments and addresses. The rest holds sums."""

SOURCE = r"""
#include <cstdio>
#include <algorithm>
#include "native/dequantize.cuh"
#include "native/pipeline.cuh"
#include "native/wgmma.cuh"

using namespace w4a16::native;

constexpr int kRounds = 600;
constexpr int kTiles = 2;

// Weights in shared memory: m64nNk16 with two descriptors.
template <int Tokens>
struct FromShared;
@SHARED@

__device__ inline uint32_t operand(uint32_t seed) {
  uint32_t bits = seed * 2654435761u;
  bits = (bits ^ bits >> 15) * 2246822519u;
  return ((bits ^ bits >> 13) & 0x83ff83ff) | 0x38003800;
}

enum Row { kRegisters, kShared, kTwoBuffers, kThreeBuffers };

template <int Tokens, int Warpgroups, int kRow>
__global__ void __launch_bounds__(Warpgroups * 128, 1) probe(long long* cycles, float* sums) {
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kTileBytes = Tokens * 128;
  constexpr int kWeightBytes = 64 * 128;
  constexpr int kBuffers = kRow == kThreeBuffers ? 3 : 2;
  const uint32_t base = shared_address(memory);
  const uint32_t weights = base + kTiles * kTileBytes;
  for (int at = threadIdx.x; at < (kTiles * kTileBytes + kTiles * kWeightBytes) / 4; at += Warpgroups * 128)
    reinterpret_cast<uint32_t*>(memory)[at] = operand(at);
  async_proxy_fence();
  Fragments fragments[kBuffers];
  for (int b = 0; b < kBuffers; ++b)
    for (int i = 0; i < 16; ++i) fragments[b][i / 4][i % 4] = operand(threadIdx.x * 48 + b * 16 + i);
  uint32_t words[4] = {operand(threadIdx.x), operand(threadIdx.x + 512), operand(threadIdx.x + 1024),
                       operand(threadIdx.x + 1536)};
  float sum[Tokens / 2] = {};
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) {
      const uint64_t tile = descriptor(descriptor_low(base + (b % kTiles) * kTileBytes));
      if constexpr (kRow == kShared) {
        const uint64_t a = descriptor(descriptor_low(weights + (b % kTiles) * kWeightBytes));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) FromShared<Tokens>::run(sum, a + step * 2, tile + step * 2);
        wgmma_commit();
        wgmma_wait<1>();
      } else {
        if constexpr (kRow == kTwoBuffers || kRow == kThreeBuffers) {
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const half2 scale = as_half2(0x3c003c00u + words[step] % 16);
            dequantize<true, false>(words[step], scale, offset_of(scale), fragments[b][step]);
            words[step] = words[step] * 5 + 1;
          }
        }
        multiply<Tokens, true>(sum, fragments[b], tile);
        wgmma_wait<kBuffers - 1>();
      }
    }
  }
  wgmma_wait<0>();
  const long long took = clock64() - begin;
  if (threadIdx.x % 128 == 0) cycles[blockIdx.x * Warpgroups + threadIdx.x / 128] = took;
  if (sums != nullptr)  // the sums are not used, but the compiler must not know
    for (int i = 0; i < Tokens / 2; ++i) sums[i * Warpgroups * 128 + threadIdx.x] = sum[i];
}

template <int Tokens, int Warpgroups, int kRow>
bool measure(int sms, long long* cycles) {
  constexpr int kBytes = kTiles * (Tokens + 64) * 128;
  auto* const function = &probe<Tokens, Warpgroups, kRow>;
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess) return false;
  for (int turn = 0; turn < 3; ++turn) function<<<sms, Warpgroups * 128, kBytes>>>(cycles, nullptr);
  if (cudaDeviceSynchronize() != cudaSuccess) return false;
  const long long slowest = *std::max_element(cycles, cycles + sms * Warpgroups);
  constexpr int kPieces = kRounds * (kRow == kThreeBuffers ? 3 : 2);
  const double peak = kPieces * 4.0 * Warpgroups * Tokens / 2;  // a token takes half a cycle of m64nNk16
  std::printf("%d,%d,%d,%.4f\n", Tokens, Warpgroups, kRow, peak / slowest);
  return true;
}

int main() {
  int sms = 0;
  long long* cycles = nullptr;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0) != cudaSuccess) return 1;
  if (cudaMallocManaged(&cycles, sms * 4 * sizeof(long long)) != cudaSuccess) return 1;
  bool done = true;
@CALLS@
  if (!done) std::fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError()));
  return done ? 0 : 1;
}
"""


def shared_instruction(tokens: int) -> str:
    """Return the instruction with both operands in shared memory, as a specialisation (PTX ISA, "wgmma.mma_async")."""
    sums = tokens // 2
    registers = ", ".join(f"%{number}" for number in range(sums))
    operands = ", ".join(f'"+f"(sum[{number}])' for number in range(sums))
    return (
        f"template <> struct FromShared<{tokens}> {{\n"
        f"  static __device__ void run(float (&sum)[{sums}], uint64_t a, uint64_t b) {{\n"
        f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.f16.f16 {{{registers}}}, '
        f'%{sums}, %{sums + 1}, 1, 1, 1, 0, 0;\\n" : {operands} : "l"(a), "l"(b));\n'
        "  }\n};\n"
    )


def fits(tokens: int, warpgroups: int) -> bool:
    """Return whether the sums of a thread leave room for fragments."""
    registers = min(MOST_REGISTERS, REGISTERS_OF_SM // (128 * warpgroups))
    return tokens // 2 <= registers - OTHER_REGISTERS


def source(tokens: Sequence[int], warpgroups: Sequence[int]) -> str:
    """Return the program that prints lines of tokens, warpgroups, row and share of the peak."""
    calls = [
        f"  done &= measure<{count}, {groups}, {row}>(sms, cycles);"
        for count in tokens
        for groups in warpgroups
        if fits(count, groups)
        for row in range(len(ROWS))
    ]
    shared = "".join(shared_instruction(count) for count in tokens)
    return SOURCE.replace("@SHARED@", shared).replace("@CALLS@", "\n".join(calls))


def compiled(folder: Path, tokens: Sequence[int], warpgroups: Sequence[int]) -> Path:
    """Compile the program in a folder and return its path."""
    tools, text, program = find_toolchain(), folder / "rates.cu", folder / "rates"
    text.write_text(source(tokens, warpgroups))
    compile_it = [
        str(tools.nvcc),
        "-std=c++17",
        "-O3",
        "-gencode=arch=compute_90a,code=sm_90a",
        f"-ccbin={tools.host_compiler}",
    ]
    includes = [f"-I{CUDA_FOLDER}", f"-I{tools.cuda_include}"]
    link = ["-cudart=none", str(tools.cudart), "-lpthread", "-ldl", "-lrt", "-o", str(program)]
    subprocess.run([*compile_it, *includes, str(text), *link], check=True)  # noqa: S603
    return program


def main() -> None:
    """Print a table of shares of the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 80, 96, 128, 256])
    parser.add_argument("--warpgroups", type=int, nargs="+", default=[1, 2, 3, 4])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder), given.tokens, given.warpgroups)
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout  # noqa: S603
    shares: dict[tuple[str, str], dict[int, str]] = {}
    for line in printed.split():
        count, groups, row, share = line.split(",")
        shares.setdefault((count, groups), {})[int(row)] = share
    print("tokens", "warpgroups", *ROWS, sep="  ")
    for (count, groups), by_row in shares.items():
        print(f"{count:>6}  {groups:>10}  {'  '.join(f'{by_row[row]:>9}' for row in range(len(ROWS)))}")


if __name__ == "__main__":
    main()
