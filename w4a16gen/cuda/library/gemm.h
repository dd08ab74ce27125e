// The checks and the launch of a product, of one weight or of several experts'.
#pragma once

#include <string>

#include "library/capture.h"
#include "library/checks.h"
#include "library/epilogue.h"
#include "library/epoch.h"
#include "library/experts.h"

namespace w4a16 {

inline std::string why_not_arguments(const w4a16_gemm_arguments& arguments, size_t packed_bytes) {
  std::string sentence = why_not_pointer("activations", arguments.activations, kTensorAlignment);
  if (sentence.empty()) sentence = why_not_pointer("packed weight", arguments.packed, kPackedAlignment);
  if (sentence.empty()) sentence = why_not_pointer("output", arguments.output, kTensorAlignment);
  if (sentence.empty() && arguments.bias != nullptr) sentence = why_not_pointer("bias", arguments.bias, kHalfAlignment);
  if (sentence.empty() && arguments.packed_bytes != packed_bytes) {
    sentence = why_not_bytes("packed weight", arguments.packed_bytes, packed_bytes, "be exactly");
  }
  return sentence.empty() ? why_not_launch(arguments.dependent_launch) : sentence;
}

inline std::string why_not_gated(const w4a16_problem& problem) {
  if (problem.n % kGatedMultiple == 0) return {};
  return "n of " + std::to_string(problem.n) + " must be a multiple of " + std::to_string(kGatedMultiple) +
         " for gated activations: pad both halves with zeros";
}

inline std::string why_other_epilogue(const w4a16_kernel_info& kernel, int32_t needed) {
  const std::string sentence =
      std::string("kernels with epilogue ") + epilogue_name(kernel.epilogue) + " cannot: the call needs ";
  if (kernel.grouped != 0 && needed == W4A16_ELEMENTWISE) {
    return "grouped kernels compute gated activations only, and add a residual only to those: do it after the product";
  }
  if (kernel.grouped != 0) {
    return "grouped " + sentence + "one with epilogue " + epilogue_name(needed) +
           ", of `w4a16gen build --space experts`";
  }
  if (needed == W4A16_NO_EPILOGUE) return sentence + "`w4a16gen build`";
  return sentence + "`w4a16gen build --epilogue none --epilogue " + epilogue_name(needed) + "`";
}

inline std::string why_not_epilogue(const Kernel& kernel, const w4a16_problem& problem,
                                    const w4a16_gemm_arguments& arguments) {
  const int32_t activation = arguments.activation;
  if (activation < W4A16_NO_ACTIVATION || activation > W4A16_GEGLU) {
    return "activation of " + std::to_string(activation) + " must be a w4a16_activation, 0 to " +
           std::to_string(W4A16_GEGLU);
  }
  const bool has_residual = arguments.residual != nullptr;
  const int32_t needed = needed_epilogue(activation, has_residual);
  if (needed != W4A16_NO_EPILOGUE && std::string(kernel.info.target) != "native") {
    return std::string("kernels of target ") + kernel.info.target +
           " compute no activations and add no residual: pack the weight for target native";
  }
  if (needed != kernel.info.epilogue && !(needed == W4A16_NO_EPILOGUE && kernel.info.epilogue == W4A16_ELEMENTWISE)) {
    return why_other_epilogue(kernel.info, needed);
  }
  std::string sentence = is_gated(activation) ? why_not_gated(problem) : std::string();
  if (sentence.empty() && has_residual) {
    sentence = why_not_pointer("residual", arguments.residual, kTensorAlignment);
  }
  return sentence;
}

// Tiles of the output are written while others still read the operands. A residual may be the output itself: each
// element is then read before it is written.
inline std::string why_not_in_place(const Launch& launch) {
  const Problem& problem = launch.problem;
  const w4a16_gemm_arguments& arguments = launch.arguments;
  const uint64_t half_bytes = 2;
  const auto experts = static_cast<uint64_t>(launch.experts.count);
  const uint64_t bias_bytes = experts * static_cast<uint64_t>(problem.n) * half_bytes;
  const uint64_t packed_bytes = (experts - 1) * launch.experts.packed_stride + arguments.packed_bytes;
  const w4a16_ids& unsorted = launch.experts.unsorted;
  const bool is_unsorted = unsorted.ids != nullptr;
  const int64_t routes = is_unsorted ? problem.m * launch.experts.slots : 0;
  const int64_t written = is_unsorted ? unsorted_rows(routes, launch.experts.count) : problem.m;
  const auto rows = static_cast<uint64_t>(written);
  const auto read_rows = launch.experts.rows_are_shared != 0 ? static_cast<uint64_t>(problem.m) : rows;
  const auto columns = static_cast<uint64_t>(output_channels(problem.n, arguments.activation));
  const Range output{"output", arguments.output, rows * columns * half_bytes};
  const bool reads_residual = arguments.residual != arguments.output;
  const Range operands[] = {
      {"activations", arguments.activations, read_rows * static_cast<uint64_t>(problem.k) * half_bytes},
      {"packed weight", arguments.packed, packed_bytes},
      {"bias", arguments.bias, bias_bytes},
      {"residual", arguments.residual, reads_residual ? output.bytes : 0},
      {"list of token tiles", launch.experts.token_tiles, launch.experts.token_tiles_bytes},
      {"ids", unsorted.ids, static_cast<uint64_t>(routes) * static_cast<uint64_t>(unsorted.id_bytes)},
      {"expert map", is_unsorted ? unsorted.expert_map : nullptr,
       static_cast<uint64_t>(unsorted.global_experts) * sizeof(int32_t)},
  };
  std::string sentence;
  for (const Range& operand : operands) {
    if (sentence.empty()) sentence = why_not_apart(output, operand);
  }
  return sentence;
}

inline std::string why_not_workspace(const w4a16_gemm_arguments& arguments, size_t needed) {
  if (arguments.workspace_bytes < needed) {
    return why_not_bytes("workspace", arguments.workspace_bytes, needed, "be at least");
  }
  return needed > 0 ? why_not_pointer("workspace", arguments.workspace, kPackedAlignment) : std::string();
}

// Launches a product whose experts have been checked; a product of one weight has one.
inline w4a16_status multiply(const Kernel& kernel, Launch launch, char* message, size_t message_bytes) {
  const Problem& problem = launch.problem;
  const w4a16_gemm_arguments& arguments = launch.arguments;
  // Checks without a GPU come first, so that a wrong call gets the same message on every machine.
  std::string sentence = why_not_arguments(arguments, kernel.packed_bytes(problem));
  if (sentence.empty()) sentence = why_not_epilogue(kernel, problem, arguments);
  if (sentence.empty()) sentence = why_not_in_place(launch);
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  const Device& device = current_device();
  sentence = why_not_device(device);
  if (!sentence.empty()) return report(W4A16_NO_HOPPER_GPU, sentence, message, message_bytes);
  sentence = why_not_workspace(arguments, kernel.workspace_bytes(problem, device.sm_count));
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  launch.device = device.index;
  launch.sm_count = device.sm_count;
  const ResolvedLaunch resolved = resolved_launch(arguments.dependent_launch, arguments.stream, device.sm_count);
  launch.arguments.dependent_launch = resolved.kind;
  launch.one_cta_per_sm = resolved.one_cta_per_sm;
  launch.epoch = next_epoch();
  const cudaError_t error = kernel.launch(launch);
  if (error == cudaSuccess) return report(W4A16_OK, {}, message, message_bytes);
  sentence = std::string("launch of ") + kernel.info.name + " failed: " + cudaGetErrorString(error);
  return report(W4A16_CUDA_ERROR, sentence, message, message_bytes);
}

}  // namespace w4a16
