// Plain 4-bit weights, two per byte, as quantisers write them. Standard C++17 only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace w4a16 {

// The order of plain 4-bit weights in memory. A byte holds two, the first one in the low four bits.
enum class WeightOrder {
  KByN,  // k rows of n, as TensorRT-LLM's quantiser writes them
  NByK,  // n rows of k, one row per output channel
};

// The meaning of four bits: 0 to 15 for -8 to 7, or two's complement.
enum class WeightBits { Unsigned, Signed };

// Returns one byte per weight, 0 to 15, in the order [n, k].
inline std::vector<uint8_t> unpack_weights(const uint8_t* weights, int n, int k, WeightOrder order, WeightBits bits) {
  constexpr int64_t kBlock = 64;  // rows are transposed in blocks that fit into the cache
  const bool transposes = order == WeightOrder::KByN;
  const int64_t rows = transposes ? k : n;
  const int64_t columns = transposes ? n : k;
  const uint8_t flip = bits == WeightBits::Signed ? 0x88 : 0;  // two's complement to offset by 8
  std::vector<uint8_t> values(static_cast<size_t>(rows * columns));
  uint8_t block[kBlock][kBlock];
  for (int64_t top = 0; top < rows; top += kBlock) {
    const int64_t height = std::min(rows - top, kBlock);
    for (int64_t left = 0; left < columns; left += kBlock) {
      const int64_t width = std::min(columns - left, kBlock);  // even, as n and k are
      for (int64_t row = 0; row < height; ++row) {
        const uint8_t* from = weights + ((top + row) * columns + left) / 2;
        for (int64_t column = 0; column < width; column += 2) {
          const uint8_t pair = from[column / 2] ^ flip;
          (transposes ? block[column][row] : block[row][column]) = pair & 15;
          (transposes ? block[column + 1][row] : block[row][column + 1]) = pair >> 4;
        }
      }
      for (int64_t line = 0; line < (transposes ? width : height); ++line) {
        const int64_t at = transposes ? (left + line) * rows + top : (top + line) * columns + left;
        std::copy_n(block[line], transposes ? height : width, values.begin() + at);
      }
    }
  }
  return values;
}

}  // namespace w4a16
