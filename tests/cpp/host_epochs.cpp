// Launches a kernel that notes its epochs, from several threads at once.
//
// host_epochs > how many epochs differ, the smallest of them, and how many of them are even
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "library/gemm.h"
#include "one_hopper.h"

namespace {

constexpr int kThreads = 4;
constexpr int kLaunches = 1000;  // of each

std::mutex mutex;
std::set<uint64_t> epochs;

w4a16::Kernel make_kernel() {
  w4a16::Kernel kernel{};
  kernel.info.name = "a kernel";
  kernel.info.target = "native";
  kernel.packed_bytes = [](const w4a16::Problem&) { return size_t{128}; };
  kernel.workspace_bytes = [](const w4a16::Problem&, int) { return size_t{0}; };
  kernel.launch = [](const w4a16::Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex);
    epochs.insert(launch.epoch);
    return cudaSuccess;
  };
  return kernel;
}

void launch_all(const w4a16::Kernel& kernel) {
  w4a16::Launch launch{};
  launch.problem = {1, 64, 64, 64};
  launch.arguments.activations = reinterpret_cast<const void*>(uintptr_t{1} << 20);
  launch.arguments.packed = reinterpret_cast<const void*>(uintptr_t{2} << 20);
  launch.arguments.packed_bytes = 128;
  launch.arguments.output = reinterpret_cast<void*>(uintptr_t{3} << 20);
  launch.experts.count = 1;
  for (int i = 0; i < kLaunches; ++i) w4a16::multiply(kernel, launch, nullptr, 0);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  return cudaErrorNotSupported;
}

}  // extern "C"

int main() {
  const w4a16::Kernel kernel = make_kernel();
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(launch_all, std::cref(kernel));
  for (std::thread& thread : threads) thread.join();
  const auto even = std::count_if(epochs.begin(), epochs.end(), [](uint64_t epoch) { return epoch % 2 == 0; });
  std::printf("%zu\n%llu\n%td\n", epochs.size(), static_cast<unsigned long long>(*epochs.begin()), even);
  return 0;
}
