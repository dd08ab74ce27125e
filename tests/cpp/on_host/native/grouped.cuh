// Stands in for native/grouped.cuh, as native/launch.cuh here does for other kernels.
#pragma once

#include "native/launch.cuh"

namespace w4a16::native::grouped {

using native::make_kernel;

}  // namespace w4a16::native::grouped
