// What an SM of compute capability 9.0 has for its CTAs.
#pragma once

namespace w4a16 {

constexpr int kRegistersPerSm = 65536;
constexpr int kRegisterUnit = 8;  // a thread gets a multiple of it
constexpr int kSharedBytesPerSm = 228 * 1024;
constexpr int kReservedSharedBytes = 1024;  // taken by the driver for every CTA on an SM

}  // namespace w4a16
