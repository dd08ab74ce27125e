// Stands in for native/wgmma_instruction.cuh, for the emulation. WGMMAs happen as late as a wait allows, or earlier.
#pragma once

#include <array>
#include <vector>

#include "native/mma_sync.cuh"

namespace w4a16::native {

inline void wgmma_fence() {}

inline void wgmma_commit() {
  int nothing = 0;
  emulation::meet_as("wgmma.commit_group", 128, nothing, [](int* const*) { emulation::commit_group(128); });
}

template <int Pending>
void wgmma_wait() {
  int nothing = 0;
  emulation::meet_as("wgmma.wait_group", 128, nothing, [](int* const*) { emulation::wait_for_groups(128, Pending); });
}

// An operand in shared memory: [tokens][16], K-major, with 128-byte swizzle.
inline float activation_at(uint64_t descriptor, int token, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address =
      start + static_cast<uint32_t>(token / 8) * stride + static_cast<uint32_t>(token % 8 * 128 + k * 2);
  return half_at(load_at<uint16_t>(swizzled(address)), 0);
}

template <int Tokens>
struct WgmmaInstruction {
  static void run(float (&sum)[Tokens / 2], const uint32_t (&a)[4], uint64_t descriptor, int adds) {
    struct Lane {
      float* sum;
      const uint32_t* weights;
      uint64_t descriptor;
      int adds;
    } mine{sum, a, descriptor, adds};
    emulation::meet_as("wgmma", 128, mine, [](Lane* const* all) {
      std::array<Lane, 128> lanes;
      for (size_t i = 0; i < 128; ++i) lanes[i] = *all[i];
      emulation::add_to_group(128, [lanes] { multiply(lanes); });
    });
  }

 private:
  template <class Lanes>
  static void multiply(const Lanes& lanes) {
    std::vector<float> activations(Tokens * 16);
    for (int token = 0; token < Tokens; ++token) {
      for (int k = 0; k < 16; ++k) {
        activations[static_cast<size_t>(token * 16 + k)] = activation_at(lanes[0].descriptor, token, k);
      }
    }
    for (int warp = 0; warp < 4; ++warp) {
      const uint32_t* fragments[32];
      for (int i = 0; i < 32; ++i) fragments[i] = lanes[static_cast<size_t>(warp * 32 + i)].weights;
      for (int channel = 0; channel < 16; ++channel) {
        float weights[16];
        for (int k = 0; k < 16; ++k) weights[k] = weight_at(fragments, channel, k);
        for (int token = 0; token < Tokens; ++token) {
          double exact = 0;
          for (int k = 0; k < 16; ++k) {
            exact += static_cast<double>(weights[k]) * activations[static_cast<size_t>(token * 16 + k)];
          }
          const auto lane = static_cast<size_t>(warp * 32 + channel % 8 * 4 + token % 8 / 2);
          float& to = lanes[lane].sum[token / 8 * 4 + channel / 8 * 2 + token % 2];
          to = static_cast<float>(lanes[0].adds != 0 ? to + exact : exact);
        }
      }
    }
  }
};

}  // namespace w4a16::native
