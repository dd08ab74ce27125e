// Workspaces of launches whose callers pass none: allocated in stream order, or owned by the graph that is captured.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "python/kernel_library.h"

namespace w4a16 {

// Calls of `allocate` and `release` need the device to be current. The mutex is never held during a call of CUDA: CUDA
// may run `retire` in another thread, or in this one, before such a call returns.
class Workspaces {
 public:
  static Workspaces& instance() {
    static auto& workspaces = *new Workspaces;  // never destroyed, since graphs may outlive Python
    return workspaces;
  }

  // Allocates the workspace of one launch on a stream. `release` takes it back, unless it belongs to a graph.
  cudaError_t allocate(size_t bytes, int device, cudaStream_t stream, void** pointer, bool* in_graph) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id, &graph);
    if (error != cudaSuccess) return error;
    if (status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
    *in_graph = status == cudaStreamCaptureStatusActive;
    if (*in_graph) return allocate_in_graph(bytes, device, {id, stream}, graph, pointer);
    free_retired(device);
    cudaMemPool_t pool = nullptr;
    error = pool_of(device, &pool);
    return error == cudaSuccess ? cudaMallocFromPoolAsync(pointer, bytes, pool, stream) : error;
  }

  cudaError_t release(void* pointer, cudaStream_t stream) { return cudaFreeAsync(pointer, stream); }

 private:
  // A capture and one of its streams. The launches of one key run one after the other and share a workspace. The
  // numbers of captures are unique in a process.
  using Key = std::pair<unsigned long long, cudaStream_t>;

  struct Memory {
    void* pointer = nullptr;
    size_t bytes = 0;
    int device = 0;
  };

  // What the user object of a graph refers to.
  struct Owned {
    Memory memory;
    Key key;
  };

  // Free memory that a pool keeps, so that successive calls do not ask the driver.
  static constexpr uint64_t kKeptBytes = uint64_t{64} << 20;

  cudaError_t pool_of(int device, cudaMemPool_t* pool) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto known = pools_.find(device);
      if (known != pools_.end()) {
        *pool = known->second;
        return cudaSuccess;
      }
    }
    const RelaxedCaptureMode relaxed;
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    cudaMemPool_t created = nullptr;
    cudaError_t error = cudaMemPoolCreate(&created, &properties);
    if (error != cudaSuccess) return error;
    uint64_t kept = kKeptBytes;
    error = cudaMemPoolSetAttribute(created, cudaMemPoolAttrReleaseThreshold, &kept);
    bool is_first = false;
    if (error == cudaSuccess) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto [entry, inserted] = pools_.emplace(device, created);
      *pool = entry->second;
      is_first = inserted;
    }
    if (!is_first) cudaMemPoolDestroy(created);  // after an error, or if another thread was faster
    return error;
  }

  cudaError_t allocate_in_graph(size_t bytes, int device, const Key& key, cudaGraph_t graph, void** pointer) {
    Memory memory;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto known = in_graphs_.find(key);
      if (known != in_graphs_.end() && known->second.bytes >= bytes) {
        *pointer = known->second.pointer;
        return cudaSuccess;
      }
      memory = take_retired(bytes, device);
    }
    auto owned = std::make_unique<Owned>(Owned{memory, key});
    if (owned->memory.pointer == nullptr) {
      const RelaxedCaptureMode relaxed;
      owned->memory = {nullptr, bytes, device};
      const cudaError_t error = cudaMalloc(&owned->memory.pointer, bytes);
      if (error != cudaSuccess) return error;
    }
    memory = owned->memory;
    cudaUserObject_t object = nullptr;
    cudaError_t error = cudaUserObjectCreate(&object, owned.get(), &retire, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) {
      retire(owned.release());
      return error;
    }
    owned.release();  // belongs to the user object now
    // Launches recorded before keep a smaller workspace: the graph owns every one of them.
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      in_graphs_[key] = memory;
    }
    error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) {
      cudaUserObjectRelease(object, 1);
      return error;
    }
    *pointer = memory.pointer;
    return cudaSuccess;
  }

  // Takes memory of a graph that is gone, or returns none. The caller holds the mutex.
  Memory take_retired(size_t bytes, int device) {
    const auto found = std::find_if(retired_.begin(), retired_.end(), [&](const Memory& memory) {
      return memory.device == device && memory.bytes >= bytes;
    });
    if (found == retired_.end()) return {};
    const Memory taken = *found;
    retired_.erase(found);
    return taken;
  }

  // Runs when the last graph that owns the memory is gone and its launches have finished. It must not call CUDA, so it
  // only notes the memory.
  static void retire(void* argument) {
    const std::unique_ptr<Owned> owned(static_cast<Owned*>(argument));
    Workspaces& workspaces = instance();
    const std::lock_guard<std::mutex> lock(workspaces.mutex_);
    workspaces.retired_.push_back(owned->memory);
    const auto found = workspaces.in_graphs_.find(owned->key);
    if (found != workspaces.in_graphs_.end() && found->second.pointer == owned->memory.pointer) {
      workspaces.in_graphs_.erase(found);
    }
  }

  void free_retired(int device) {
    std::vector<Memory> unused;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (retired_.empty()) return;
      const auto others = std::partition(retired_.begin(), retired_.end(),
                                         [&](const Memory& memory) { return memory.device != device; });
      std::move(others, retired_.end(), std::back_inserter(unused));
      retired_.erase(others, retired_.end());
    }
    const RelaxedCaptureMode relaxed;
    for (const Memory& memory : unused) cudaFree(memory.pointer);
  }

  std::mutex mutex_;
  std::map<int, cudaMemPool_t> pools_;
  std::map<Key, Memory> in_graphs_;
  std::vector<Memory> retired_;
};

}  // namespace w4a16
