// What the module's functions return, and the addresses that they take.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "w4a16.h"

namespace w4a16 {

namespace py = pybind11;

// A status and its sentence, which Python turns into an exception.
using Outcome = py::tuple;

inline Outcome cuda_failure(const char* what, cudaError_t error) {
  return py::make_tuple(static_cast<int>(W4A16_CUDA_ERROR), std::string(what) + ": " + cudaGetErrorString(error));
}

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace w4a16
