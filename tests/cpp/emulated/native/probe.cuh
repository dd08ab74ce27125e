// Stands in for native/probe.cuh: the emulation measures nothing.
#pragma once

#include "library/kernel.h"

namespace w4a16::native {

constexpr Probes kProbes{nullptr, nullptr, 0};

}  // namespace w4a16::native
