// Stands in for native/launch.cuh in programs for the CPU: every kernel that a compile unit includes is visited.
#pragma once

#include "library/kernel.h"
#include "native/tiles.h"

// What the program does with a kernel; it defines this function.
template <class S>
void visit(const char* name);

namespace w4a16::native {

template <class S>
Kernel make_kernel(const char* name) {
  visit<S>(name);
  return {};
}

}  // namespace w4a16::native
