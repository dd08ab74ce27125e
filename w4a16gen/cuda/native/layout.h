// Layout `fragment_blocks_v2` of target `native`: weights in the order of WGMMA's register fragments.
//
// A block holds 64 channels x 128 k and is contiguous, so that one bulk copy fetches it: scale rows, then zero rows,
// then 4096 bytes of nibbles. The blocks of 64 channels follow one another along k. Channels are padded to a multiple
// of 64 and k to a multiple of 128, with nibbles of 8, which stand for weights of 0. One fp32 factor per channel
// follows the blocks. w4a16gen/weights/layouts/fragments.py and native/pack.cuh write this layout; tests compare their
// sizes and contents.
#pragma once

#include <cstddef>
#include <cstdint>

#include "w4a16.h"

#if defined(__CUDACC__)
#define W4A16_HOST_DEVICE __host__ __device__
#else
#define W4A16_HOST_DEVICE
#endif

namespace w4a16::native {

constexpr char kLayout[] = "fragment_blocks_v2";
constexpr char kGatedLayout[] = "fragment_blocks_v2_gated";  // the same, of gates and their factors, interleaved
constexpr int kBlockChannels = 64;
constexpr int kBlockK = 128;
constexpr int kNibbleBytes = kBlockChannels * kBlockK / 2;
constexpr int kRowBytes = kBlockChannels * 2;  // one fp16 per channel
constexpr int kMaxScaleRows = 4;               // one per 32 of k
constexpr int kGroupMultiple = 32;

// The place of a nibble. A thread of a warpgroup reads 16 bytes per 64 k: four words, each its A fragment of one m64k16
// step (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"). With row = lane / 4 and pair = lane % 4, the
// fragment holds channels row and row + 8 of the warp's 16, at k 2 * pair, + 1, + 8 and + 9.
struct Nibble {
  int channel;  // within the block
  int k;        // within the block
};

// `half` selects 64 of the block's k, `word` a k16 step in them, and `position` a nibble of the word: bit 0 stands for
// the channel + 8, bit 1 for k + 8, bit 2 for odd k. The two values of an fp16 pair are therefore 16 bits apart.
W4A16_HOST_DEVICE constexpr Nibble nibble_at(int half, int warp, int lane, int word, int position) {
  const int channel = 16 * warp + lane / 4 + 8 * (position & 1);
  const int k = 64 * half + 16 * word + 2 * (lane % 4) + 8 * (position >> 1 & 1) + (position >> 2);
  return {channel, k};
}

// The bit of its word at which nibble `position` starts. The word is rotated left by 3 bits. The nibbles of two
// positions, and after rotating right by 8 those of the other two, then start at bits 3 and 7 of their fp16 halves.
W4A16_HOST_DEVICE constexpr int bit_of(int position) { return 4 * position + 3; }  // bit 31 continues at bit 0

// The unit of a channel's nibbles. An fp16 whose upper bits are 0 equals its lower 11 bits times 2^-24. A nibble at bit
// 3 is therefore exactly q * 2^-21, one at bit 7 exactly q * 2^-17. Channels with bit 3 of their number clear are at
// bit 3, the others at bit 7. In the mode with zeros an instruction scales to units 2^15 times as large.
W4A16_HOST_DEVICE constexpr int unit_exponent(int channel, bool zeros) {
  return (channel / 8 % 2 == 0 ? -21 : -17) + (zeros ? 15 : 0);
}

// Packed scales are divided by their channel's unit. If a channel's largest scale is 2^(this value) or more, its scales
// and zeros are also divided by a power of two, which the channel's factor contains, so that none overflows.
W4A16_HOST_DEVICE constexpr int max_scale_exponent(bool zeros) { return zeros ? 10 : -5; }

// The byte offset of a thread's four words in a block's nibbles.
W4A16_HOST_DEVICE constexpr int words_offset(int half, int warp, int lane) {
  return half * (kNibbleBytes / 2) + (warp * 32 + lane) * 16;
}

// The index of a channel in a row of scales. A pair (channel, channel + 8), which one thread needs, shares a word.
W4A16_HOST_DEVICE constexpr int scale_index(int channel) {
  return channel / 16 * 16 + channel % 8 * 2 + channel / 8 % 2;
}

// The scale row of a k16 step. A row stands for 32, 64 or 128 values of k.
W4A16_HOST_DEVICE constexpr int scale_row(int half, int word, int rows) { return (2 * half + word / 2) * rows / 4; }

// The channel of a canonical weight with n channels that is packed as `channel` for gated activations: 8 gates, then
// their 8 factors, which a thread has as its lower and its upper channel. Gates come first in a canonical weight.
W4A16_HOST_DEVICE constexpr int gated_source(int channel, int n) {
  return channel / 8 % 2 * (n / 2) + channel / 16 * 8 + channel % 8;
}

struct PackedLayout {
  int channel_blocks;
  int k_blocks;
  int scale_rows;  // per block: 1 if groups are multiples of 128, 2 of 64, 4 of 32
  int block_bytes;
  size_t channel_factors_offset;  // fp32 [channels], padded to 64: scale / unit in per-column mode, or 2^exponent
  size_t bytes;

  PackedLayout(const w4a16_problem& problem, int mode) {
    channel_blocks = static_cast<int>((problem.n + kBlockChannels - 1) / kBlockChannels);
    k_blocks = static_cast<int>((problem.k + kBlockK - 1) / kBlockK);
    const int64_t group = problem.group_size;
    scale_rows = group == problem.k || group % 128 == 0 ? 1 : group % 64 == 0 ? 2 : 4;
    if (mode == W4A16_PER_COLUMN_SCALE_ONLY) scale_rows = 0;
    block_bytes = kNibbleBytes + scale_rows * kRowBytes * (mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS ? 2 : 1);
    channel_factors_offset = static_cast<size_t>(channel_blocks) * static_cast<size_t>(k_blocks) * block_bytes;
    bytes = channel_factors_offset + static_cast<size_t>(channel_blocks) * kBlockChannels * sizeof(float);
  }
};

}  // namespace w4a16::native
