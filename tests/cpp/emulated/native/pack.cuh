// Stands in for native/pack.cuh: the emulation packs on the host.
#pragma once

#include "library/kernel.h"

namespace w4a16::native {

template <int Mode>
cudaError_t pack(const Problem&, const w4a16_pack_arguments&) {
  return cudaErrorNotSupported;
}

}  // namespace w4a16::native
