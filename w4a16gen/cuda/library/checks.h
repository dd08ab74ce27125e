// What every call of the C interface checks, and how it reports what it finds.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "library/problem.h"
#include "library/registry.h"

namespace w4a16 {

// Bytes, as w4a16.h documents them.
constexpr uintptr_t kTensorAlignment = 16;
constexpr uintptr_t kHalfAlignment = 2;

struct Device {
  cudaError_t error = cudaErrorInitializationError;
  int index = -1;
  int major = 0;
  int minor = 0;
  int sm_count = 0;
  std::string name;

  bool is_hopper() const { return major == 9 && minor == 0; }
};

inline w4a16_status report(w4a16_status status, const std::string& sentence, char* message, size_t message_bytes) {
  if (message != nullptr && message_bytes > 0) {
    const size_t length = std::min(sentence.size(), message_bytes - 1);
    std::memcpy(message, sentence.data(), length);
    message[length] = '\0';
  }
  return status;
}

inline Device query_device(int index) {
  Device device;
  device.index = index;
  cudaDeviceProp properties{};
  device.error = cudaGetDeviceProperties(&properties, index);
  if (device.error == cudaSuccess) {
    device.major = properties.major;
    device.minor = properties.minor;
    device.sm_count = properties.multiProcessorCount;
    device.name = properties.name;
  }
  return device;
}

// Returns the properties of the current device. They are queried once per device; a failure is kept per thread only.
inline const Device& current_device() {
  static std::mutex mutex;
  static std::array<Device, kMaxDevices> known;
  static std::array<std::atomic<bool>, kMaxDevices> is_known{};
  static thread_local Device failed;
  int index = -1;
  failed.error = cudaGetDevice(&index);
  if (failed.error == cudaSuccess && index >= kMaxDevices) failed.error = cudaErrorInvalidDevice;
  if (failed.error != cudaSuccess) return failed;
  const auto at = static_cast<size_t>(index);
  if (is_known[at].load(std::memory_order_acquire)) return known[at];
  failed = query_device(index);
  if (failed.error != cudaSuccess) return failed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!is_known[at].load(std::memory_order_relaxed)) known[at] = failed;
  is_known[at].store(true, std::memory_order_release);
  return known[at];
}

inline std::string why_not_device(const Device& device) {
  if (device.error != cudaSuccess) {
    return std::string("no usable CUDA device (") + cudaGetErrorString(device.error) +
           "): these kernels need an NVIDIA Hopper GPU of compute capability 9.0";
  }
  if (!device.is_hopper()) {
    return "device " + std::to_string(device.index) + " is " + device.name + " of compute capability " +
           std::to_string(device.major) + "." + std::to_string(device.minor) +
           ": these kernels need an NVIDIA Hopper GPU of compute capability 9.0 (H100, H800, H200)";
  }
  return {};
}

inline std::string why_not_pointer(const char* name, const void* pointer, uintptr_t alignment) {
  if (pointer == nullptr) return std::string(name) + " must not be null";
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    char address[32];
    std::snprintf(address, sizeof(address), "%p", pointer);
    return std::string(name) + " at " + address + " must be aligned to " + std::to_string(alignment) + " bytes";
  }
  return {};
}

inline std::string why_not_bytes(const char* name, size_t given, size_t needed, const std::string& rule) {
  return std::string(name) + " of " + std::to_string(given) + " bytes must " + rule + " " + std::to_string(needed) +
         " bytes";
}

// Memory that a call reads or writes.
struct Range {
  const char* name;
  const void* pointer;
  uint64_t bytes;
};

// What is written must not be read, or written again, elsewhere in the call.
inline std::string why_not_apart(const Range& written, const Range& other) {
  const auto begin = reinterpret_cast<uintptr_t>(written.pointer);
  const auto other_begin = reinterpret_cast<uintptr_t>(other.pointer);
  const bool overlaps = begin < other_begin + other.bytes && other_begin < begin + written.bytes;
  if (other.pointer == nullptr || other.bytes == 0 || written.bytes == 0 || !overlaps) return {};
  return std::string(written.name) + " overlaps the " + other.name + ": pass another array";
}

// Returns the kernel, or null with the reason: a wrong index, a null problem, or a problem that the kernel cannot run.
inline const Kernel* find(int index, const w4a16_problem* problem, w4a16_status* status, std::string* sentence) {
  *status = W4A16_INVALID_ARGUMENT;
  if (index < 0 || index >= kKernelCount) {
    *sentence =
        "kernel index " + std::to_string(index) + " must be at least 0 and below " + std::to_string(kKernelCount);
    return nullptr;
  }
  if (problem == nullptr) {
    *sentence = "problem must not be null";
    return nullptr;
  }
  const Kernel* kernel = kKernels[index];
  *sentence = why_not(kernel->info, *problem);
  *status = sentence->empty() ? W4A16_OK : W4A16_UNSUPPORTED;
  return sentence->empty() ? kernel : nullptr;
}

inline w4a16_status report_launch(const char* what, cudaError_t error, char* message, size_t message_bytes) {
  if (error == cudaSuccess) return report(W4A16_OK, {}, message, message_bytes);
  return report(W4A16_CUDA_ERROR, std::string(what) + " failed: " + cudaGetErrorString(error), message, message_bytes);
}

}  // namespace w4a16
