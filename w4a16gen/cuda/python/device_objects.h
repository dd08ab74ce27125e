// CUDA objects for callers without torch: device memory, and a stream with graph capture and timing.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "python/kernel_library.h"

namespace w4a16 {

namespace py = pybind11;

// Device memory, freed with its last Python reference.
class DeviceBuffer {
 public:
  DeviceBuffer(size_t bytes, int device) : bytes_(bytes), device_(device) {
    const DeviceGuard guard(device);
    const RelaxedCaptureMode relaxed;
    check(cudaMalloc(&pointer_, bytes > 0 ? bytes : 1), "cudaMalloc");
  }
  // Python may collect a buffer at any moment, also while some thread captures a graph.
  ~DeviceBuffer() {
    const RelaxedCaptureMode relaxed;
    cudaFree(pointer_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  uintptr_t pointer() const { return reinterpret_cast<uintptr_t>(pointer_); }
  size_t bytes() const { return bytes_; }
  int device() const { return device_; }

  void upload(const py::buffer& source, size_t offset) {
    const py::buffer_info info = source.request();
    const size_t size = static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
    if (offset > bytes_ || size > bytes_ - offset) throw std::out_of_range("upload beyond the device buffer");
    const DeviceGuard guard(device_);
    check(cudaMemcpy(static_cast<char*>(pointer_) + offset, info.ptr, size, cudaMemcpyHostToDevice), "upload");
    // A copy from pageable memory returns when its last 64 KB are staged. Streams that do not wait for the legacy
    // stream would read the old contents.
    check(cudaStreamSynchronize(cudaStreamLegacy), "upload");
  }
  void download(const py::buffer& destination, size_t offset) const {
    const py::buffer_info info = destination.request(true);
    const size_t size = static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
    if (offset > bytes_ || size > bytes_ - offset) throw std::out_of_range("download beyond the device buffer");
    const DeviceGuard guard(device_);
    check(cudaMemcpy(info.ptr, static_cast<const char*>(pointer_) + offset, size, cudaMemcpyDeviceToHost), "download");
  }

 private:
  void* pointer_ = nullptr;
  size_t bytes_;
  int device_;
};

// A stream that can also capture launches into a graph and time them.
class Stream {
 public:
  explicit Stream(int device) : device_(device) {
    const DeviceGuard guard(device);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  ~Stream() {
    const RelaxedCaptureMode relaxed;
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaStreamDestroy(stream_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  uintptr_t pointer() const { return reinterpret_cast<uintptr_t>(stream_); }
  void synchronize() const {
    const py::gil_scoped_release release;
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  void begin_capture() const { check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture"); }
  void end_capture() {
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_, &graph), "capture");
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    graph_ = nullptr;
    const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(error, "cudaGraphInstantiate");
  }
  void replay() const { check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch"); }
  void start_timer() const { check(cudaEventRecord(start_, stream_), "cudaEventRecord"); }
  float stop_timer() const {
    float milliseconds = 0;
    const py::gil_scoped_release release;
    check(cudaEventRecord(stop_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(stop_), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&milliseconds, start_, stop_), "cudaEventElapsedTime");
    return milliseconds;
  }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace w4a16
