// The chooser of the exported library that this program uses, and the current GPU as it needs it.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

#include "chooser.h"

namespace w4a16 {

// Reads share/w4a16/choice.txt, which lies beside the library's folder, once per process. Throws ChoiceError.
inline const Chooser& default_chooser() {
  static const Chooser chooser = [] {
    // The symbol's address in the library: a pointer in an executable may be that of a stub in the executable itself.
    Dl_info info{};
    void* const symbol = dlsym(RTLD_DEFAULT, "w4a16_kernel_count");
    if (symbol == nullptr || dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) {
      throw ChoiceError("the kernel library is not a shared library of this process: pass a Chooser");
    }
    const std::string library = info.dli_fname;
    const size_t slash = library.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : library.substr(0, slash);
    return Chooser::load(folder + "/../share/w4a16/choice.txt");
  }();
  return chooser;
}

// Returns the current GPU, or null on a machine without one. Asks the driver once per device.
inline const Gpu* current_gpu() {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();  // no GPU is not an error here
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return &found->second;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return &known.emplace(device, Gpu{properties.name, properties.multiProcessorCount}).first->second;
}

}  // namespace w4a16
