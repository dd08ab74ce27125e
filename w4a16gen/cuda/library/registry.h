// The table of kernels, which the generated registry.cpp defines.
#pragma once

#include "library/kernel.h"

namespace w4a16 {

extern const Kernel* const kKernels[];
extern const int kKernelCount;

}  // namespace w4a16

#define W4A16_DECLARE_KERNEL(name) extern const Kernel name##_kernel;
#define W4A16_KERNEL_POINTER(name) &name##_kernel,

// Defines the table. KERNELS is a macro that applies another one to every kernel's name.
#define W4A16_DEFINE_REGISTRY(KERNELS)                                               \
  namespace w4a16 {                                                                  \
  KERNELS(W4A16_DECLARE_KERNEL)                                                      \
  const Kernel* const kKernels[] = {KERNELS(W4A16_KERNEL_POINTER)};                  \
  const int kKernelCount = static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0])); \
  }
