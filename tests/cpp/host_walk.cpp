// Walks every lane of a packed weight through the native kernel's own index maps and dequantisation, on the CPU.
//
// host_walk MODE N K GROUP < packed > fp16 [N rounded up to 64][K rounded up to 128]
// host_walk > a line each without and with zeros: the unit exponents of 16 channels, the largest exponent of scales
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "native/dequantize.cuh"

namespace native = w4a16::native;

template <bool Scales, bool Zeros>
void walk(const w4a16_problem& problem, int mode, const std::vector<uint8_t>& packed, std::vector<half>& weights) {
  const native::PackedLayout layout(problem, mode);
  const int64_t row = int64_t{layout.k_blocks} * native::kBlockK;
  const int zeros_offset = layout.scale_rows * native::kRowBytes;
  const int header = layout.block_bytes - native::kNibbleBytes;
  for (int cb = 0; cb < layout.channel_blocks; ++cb) {
    for (int kb = 0; kb < layout.k_blocks; ++kb) {
      const uint8_t* block = packed.data() + (int64_t{cb} * layout.k_blocks + kb) * layout.block_bytes;
      for (int half_ = 0; half_ < 2; ++half_) {
        for (int thread = 0; thread < 128; ++thread) {
          const int warp = thread / 32, lane = thread % 32;
          uint32_t words[4];
          std::memcpy(words, block + header + native::words_offset(half_, warp, lane), sizeof(words));
          for (int word = 0; word < 4; ++word) {
            half2 pair_of[2]{};
            for (int row = 0; row < (Zeros ? 2 : 1) && Scales; ++row) {
              const int channel = native::nibble_at(half_, warp, lane, word, 0).channel;
              const int offset = native::scale_row(half_, word, layout.scale_rows) * native::kRowBytes +
                                 native::scale_index(channel) * 2;
              std::memcpy(static_cast<void*>(&pair_of[row]), block + row * zeros_offset + offset, sizeof(half2));
            }
            uint32_t fragment[4];
            native::dequantize<Scales, Zeros>(words[word], pair_of[0],
                                              Zeros ? pair_of[1] : native::offset_of(pair_of[0]), fragment);
            for (int position = 0; position < 8; ++position) {
              const native::Nibble at = native::nibble_at(half_, warp, lane, word, position);
              const half2 pair = native::as_half2(fragment[position & 3]);
              const int64_t channel = int64_t{cb} * native::kBlockChannels + at.channel;
              float factor;
              std::memcpy(&factor, packed.data() + layout.channel_factors_offset + channel * sizeof(float),
                          sizeof(float));
              weights[channel * row + int64_t{kb} * native::kBlockK + at.k] =
                  __float2half(factor * __half2float(position >> 2 ? pair.y : pair.x));
            }
          }
        }
      }
    }
  }
}

int main(int count, char** arguments) {
  for (int zeros = 0; zeros < 2 && count == 1; ++zeros) {
    for (int channel = 0; channel < 16; ++channel) std::printf("%d ", native::unit_exponent(channel, zeros != 0));
    std::printf("%d\n", native::max_scale_exponent(zeros != 0));
  }
  if (count == 1) return 0;
  if (count != 5) return 2;
  const int mode = std::atoi(arguments[1]);
  const w4a16_problem problem{0, std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoll(arguments[4])};
  const native::PackedLayout layout(problem, mode);
  std::vector<uint8_t> packed(layout.bytes);
  if (std::fread(packed.data(), 1, packed.size(), stdin) != packed.size() || std::getchar() != EOF) return 3;
  std::vector<half> weights(size_t(layout.channel_blocks) * layout.k_blocks * native::kBlockChannels * native::kBlockK,
                            half(__half_raw{0x7e00}));  // NaN: every weight must be written
  if (mode == W4A16_PER_COLUMN_SCALE_ONLY) walk<false, false>(problem, mode, packed, weights);
  if (mode == W4A16_FINEGRAINED_SCALE_ONLY) walk<true, false>(problem, mode, packed, weights);
  if (mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS) walk<true, true>(problem, mode, packed, weights);
  std::fwrite(weights.data(), 2, weights.size(), stdout);
  return 0;
}
