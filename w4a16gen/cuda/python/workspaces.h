// Workspace of a launch whose caller passes none: allocated in stream order, or kept as long as the graph captured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "python/kernel_library.h"

namespace w4a16 {

// Memory that launches recorded into one capture, on one stream, use in turn. The graph owns it through a user object.
struct GraphWorkspace {
  void* pointer = nullptr;
  size_t bytes = 0;
  int device = 0;
};

class Workspaces {
 public:
  static Workspaces& instance() {
    static auto& workspaces = *new Workspaces;  // never destroyed: graphs may outlive Python
    return workspaces;
  }

  // Allocates for one launch. `in_graph` says that the memory belongs to a graph and must not be released.
  cudaError_t allocate(size_t bytes, int device, cudaStream_t stream, void** pointer, bool* in_graph) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id, &graph);
    if (error != cudaSuccess) return error;
    *in_graph = status == cudaStreamCaptureStatusActive;
    if (*in_graph) return allocate_in_graph(bytes, device, {id, stream}, graph, pointer);
    free_retired();
    cudaMemPool_t pool = nullptr;
    error = pool_of(device, &pool);
    return error == cudaSuccess ? cudaMallocFromPoolAsync(pointer, bytes, pool, stream) : error;
  }

 private:
  using Key = std::pair<unsigned long long, cudaStream_t>;  // capture, stream: launches of one key run in order

  struct Owned {
    GraphWorkspace workspace;
    Key key;
  };

  // Memory that stays with the pool when it is free, so that calls in a row do not ask the driver again.
  static constexpr uint64_t kKeptBytes = uint64_t{64} << 20;

  cudaError_t pool_of(int device, cudaMemPool_t* pool) {
    const std::lock_guard<std::mutex> lock(mutex_);
    cudaMemPool_t& known = pools_[device];
    if (known == nullptr) {
      cudaMemPoolProps properties{};
      properties.allocType = cudaMemAllocationTypePinned;
      properties.location.type = cudaMemLocationTypeDevice;
      properties.location.id = device;
      const cudaError_t error = cudaMemPoolCreate(&known, &properties);
      if (error != cudaSuccess) return error;
      uint64_t kept = kKeptBytes;
      cudaMemPoolSetAttribute(known, cudaMemPoolAttrReleaseThreshold, &kept);
    }
    *pool = known;
    return cudaSuccess;
  }

  cudaError_t allocate_in_graph(size_t bytes, int device, const Key& key, cudaGraph_t graph, void** pointer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    GraphWorkspace& current = in_graphs_[key];
    if (current.bytes < bytes) {
      GraphWorkspace fresh = take_retired(bytes, device);
      cudaError_t error = cudaSuccess;
      if (fresh.pointer == nullptr) {
        // cudaMalloc is not recorded; the thread's capture mode would forbid it all the same.
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        cudaThreadExchangeStreamCaptureMode(&mode);
        error = cudaMalloc(&fresh.pointer, bytes);
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (error != cudaSuccess) return error;
        fresh = {fresh.pointer, bytes, device};
      }
      auto owned = std::make_unique<Owned>(Owned{fresh, key});
      cudaUserObject_t object = nullptr;
      error = cudaUserObjectCreate(&object, owned.get(), &retire, 1, cudaUserObjectNoDestructorSync);
      if (error != cudaSuccess) {
        retired_.push_back(fresh);
        return error;
      }
      owned.release();  // retire deletes it
      error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
      if (error != cudaSuccess) {
        cudaUserObjectRelease(object, 1);
        return error;
      }
      current = fresh;  // launches recorded before keep theirs: the graph holds every one of them
    }
    *pointer = current.pointer;
    return cudaSuccess;
  }

  // Takes memory of a graph that is gone: programs that only capture never come to free it.
  GraphWorkspace take_retired(size_t bytes, int device) {
    for (auto found = retired_.begin(); found != retired_.end(); ++found) {
      if (found->device != device || found->bytes < bytes) continue;
      const GraphWorkspace taken = *found;
      retired_.erase(found);
      return taken;
    }
    return {};
  }

  // Runs when the last graph that holds the memory is gone. It must not call CUDA, so it only notes what is to be
  // freed.
  static void retire(void* argument) {
    auto* owned = static_cast<Owned*>(argument);
    Workspaces& workspaces = instance();
    {
      const std::lock_guard<std::mutex> lock(workspaces.mutex_);
      workspaces.retired_.push_back(owned->workspace);
      const auto found = workspaces.in_graphs_.find(owned->key);
      if (found != workspaces.in_graphs_.end() && found->second.pointer == owned->workspace.pointer) {
        workspaces.in_graphs_.erase(found);
      }
    }
    delete owned;
  }

  void free_retired() {
    std::vector<GraphWorkspace> retired;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      retired.swap(retired_);
    }
    for (const GraphWorkspace& workspace : retired) {
      const DeviceGuard guard(workspace.device);
      cudaFree(workspace.pointer);
    }
  }

  std::mutex mutex_;
  std::map<int, cudaMemPool_t> pools_;
  std::map<Key, GraphWorkspace> in_graphs_;
  std::vector<GraphWorkspace> retired_;
};

}  // namespace w4a16
