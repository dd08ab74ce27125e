// host_captures LAUNCH [FACT...] > how w4a16_gemm launches when it is asked for this w4a16_launch, or why it does not
//
// The CUDA driver is a stand-in. Facts say what it knows of the stream:
//
// - none, ended: the stream is in no capture, or in one that has become invalid
// - native, native_handle: the next node depends on a kernel of target native, found by its function or by its handle
// - native:CTAS,THREADS,REGISTERS,BYTES: the same, with CTAs of this many threads, registers and shared bytes
// - ordinary, pack, cutlass: on another kernel
// - copy: on a copy
// - edge, other_edge: on a kernel with an incoming edge of programmatic launch, or of the start of a kernel
// - part: on a part of a native kernel
// - fail:NAME, absent:NAME: a function of the driver fails, or is not there
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "library/library.cpp"
#include "one_hopper.h"

namespace {

struct Node {
  CUgraphNodeType type = CU_GRAPH_NODE_TYPE_KERNEL;
  const char* symbol = "_Z8ordinaryPf";
  bool has_handle = false;
  std::vector<CUgraphEdgeData> incoming = {};
  unsigned ctas = 132;
  unsigned threads = 384;
  unsigned shared_bytes = 113 * 1024;
  int registers = 80;
};

constexpr CUgraphEdgeData kFull{};
constexpr CUgraphEdgeData kProgrammatic{
    CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, 0, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC, {}};
constexpr CUgraphEdgeData kStarted{
    CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER, 0, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC, {}};
constexpr uintptr_t kStream = 77;

CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_ACTIVE;
std::vector<CUgraphNode> dependencies;
std::vector<CUgraphEdgeData> edges;
std::set<std::string> failing, absent;
int registers = 0;  // of the kernel that was asked for last

const Node& at(CUgraphNode node) { return *reinterpret_cast<const Node*>(node); }

CUresult result_of(const char* name) { return failing.count(name) != 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

CUresult capture_info(CUstream stream, CUstreamCaptureStatus* found, cuuint64_t*, CUgraph*, const CUgraphNode** nodes,
                      const CUgraphEdgeData** data, size_t* count) {
  if (reinterpret_cast<uintptr_t>(stream) != kStream) return CUDA_ERROR_INVALID_HANDLE;
  *found = status;
  *nodes = dependencies.data();
  *data = edges.data();
  *count = dependencies.size();
  return result_of("cuStreamGetCaptureInfo");
}

CUresult node_type(CUgraphNode node, CUgraphNodeType* type) {
  *type = at(node).type;
  return result_of("cuGraphNodeGetType");
}

CUresult node_parameters(CUgraphNode node, CUDA_KERNEL_NODE_PARAMS* parameters) {
  auto* const symbol = const_cast<char*>(at(node).symbol);
  *parameters = {};
  if (at(node).has_handle) {
    parameters->kern = reinterpret_cast<CUkernel>(symbol);
  } else {
    parameters->func = reinterpret_cast<CUfunction>(symbol);
  }
  parameters->gridDimX = at(node).ctas;
  parameters->blockDimX = at(node).threads;
  parameters->sharedMemBytes = at(node).shared_bytes;
  registers = at(node).registers;
  return result_of("cuGraphKernelNodeGetParams");
}

CUresult node_dependencies(CUgraphNode node, CUgraphNode*, CUgraphEdgeData* data, size_t* count) {
  *count = std::min(*count, at(node).incoming.size());
  std::copy_n(at(node).incoming.begin(), *count, data);
  return result_of("cuGraphNodeGetDependencies");
}

CUresult function_name(const char** name, CUfunction function) {
  *name = reinterpret_cast<const char*>(function);
  return result_of("cuFuncGetName");
}

CUresult kernel_name(const char** name, CUkernel kernel) {
  *name = reinterpret_cast<const char*>(kernel);
  return result_of("cuKernelGetName");
}

CUresult function_attribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  if (function == nullptr || attribute != CU_FUNC_ATTRIBUTE_NUM_REGS) return CUDA_ERROR_INVALID_VALUE;
  *value = registers;
  return result_of("cuFuncGetAttribute");
}

CUresult function_of_kernel(CUfunction* function, CUkernel kernel) {
  *function = reinterpret_cast<CUfunction>(kernel);
  return result_of("cuKernelGetFunction");
}

void* found_function(const std::string& name) {
  if (name == "cuStreamGetCaptureInfo") return reinterpret_cast<void*>(&capture_info);
  if (name == "cuGraphNodeGetType") return reinterpret_cast<void*>(&node_type);
  if (name == "cuGraphKernelNodeGetParams") return reinterpret_cast<void*>(&node_parameters);
  if (name == "cuGraphNodeGetDependencies") return reinterpret_cast<void*>(&node_dependencies);
  if (name == "cuFuncGetName") return reinterpret_cast<void*>(&function_name);
  if (name == "cuKernelGetName") return reinterpret_cast<void*>(&kernel_name);
  if (name == "cuFuncGetAttribute") return reinterpret_cast<void*>(&function_attribute);
  if (name == "cuKernelGetFunction") return reinterpret_cast<void*>(&function_of_kernel);
  std::fprintf(stderr, "the library asks the driver for %s\n", name.c_str());
  std::exit(1);
}

void add(const Node& node, const CUgraphEdgeData& edge = kFull) {
  dependencies.push_back(reinterpret_cast<CUgraphNode>(new Node(node)));
  edges.push_back(edge);
}

void take(const std::string& fact) {
  static constexpr char kNative[] = "_ZN5w4a166native6kernelINS_4nameELi2EEEvNS0_10ParametersE";
  const size_t colon = fact.find(':');
  if (fact == "none") status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (fact == "ended") status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
  if (fact == "native") add({CU_GRAPH_NODE_TYPE_KERNEL, kNative});
  if (fact.substr(0, colon) == "native" && colon != std::string::npos) {
    Node node{CU_GRAPH_NODE_TYPE_KERNEL, kNative};
    std::sscanf(fact.c_str() + colon + 1, "%u,%u,%d,%u", &node.ctas, &node.threads, &node.registers,
                &node.shared_bytes);
    add(node);
  }
  if (fact == "native_handle") add({CU_GRAPH_NODE_TYPE_KERNEL, kNative, true});
  if (fact == "ordinary") add({});
  if (fact == "pack") add({CU_GRAPH_NODE_TYPE_KERNEL, "_ZN5w4a166native11pack_kernelILi1EEEvNS0_4PackE"});
  if (fact == "cutlass") add({CU_GRAPH_NODE_TYPE_KERNEL, "_ZN7cutlass13device_kernelIN5w4a16E"});
  if (fact == "copy") add({CU_GRAPH_NODE_TYPE_MEMCPY});
  if (fact == "edge") add({CU_GRAPH_NODE_TYPE_KERNEL, "_Z6tritonPf", false, {kFull, kProgrammatic}});
  if (fact == "other_edge") add({CU_GRAPH_NODE_TYPE_KERNEL, "_Z6tritonPf", false, {kStarted}});
  if (fact == "part") add({CU_GRAPH_NODE_TYPE_KERNEL, kNative}, kProgrammatic);
  if (fact.substr(0, colon) == "fail") failing.insert(fact.substr(colon + 1));
  if (fact.substr(0, colon) == "absent") absent.insert(fact.substr(colon + 1));
}

const char* launched = "nothing";

w4a16::Kernel make_kernel() {
  w4a16::Kernel kernel{};
  kernel.info.name = "a kernel";
  kernel.info.target = "native";
  kernel.info.mode = W4A16_FINEGRAINED_SCALE_ONLY;
  kernel.info.group_multiple = 32;
  kernel.packed_bytes = [](const w4a16::Problem&) { return size_t{128}; };
  kernel.workspace_bytes = [](const w4a16::Problem&, int) { return size_t{0}; };
  kernel.launch = [](const w4a16::Launch& launch) {
    const bool is_dependent = launch.arguments.dependent_launch == W4A16_DEPENDENT_LAUNCH;
    launched = launch.one_cta_per_sm ? is_dependent ? "dependent, alone" : "alone"
               : is_dependent        ? "dependent"
               : launch.arguments.dependent_launch == W4A16_ORDINARY_LAUNCH ? "ordinary"
                                                                            : "neither";
    return cudaSuccess;
  };
  return kernel;
}

const w4a16::Kernel kernel = make_kernel();

}  // namespace

namespace w4a16 {
extern const Kernel* const kKernels[] = {&kernel};
extern const int kKernelCount = 1;
}  // namespace w4a16

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  if (absent.count(name) != 0) return cudaErrorNotSupported;
  if (version != 12030) return cudaErrorInvalidValue;  // an earlier one has other arguments
  *function = found_function(name);
  return cudaSuccess;
}

}  // extern "C"

int main(int count, char** given) {
  for (int index = 2; index < count; ++index) take(given[index]);
  const w4a16_problem problem{1, 64, 64, 64};
  w4a16_gemm_arguments arguments{};
  arguments.activations = reinterpret_cast<const void*>(uintptr_t{1} << 20);
  arguments.packed = reinterpret_cast<const void*>(uintptr_t{2} << 20);
  arguments.packed_bytes = 128;
  arguments.output = reinterpret_cast<void*>(uintptr_t{3} << 20);
  arguments.stream = reinterpret_cast<void*>(kStream);
  arguments.alpha = 1;
  arguments.dependent_launch = std::atoi(given[1]);
  char message[512];
  const bool done = w4a16_gemm(0, &problem, &arguments, message, sizeof(message)) == W4A16_OK;
  std::puts(done ? launched : message);
  return 0;
}
