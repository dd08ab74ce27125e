// The table of a library without kernels.
#include "library/registry.h"

namespace w4a16 {
const Kernel* const kKernels[] = {nullptr};
const int kKernelCount = 0;
}  // namespace w4a16
