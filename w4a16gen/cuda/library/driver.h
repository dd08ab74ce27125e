// Functions of the CUDA driver. Looking them up avoids linking to the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace w4a16 {

// Returns a function as of a CUDA version, or null if the driver has none of this name.
template <class FunctionType>
FunctionType driver_function(const char* name, unsigned version = 12000) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
  return error == cudaSuccess ? reinterpret_cast<FunctionType>(found) : nullptr;
}

}  // namespace w4a16
