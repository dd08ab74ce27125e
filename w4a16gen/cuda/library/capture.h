// What a stream capture says of the launch that comes next: whether it gains as a dependent one, and how.
//
// Behind a kernel that takes part in dependent launches a product gains; behind any other one it takes longer than as
// an ordinary launch. Only a capture knows what comes before.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "library/driver.h"
#include "library/hopper.h"
#include "w4a16.h"

namespace w4a16 {

// Whether a device function is one of target native's: all of these let dependent launches start. The name begins like
// that of w4a16::native::kernel<...>; other builds in the process may have launched it too.
inline bool is_native_kernel(const char* symbol) {
  static constexpr char kBegin[] = "_ZN5w4a166native6kernelI";
  return std::strncmp(symbol, kBegin, sizeof(kBegin) - 1) == 0;
}

// The kernel that the next launch of a capture follows.
enum class Previous {
  kUnknown,      // there is no capture, or the launch follows something else
  kOrdinary,     // a kernel that takes no part in dependent launches
  kParticipant,  // a kernel that takes part
  kPaired,       // a native kernel that leaves room for a CTA of the same size on every SM
};

// The driver's questions about a capture. A question that fails is answered with no. The driver keeps no error of it,
// unlike the runtime, whose caller may be about to ask for its last one.
class Capture {
 public:
  // Returns the only kernel that the next launch of the stream follows, on a device with some SMs.
  Previous previous(cudaStream_t stream, int sm_count) const {
    CUgraphNode node = nullptr;
    if (!has_functions() || !find_only_dependency(stream, &node) || !is_kernel(node)) return Previous::kUnknown;
    CUDA_KERNEL_NODE_PARAMS parameters{};
    if (parameters_(node, &parameters) == CUDA_SUCCESS && is_native(parameters)) {
      return is_paired(parameters, sm_count) ? Previous::kPaired : Previous::kParticipant;
    }
    return has_programmatic_edge(node) ? Previous::kParticipant : Previous::kOrdinary;
  }

 private:
  static constexpr unsigned kVersion = 12030;  // the first with data of edges

  bool has_functions() const {
    return capture_info_ != nullptr && type_ != nullptr && parameters_ != nullptr && dependencies_ != nullptr &&
           function_name_ != nullptr && kernel_name_ != nullptr && function_attribute_ != nullptr &&
           function_of_kernel_ != nullptr;
  }

  bool find_only_dependency(cudaStream_t stream, CUgraphNode* node) const {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    const CUgraphNode* nodes = nullptr;
    const CUgraphEdgeData* edges = nullptr;
    size_t count = 0;
    if (capture_info_(stream, &status, nullptr, nullptr, &nodes, &edges, &count) != CUDA_SUCCESS) return false;
    if (status != CU_STREAM_CAPTURE_STATUS_ACTIVE || count != 1) return false;
    if (edges != nullptr && edges[0].type != CU_GRAPH_DEPENDENCY_TYPE_DEFAULT) return false;
    *node = nodes[0];
    return true;
  }

  bool is_kernel(CUgraphNode node) const {
    CUgraphNodeType type = CU_GRAPH_NODE_TYPE_EMPTY;
    return type_(node, &type) == CUDA_SUCCESS && type == CU_GRAPH_NODE_TYPE_KERNEL;
  }

  bool is_native(const CUDA_KERNEL_NODE_PARAMS& parameters) const {
    const char* name = nullptr;
    const CUresult result =
        parameters.func != nullptr ? function_name_(&name, parameters.func) : kernel_name_(&name, parameters.kern);
    return result == CUDA_SUCCESS && name != nullptr && is_native_kernel(name);
  }

  // Whether there are no more CTAs than SMs, each with at most half of an SM's registers and shared memory.
  bool is_paired(const CUDA_KERNEL_NODE_PARAMS& parameters, int sm_count) const {
    CUfunction function = parameters.func;
    if (function == nullptr && function_of_kernel_(&function, parameters.kern) != CUDA_SUCCESS) return false;
    int registers = 0;
    if (function_attribute_(&registers, CU_FUNC_ATTRIBUTE_NUM_REGS, function) != CUDA_SUCCESS) return false;
    const int allocated = (registers + kRegisterUnit - 1) / kRegisterUnit * kRegisterUnit;
    const auto threads = static_cast<int>(parameters.blockDimX);
    const auto shared_bytes = static_cast<int>(parameters.sharedMemBytes);
    return static_cast<int>(parameters.gridDimX) <= sm_count && 2 * allocated * threads <= kRegistersPerSm &&
           2 * (shared_bytes + kReservedSharedBytes) <= kSharedBytesPerSm;
  }

  // A capture turns a launch's attribute into the type of an edge. A node has no such attribute.
  bool has_programmatic_edge(CUgraphNode node) const {
    std::array<CUgraphNode, 8> nodes{};  // a dependent launch has one dependency, or a few by events
    std::array<CUgraphEdgeData, 8> edges{};
    size_t count = nodes.size();
    if (dependencies_(node, nodes.data(), edges.data(), &count) != CUDA_SUCCESS) return false;
    return std::any_of(edges.begin(), edges.begin() + std::min(count, edges.size()), [](const CUgraphEdgeData& edge) {
      return edge.type == CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC &&
             edge.from_port == CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC;
    });
  }

  template <class FunctionType>
  static FunctionType find(const char* name) {
    return driver_function<FunctionType>(name, kVersion);
  }

  decltype(&cuStreamGetCaptureInfo_v3) capture_info_ = find<decltype(capture_info_)>("cuStreamGetCaptureInfo");
  decltype(&cuGraphNodeGetType) type_ = find<decltype(type_)>("cuGraphNodeGetType");
  decltype(&cuGraphKernelNodeGetParams) parameters_ = find<decltype(parameters_)>("cuGraphKernelNodeGetParams");
  decltype(&cuGraphNodeGetDependencies_v2) dependencies_ = find<decltype(dependencies_)>("cuGraphNodeGetDependencies");
  decltype(&cuFuncGetName) function_name_ = find<decltype(function_name_)>("cuFuncGetName");
  decltype(&cuKernelGetName) kernel_name_ = find<decltype(kernel_name_)>("cuKernelGetName");
  decltype(&cuFuncGetAttribute) function_attribute_ = find<decltype(function_attribute_)>("cuFuncGetAttribute");
  decltype(&cuKernelGetFunction) function_of_kernel_ = find<decltype(function_of_kernel_)>("cuKernelGetFunction");
};

// Returns why a number is no w4a16_launch, or an empty string if it is one.
inline std::string why_not_launch(int32_t launch) {
  if (launch >= W4A16_ORDINARY_LAUNCH && launch <= W4A16_AUTO_LAUNCH) return {};
  return "dependent_launch of " + std::to_string(launch) + " must be a w4a16_launch, 0 to " +
         std::to_string(W4A16_AUTO_LAUNCH);
}

// What a w4a16_launch becomes on a stream.
struct ResolvedLaunch {
  int32_t kind;         // W4A16_ORDINARY_LAUNCH or W4A16_DEPENDENT_LAUNCH
  bool one_cta_per_sm;  // a dependent launch that finds no room beside the CTAs before it: see Launch
};

// Resolves a w4a16_launch by the kernel before it on the stream.
inline ResolvedLaunch resolved_launch(int32_t launch, void* stream, int sm_count) {
  static const Capture capture;  // made by the first launch of any kind: later ones may be captured already
  if (launch == W4A16_ORDINARY_LAUNCH) return {launch, false};
  const Previous previous = capture.previous(static_cast<cudaStream_t>(stream), sm_count);
  const bool gains = previous == Previous::kParticipant || previous == Previous::kPaired;
  if (launch == W4A16_AUTO_LAUNCH && !gains) return {W4A16_ORDINARY_LAUNCH, false};
  return {W4A16_DEPENDENT_LAUNCH, previous == Previous::kOrdinary || previous == Previous::kParticipant};
}

}  // namespace w4a16
