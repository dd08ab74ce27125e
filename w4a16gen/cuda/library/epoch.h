// Numbers that tell launches apart.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>

namespace w4a16 {

// Returns a number that no other launch has. Uninitialised memory equals it with probability 2^-63.
inline uint64_t next_epoch() {
  static std::atomic<uint64_t> next = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random() | 1;
  }();
  return next.fetch_add(2, std::memory_order_relaxed);
}

}  // namespace w4a16
