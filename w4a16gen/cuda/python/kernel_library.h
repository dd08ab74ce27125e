// A kernel library, opened by path, and the CUDA device that its calls are for.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "w4a16.h"

namespace w4a16 {

// A failed CUDA call. In Python it is w4a16gen.errors.CudaError.
struct CudaFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw CudaFailure(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Makes a device current for a scope. Without CUDA it does nothing; the next call reports the error.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) return;
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Lets this thread allocate and free memory while any thread captures. Such calls are not recorded, but would otherwise
// fail and invalidate captures in the global mode.
class RelaxedCaptureMode {
 public:
  RelaxedCaptureMode() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCaptureMode() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCaptureMode(const RelaxedCaptureMode&) = delete;
  RelaxedCaptureMode& operator=(const RelaxedCaptureMode&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A buffer for the sentence of a failed call.
struct Message : std::array<char, 512> {
  Message() { front() = '\0'; }
};

// The functions of w4a16.h in a library.
class KernelLibrary {
 public:
  explicit KernelLibrary(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    try {
      int (*abi_version)() = nullptr;
      resolve("w4a16_abi_version", abi_version);
      if (abi_version() != W4A16_ABI_VERSION) {
        throw std::runtime_error(path + " has ABI version " + std::to_string(abi_version()) + "; this module needs " +
                                 std::to_string(W4A16_ABI_VERSION) + ": build again");
      }
      resolve("w4a16_kernel_count", kernel_count);
      resolve("w4a16_get_kernel_info", get_kernel_info);
      resolve("w4a16_can_implement", can_implement);
      resolve("w4a16_packed_bytes", packed_bytes);
      resolve("w4a16_workspace_bytes", workspace_bytes);
      resolve("w4a16_gemm", gemm);
      resolve("w4a16_pack", pack);
      resolve("w4a16_grouped_gemm", grouped_gemm);
      resolve("w4a16_token_tiles_bytes", token_tiles_bytes);
      resolve("w4a16_route", route);
      resolve("w4a16_list_token_tiles", list_token_tiles);
      resolve("w4a16_gather_rows", gather_rows);
      resolve("w4a16_activate_rows", activate_rows);
      resolve("w4a16_combine_rows", combine_rows);
      resolve("w4a16_probe_read", probe_read);
      resolve("w4a16_probe_multiply", probe_multiply);
    } catch (...) {
      dlclose(handle_);
      throw;
    }
  }
  ~KernelLibrary() { dlclose(handle_); }
  KernelLibrary(const KernelLibrary&) = delete;
  KernelLibrary& operator=(const KernelLibrary&) = delete;

  decltype(&w4a16_kernel_count) kernel_count = nullptr;
  decltype(&w4a16_get_kernel_info) get_kernel_info = nullptr;
  decltype(&w4a16_can_implement) can_implement = nullptr;
  decltype(&w4a16_packed_bytes) packed_bytes = nullptr;
  decltype(&w4a16_workspace_bytes) workspace_bytes = nullptr;
  decltype(&w4a16_gemm) gemm = nullptr;
  decltype(&w4a16_pack) pack = nullptr;
  decltype(&w4a16_grouped_gemm) grouped_gemm = nullptr;
  decltype(&w4a16_token_tiles_bytes) token_tiles_bytes = nullptr;
  decltype(&w4a16_route) route = nullptr;
  decltype(&w4a16_list_token_tiles) list_token_tiles = nullptr;
  decltype(&w4a16_gather_rows) gather_rows = nullptr;
  decltype(&w4a16_activate_rows) activate_rows = nullptr;
  decltype(&w4a16_combine_rows) combine_rows = nullptr;
  decltype(&w4a16_probe_read) probe_read = nullptr;
  decltype(&w4a16_probe_multiply) probe_multiply = nullptr;

 private:
  template <class Function>
  void resolve(const char* name, Function& function) {
    void* symbol = dlsym(handle_, name);
    if (symbol == nullptr) throw std::runtime_error(std::string("the kernel library exports no ") + name);
    std::memcpy(&function, &symbol, sizeof(function));
  }

  void* handle_;
};

}  // namespace w4a16
