// The C interface over the table of kernels. It checks every call once, for all kernel families.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "library/epilogue.h"
#include "library/problem.h"
#include "library/registry.h"

namespace w4a16 {
namespace {

// Bytes, as w4a16.h documents them.
constexpr uintptr_t kTensorAlignment = 16;
constexpr uintptr_t kHalfAlignment = 2;
constexpr uintptr_t kNibbleRowAlignment = 8;  // of unpacked weights, which are read eight at a time

struct Device {
  cudaError_t error = cudaErrorInitializationError;
  int index = -1;
  int major = 0;
  int minor = 0;
  int sm_count = 0;
  std::string name;

  bool is_hopper() const { return major == 9 && minor == 0; }
};

w4a16_status report(w4a16_status status, const std::string& sentence, char* message, size_t message_bytes) {
  if (message != nullptr && message_bytes > 0) {
    const size_t length = std::min(sentence.size(), message_bytes - 1);
    std::memcpy(message, sentence.data(), length);
    message[length] = '\0';
  }
  return status;
}

Device query_device(int index) {
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
const Device& current_device() {
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

std::string why_not_device(const Device& device) {
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

std::string why_not_pointer(const char* name, const void* pointer, uintptr_t alignment) {
  if (pointer == nullptr) return std::string(name) + " must not be null";
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    char address[32];
    std::snprintf(address, sizeof(address), "%p", pointer);
    return std::string(name) + " at " + address + " must be aligned to " + std::to_string(alignment) + " bytes";
  }
  return {};
}

std::string why_not_bytes(const char* name, size_t given, size_t needed, const char* rule) {
  return std::string(name) + " of " + std::to_string(given) + " bytes must " + rule + " " + std::to_string(needed) +
         " bytes";
}

std::string why_not_arguments(const w4a16_gemm_arguments& arguments, size_t packed_bytes) {
  std::string sentence = why_not_pointer("activations", arguments.activations, kTensorAlignment);
  if (sentence.empty()) sentence = why_not_pointer("packed weight", arguments.packed, kPackedAlignment);
  if (sentence.empty()) sentence = why_not_pointer("output", arguments.output, kTensorAlignment);
  if (sentence.empty() && arguments.bias != nullptr) sentence = why_not_pointer("bias", arguments.bias, kHalfAlignment);
  if (sentence.empty() && arguments.packed_bytes != packed_bytes) {
    sentence = why_not_bytes("packed weight", arguments.packed_bytes, packed_bytes, "be exactly");
  }
  return sentence;
}

std::string why_not_gated(const w4a16_problem& problem) {
  if (problem.n % kGatedMultiple == 0) return {};
  return "n of " + std::to_string(problem.n) + " must be a multiple of " + std::to_string(kGatedMultiple) +
         " for gated activations: pad both halves with zeros";
}

std::string why_not_epilogue(const Kernel& kernel, const w4a16_problem& problem,
                             const w4a16_gemm_arguments& arguments) {
  const int32_t activation = arguments.activation;
  if (activation < W4A16_NO_ACTIVATION || activation > W4A16_GEGLU_ERF) {
    return "activation of " + std::to_string(activation) + " must be a w4a16_activation, 0 to " +
           std::to_string(W4A16_GEGLU_ERF);
  }
  const bool has_residual = arguments.residual != nullptr;
  const int32_t needed = needed_epilogue(activation, has_residual);
  if (needed != W4A16_NO_EPILOGUE && std::string(kernel.info.target) != "native") {
    return std::string("kernels of target ") + kernel.info.target +
           " compute no activations and add no residual: pack the weight for target native";
  }
  if (needed != kernel.info.epilogue && !(needed == W4A16_NO_EPILOGUE && kernel.info.epilogue == W4A16_ELEMENTWISE)) {
    return std::string("kernels with epilogue ") + epilogue_name(kernel.info.epilogue) +
           " cannot: the call needs `w4a16gen build" +
           (needed == W4A16_NO_EPILOGUE ? "`"
                                        : std::string(" --epilogue none --epilogue ") + epilogue_name(needed) + "`");
  }
  std::string sentence = is_gated(activation) ? why_not_gated(problem) : std::string();
  if (sentence.empty() && has_residual) {
    sentence = why_not_pointer("residual", arguments.residual, kTensorAlignment);
  }
  return sentence;
}

// Tiles of the output are written while others still read the operands. A residual may be the output itself: each
// element is then read before it is written.
std::string why_not_in_place(const w4a16_problem& problem, const w4a16_gemm_arguments& arguments) {
  struct Operand {
    const char* name;
    const void* pointer;
    uint64_t bytes;
  };
  const uint64_t half_bytes = 2;
  const uint64_t bias_bytes = static_cast<uint64_t>(problem.n) * half_bytes;
  const uint64_t rows = static_cast<uint64_t>(problem.m);
  const auto columns = static_cast<uint64_t>(output_channels(problem.n, arguments.activation));
  const uint64_t output_bytes = rows * columns * half_bytes;
  const bool reads_residual = arguments.residual != nullptr && arguments.residual != arguments.output;
  const Operand operands[] = {
      {"activations", arguments.activations, rows * static_cast<uint64_t>(problem.k) * half_bytes},
      {"packed weight", arguments.packed, arguments.packed_bytes},
      {"bias", arguments.bias, arguments.bias != nullptr ? bias_bytes : 0},
      {"residual", arguments.residual, reads_residual ? output_bytes : 0},
  };
  const auto output = reinterpret_cast<uintptr_t>(arguments.output);
  for (const Operand& operand : operands) {
    const auto begin = reinterpret_cast<uintptr_t>(operand.pointer);
    if (operand.bytes > 0 && output < begin + operand.bytes && begin < output + output_bytes) {
      return std::string("output overlaps the ") + operand.name + ": pass another array";
    }
  }
  return {};
}

std::string why_not_workspace(const w4a16_gemm_arguments& arguments, size_t needed) {
  if (arguments.workspace_bytes < needed) {
    return why_not_bytes("workspace", arguments.workspace_bytes, needed, "be at least");
  }
  return needed > 0 ? why_not_pointer("workspace", arguments.workspace, kPackedAlignment) : std::string();
}

std::string why_not_pack(const Kernel& kernel, const w4a16_problem& problem, const w4a16_pack_arguments& arguments,
                         size_t packed_bytes) {
  std::string sentence = why_not_pointer("q", arguments.q, kNibbleRowAlignment);
  if (sentence.empty() && arguments.gated != 0) sentence = why_not_gated(problem);
  if (sentence.empty()) sentence = why_not_pointer("scales", arguments.scales, kHalfAlignment);
  if (sentence.empty() && kernel.info.mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS) {
    sentence = why_not_pointer("zeros", arguments.zeros, kHalfAlignment);
  }
  if (sentence.empty()) sentence = why_not_pointer("packed weight", arguments.packed, kPackedAlignment);
  if (sentence.empty() && arguments.packed_bytes != packed_bytes) {
    sentence = why_not_bytes("packed weight", arguments.packed_bytes, packed_bytes, "be exactly");
  }
  return sentence;
}

// Returns the probes of the first family that has any, or null with the reason why they cannot run.
const Probes* find_probes(const Device& device, w4a16_status* status, std::string* sentence) {
  const auto has_probes = [](const Kernel* kernel) { return kernel->probes != nullptr; };
  const Kernel* const* const found = std::find_if(kKernels, kKernels + kKernelCount, has_probes);
  if (found == kKernels + kKernelCount) {
    *status = W4A16_UNSUPPORTED;
    *sentence = "this build holds no native kernel; only native kernels come with probes";
    return nullptr;
  }
  *status = W4A16_NO_HOPPER_GPU;
  *sentence = why_not_device(device);
  return sentence->empty() ? (*found)->probes : nullptr;
}

w4a16_status report_launch(const char* what, cudaError_t error, char* message, size_t message_bytes) {
  if (error == cudaSuccess) return report(W4A16_OK, {}, message, message_bytes);
  return report(W4A16_CUDA_ERROR, std::string(what) + " failed: " + cudaGetErrorString(error), message, message_bytes);
}

// Returns the kernel, or null with the reason: a wrong index, a null problem, or a problem that the kernel cannot run.
const Kernel* find(int index, const w4a16_problem* problem, w4a16_status* status, std::string* sentence) {
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
  *sentence = w4a16::why_not(kernel->info, *problem);
  *status = sentence->empty() ? W4A16_OK : W4A16_UNSUPPORTED;
  return sentence->empty() ? kernel : nullptr;
}

}  // namespace
}  // namespace w4a16

using w4a16::Device;
using w4a16::Kernel;
using w4a16::report;

int w4a16_abi_version(void) { return W4A16_ABI_VERSION; }

int w4a16_kernel_count(void) { return w4a16::kKernelCount; }

int w4a16_find_kernel(const char* name) {
  for (int index = 0; name != nullptr && index < w4a16::kKernelCount; ++index) {
    if (std::strcmp(w4a16::kKernels[index]->info.name, name) == 0) return index;
  }
  return -1;
}

w4a16_status w4a16_get_kernel_info(int kernel, w4a16_kernel_info* info) {
  if (kernel < 0 || kernel >= w4a16::kKernelCount || info == nullptr) return W4A16_INVALID_ARGUMENT;
  *info = w4a16::kKernels[kernel]->info;
  return W4A16_OK;
}

w4a16_status w4a16_can_implement(int kernel, const w4a16_problem* problem, char* message, size_t message_bytes) {
  w4a16_status status;
  std::string sentence;
  w4a16::find(kernel, problem, &status, &sentence);
  return report(status, sentence, message, message_bytes);
}

w4a16_status w4a16_packed_bytes(int kernel, const w4a16_problem* problem, size_t* bytes, char* message,
                                size_t message_bytes) {
  w4a16_status status;
  std::string sentence;
  const Kernel* found = w4a16::find(kernel, problem, &status, &sentence);
  if (found != nullptr && bytes != nullptr) *bytes = found->packed_bytes(*problem);
  return report(status, sentence, message, message_bytes);
}

w4a16_status w4a16_workspace_bytes(int kernel, const w4a16_problem* problem, int sm_count, size_t* bytes, char* message,
                                   size_t message_bytes) {
  w4a16_status status;
  std::string sentence;
  const Kernel* found = w4a16::find(kernel, problem, &status, &sentence);
  if (found == nullptr || bytes == nullptr) return report(status, sentence, message, message_bytes);
  if (sm_count <= 0) {
    const Device& device = w4a16::current_device();
    sentence = w4a16::why_not_device(device);
    if (!sentence.empty()) return report(W4A16_NO_HOPPER_GPU, sentence, message, message_bytes);
    sm_count = device.sm_count;
  }
  *bytes = problem->m == 0 ? 0 : found->workspace_bytes(*problem, sm_count);
  return report(W4A16_OK, {}, message, message_bytes);
}

w4a16_status w4a16_gemm(int kernel, const w4a16_problem* problem, const w4a16_gemm_arguments* arguments, char* message,
                        size_t message_bytes) {
  w4a16_status status;
  std::string sentence;
  const Kernel* found = w4a16::find(kernel, problem, &status, &sentence);
  if (found == nullptr) return report(status, sentence, message, message_bytes);
  if (arguments == nullptr) return report(W4A16_INVALID_ARGUMENT, "arguments must not be null", message, message_bytes);
  if (problem->m == 0) return report(W4A16_OK, {}, message, message_bytes);
  // Checks without a GPU come first, so that a wrong call gets the same message on every machine.
  sentence = w4a16::why_not_arguments(*arguments, found->packed_bytes(*problem));
  if (sentence.empty()) sentence = w4a16::why_not_epilogue(*found, *problem, *arguments);
  if (sentence.empty()) sentence = w4a16::why_not_in_place(*problem, *arguments);
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  const Device& device = w4a16::current_device();
  sentence = w4a16::why_not_device(device);
  if (!sentence.empty()) return report(W4A16_NO_HOPPER_GPU, sentence, message, message_bytes);
  sentence = w4a16::why_not_workspace(*arguments, found->workspace_bytes(*problem, device.sm_count));
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  const cudaError_t error = found->launch({*problem, *arguments, device.index, device.sm_count});
  if (error == cudaSuccess) return report(W4A16_OK, {}, message, message_bytes);
  sentence = std::string("launch of ") + found->info.name + " failed: " + cudaGetErrorString(error);
  return report(W4A16_CUDA_ERROR, sentence, message, message_bytes);
}

w4a16_status w4a16_pack(int kernel, const w4a16_problem* problem, const w4a16_pack_arguments* arguments, char* message,
                        size_t message_bytes) {
  w4a16_status status;
  std::string sentence;
  const Kernel* found = w4a16::find(kernel, problem, &status, &sentence);
  if (found == nullptr) return report(status, sentence, message, message_bytes);
  if (found->pack == nullptr) {
    sentence = std::string("weights for target ") + found->info.target + " are packed on the host only";
    return report(W4A16_UNSUPPORTED, sentence, message, message_bytes);
  }
  if (arguments == nullptr) return report(W4A16_INVALID_ARGUMENT, "arguments must not be null", message, message_bytes);
  sentence = w4a16::why_not_pack(*found, *problem, *arguments, found->packed_bytes(*problem));
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  sentence = w4a16::why_not_device(w4a16::current_device());
  if (!sentence.empty()) return report(W4A16_NO_HOPPER_GPU, sentence, message, message_bytes);
  const cudaError_t error = found->pack(*problem, *arguments);
  if (error == cudaSuccess) return report(W4A16_OK, {}, message, message_bytes);
  sentence = std::string("packing for ") + found->info.name + " failed: " + cudaGetErrorString(error);
  return report(W4A16_CUDA_ERROR, sentence, message, message_bytes);
}

w4a16_status w4a16_probe_read(const void* data, size_t bytes, int32_t dependent_launch, void* stream, char* message,
                              size_t message_bytes) {
  std::string sentence = w4a16::why_not_pointer("data", data, 16);
  if (sentence.empty() && (bytes == 0 || bytes % 16 != 0)) {
    sentence = "bytes of " + std::to_string(bytes) + " must be a positive multiple of 16";
  }
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  w4a16_status status;
  const Device& device = w4a16::current_device();
  const w4a16::Probes* probes = w4a16::find_probes(device, &status, &sentence);
  if (probes == nullptr) return report(status, sentence, message, message_bytes);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = probes->read(data, bytes, device.sm_count, dependent_launch != 0, on);
  return w4a16::report_launch("reading", error, message, message_bytes);
}

w4a16_status w4a16_probe_multiply(int32_t rounds, void* stream, int64_t* flops, char* message, size_t message_bytes) {
  if (rounds <= 0) {
    const std::string sentence = "rounds of " + std::to_string(rounds) + " must be positive";
    return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  }
  w4a16_status status;
  std::string sentence;
  const Device& device = w4a16::current_device();
  const w4a16::Probes* probes = w4a16::find_probes(device, &status, &sentence);
  if (probes == nullptr) return report(status, sentence, message, message_bytes);
  if (flops != nullptr) *flops = probes->flops_per_round * rounds * device.sm_count;
  const cudaError_t error = probes->multiply(rounds, device.sm_count, static_cast<cudaStream_t>(stream));
  return w4a16::report_launch("multiplying", error, message, message_bytes);
}
