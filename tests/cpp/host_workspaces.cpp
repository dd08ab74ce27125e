// Runs python/workspaces.h against a stand-in for the CUDA runtime that counts memory and fails at a chosen call.
//
// host_workspaces > a line per scenario, which ends in "ok" or in the fault
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>
#include <string>

#include "python/workspaces.h"

namespace {

// The runtime's state. A user object holds a reference count and its destructor, which runs inside the last release.
struct Runtime {
  std::set<void*> memory;  // of cudaMalloc
  std::set<void*> pooled;  // in stream order
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  int calls_until_failure = -1;
  int unsafe_calls = 0;  // in another mode than the relaxed one
  int pools = 0;
} runtime;

struct Object {
  void* argument;
  cudaHostFn_t destructor;
};
Object* retained = nullptr;  // by the graph

bool fails() { return runtime.calls_until_failure >= 0 && runtime.calls_until_failure-- == 0; }

void note_unsafe() { runtime.unsafe_calls += runtime.mode != cudaStreamCaptureModeRelaxed; }

void drop_graph() {
  if (retained == nullptr) return;
  retained->destructor(retained->argument);
  delete retained;
  retained = nullptr;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  note_unsafe();
  if (fails()) return cudaErrorMemoryAllocation;
  runtime.memory.insert(*pointer = std::malloc(bytes));
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  note_unsafe();
  if (runtime.memory.erase(pointer) != 1) std::abort();
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t, cudaStream_t) {
  if (fails()) return cudaErrorMemoryAllocation;
  runtime.pooled.insert(*pointer = std::malloc(bytes));
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  if (runtime.pooled.erase(pointer) != 1) std::abort();
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  note_unsafe();
  if (fails()) return cudaErrorMemoryAllocation;
  ++runtime.pools;
  *pool = reinterpret_cast<cudaMemPool_t>(&runtime);
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) {
  --runtime.pools;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return fails() ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, runtime.mode);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  if (fails()) return cudaErrorStreamCaptureImplicit;
  *status = runtime.status;
  *id = runtime.capture;
  return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* argument, cudaHostFn_t destructor, unsigned,
                                 unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  *object = reinterpret_cast<cudaUserObject_t>(new Object{argument, destructor});
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  auto* const released = reinterpret_cast<Object*>(object);
  released->destructor(released->argument);
  delete released;
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t object, unsigned, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  drop_graph();
  retained = reinterpret_cast<Object*>(object);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

}  // extern "C"

namespace {

w4a16::Workspaces& workspaces() { return w4a16::Workspaces::instance(); }

bool allocates(size_t bytes, void** pointer, bool* in_graph) {
  return workspaces().allocate(bytes, 0, nullptr, pointer, in_graph) == cudaSuccess;
}

// Allocates outside a capture, which frees the memory of graphs that are gone.
bool free_retired() {
  runtime.status = cudaStreamCaptureStatusNone;
  void* pointer = nullptr;
  bool in_graph = true;
  const bool ok = allocates(8, &pointer, &in_graph) && !in_graph;
  return ok && workspaces().release(pointer, nullptr) == cudaSuccess;
}

// Makes a call in a new capture fail at its n-th call of the runtime.
std::string fault_of_failure(int call, bool* failed) {
  drop_graph();
  runtime.status = cudaStreamCaptureStatusActive;
  ++runtime.capture;
  runtime.calls_until_failure = call;
  void* pointer = nullptr;
  bool in_graph = false;
  *failed = !allocates(64, &pointer, &in_graph);
  runtime.calls_until_failure = -1;
  if (!*failed && !in_graph) return "memory does not belong to the graph";
  if (runtime.mode != cudaStreamCaptureModeGlobal) return "the capture mode stays changed";
  drop_graph();
  if (!free_retired()) return "the next call fails";
  if (!runtime.memory.empty()) return "memory leaks";
  return runtime.unsafe_calls == 0 ? "ok" : "calls that are unsafe during a capture";
}

std::string fault_of_sharing() {
  runtime.status = cudaStreamCaptureStatusActive;
  ++runtime.capture;
  void *first = nullptr, *second = nullptr, *other = nullptr;
  bool in_graph = false;
  if (!allocates(64, &first, &in_graph) || !allocates(32, &second, &in_graph)) return "a call fails";
  if (first != second) return "launches of one capture do not share memory";
  ++runtime.capture;
  Object* const of_first = retained;
  retained = nullptr;
  if (!allocates(64, &other, &in_graph)) return "a call fails";
  if (other == first) return "two captures share memory";
  of_first->destructor(of_first->argument);
  delete of_first;
  ++runtime.capture;
  Object* const of_other = retained;
  retained = nullptr;
  if (!allocates(48, &second, &in_graph)) return "a call fails";
  if (second != first) return "memory of a graph that is gone is not used again";
  of_other->destructor(of_other->argument);
  delete of_other;
  drop_graph();
  return free_retired() && runtime.memory.empty() && runtime.pooled.empty() ? "ok" : "memory leaks";
}

std::string fault_of_an_invalid_capture() {
  runtime.status = cudaStreamCaptureStatusInvalidated;
  void* pointer = nullptr;
  bool in_graph = false;
  return allocates(8, &pointer, &in_graph) ? "memory for a capture that is invalid" : "ok";
}

}  // namespace

int main() {
  for (int call = 0; call < 3; ++call) {  // creating the pool, its attribute, the allocation
    runtime.calls_until_failure = call + 1;
    const bool ok = !free_retired() && runtime.pools == (call < 2 ? 0 : 1) && runtime.pooled.empty();
    std::printf("failure at call %d outside a capture: %s\n", call + 1, ok ? "ok" : "memory leaks");
  }
  runtime.calls_until_failure = -1;
  std::printf("outside a capture: %s\n", free_retired() && runtime.pools == 1 ? "ok" : "a call fails");
  bool failed = true;
  for (int call = 0; failed; ++call) {
    const std::string fault = fault_of_failure(call, &failed);
    std::printf("failure at call %d in a capture: %s\n", call, fault.c_str());
  }
  std::printf("sharing: %s\n", fault_of_sharing().c_str());
  std::printf("invalid capture: %s\n", fault_of_an_invalid_capture().c_str());
}
