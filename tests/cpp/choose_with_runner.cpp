// Prints what Runner::chooseConfig returns for M N K GROUP_SIZE in mode fgs, on a stand-in for an H100.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "w4a16/runner.h"

extern "C" {

// Stand-ins for the CUDA runtime: only what chooseConfig calls does anything.
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return std::getenv("NO_GPU") == nullptr ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "NVIDIA H100 80GB HBM3");
  properties->multiProcessorCount = 132;
  return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaMalloc(void**, size_t) { return cudaErrorNotSupported; }
cudaError_t cudaFree(void*) { return cudaErrorNotSupported; }
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaErrorNotSupported; }

}  // extern "C"

int main(int, char** arguments) {
  try {
    const w4a16::FinegrainedRunner runner;
    const auto number = [&](int at) { return std::atoi(arguments[at]); };
    std::printf("%s\n", runner.chooseConfig(number(1), number(2), number(3), number(4)).name().c_str());
  } catch (const w4a16::Error& error) {
    std::printf("error %d %s\n", static_cast<int>(error.status), error.what());
  }
}
