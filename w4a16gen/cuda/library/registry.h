// The table that the generated registry.cpp defines.
#pragma once

#include "library/kernel.h"

namespace w4a16 {

extern const Kernel* const kKernels[];
extern const int kKernelCount;

}  // namespace w4a16
