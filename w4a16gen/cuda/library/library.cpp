// The C interface over the table of kernels. It checks every call once, for all kernel families.
#include <algorithm>
#include <cstring>
#include <string>

#include "library/checks.h"
#include "library/gemm.h"

namespace w4a16 {
namespace {

constexpr uintptr_t kNibbleRowAlignment = 8;  // of unpacked weights, which are read eight at a time

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
  if (found->info.grouped != 0) {
    sentence = std::string(found->info.name) + " is a grouped kernel: call w4a16_grouped_gemm";
    return report(W4A16_UNSUPPORTED, sentence, message, message_bytes);
  }
  if (arguments == nullptr) return report(W4A16_INVALID_ARGUMENT, "arguments must not be null", message, message_bytes);
  if (problem->m == 0) return report(W4A16_OK, {}, message, message_bytes);
  w4a16::Launch launch{*problem, *arguments, 0, 0};
  launch.experts.count = 1;
  return w4a16::multiply(*found, launch, message, message_bytes);
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
