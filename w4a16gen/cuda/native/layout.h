// Layout `fragment_blocks_v2`, which target `native` reads: weights in the order of WGMMA's register fragments.
//
// One block holds 64 channels x 128 k, contiguous, so that one bulk copy fetches it: first its scale rows, then its
// zero rows, then 4096 bytes of nibbles. The blocks of 64 channels follow one another along k; channels are padded to
// 64, k to 128, with nibbles of 8, which are weights of 0. After all blocks comes one fp32 factor per channel.
// weights/layouts/fragments.py and native/pack.cuh write the same layout.
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
constexpr int kBlockChannels = 64;
constexpr int kBlockK = 128;
constexpr int kNibbleBytes = kBlockChannels * kBlockK / 2;
constexpr int kRowBytes = kBlockChannels * 2;  // one fp16 per channel
constexpr int kMaxScaleRows = 4;               // one per 32 of k
constexpr int kGroupMultiple = 32;

// Where a nibble lies. A thread of a warpgroup reads 16 bytes per 64 k: four words, each its A fragment of one m64k16
// step (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"): with row = lane / 4 and pair = lane % 4, the
// fragment holds channels row and row + 8 of the warp's 16, at k 2 * pair, + 1, + 8 and + 9.
struct Nibble {
  int channel;  // within the block
  int k;        // within the block
};

// `half` is which 64 of the block's k, `word` which k16 step of them, `position` which nibble of the word: bit 0 is the
// channel + 8, bit 1 the k + 8, bit 2 the odd k. So the two values of an fp16 pair lie 16 bits apart.
W4A16_HOST_DEVICE constexpr Nibble nibble_at(int half, int warp, int lane, int word, int position) {
  const int channel = 16 * warp + lane / 4 + 8 * (position & 1);
  const int k = 64 * half + 16 * word + 2 * (lane % 4) + 8 * (position >> 1 & 1) + (position >> 2);
  return {channel, k};
}

// Where nibble `position` starts in its word, which is turned left by 3 bits: so the nibbles of two positions, and
// after turning the word right by 8 those of the other two, lie where kLowUnit and kHighUnit say what they are worth.
W4A16_HOST_DEVICE constexpr int bit_of(int position) { return 4 * position + 3; }  // 31 goes on at bit 0

// An fp16 whose other bits are 0 is its bits' integer times 2^-24, up to 11 bits: subnormal, or of the smallest normal
// exponent. A nibble at bit 3 is therefore q * 2^-21, one at bit 7 q * 2^-17, exactly. Channels with bit 3 of their
// number clear lie at bit 3, the others at bit 7. What follows works in these units, or with zeros, where there is an
// instruction to do so, in units 2^15 times as large.
W4A16_HOST_DEVICE constexpr int unit_exponent(int channel, bool zeros) {
  return (channel / 8 % 2 == 0 ? -21 : -17) + (zeros ? 15 : 0);
}

// Scales are packed divided by their channel's unit. So that they do not overflow, scales from 2^this on are divided by
// a power of two as well, with all scales and zeros of their channel; the channel's factor makes that good.
W4A16_HOST_DEVICE constexpr int max_scale_exponent(bool zeros) { return zeros ? 10 : -5; }

// Byte offset, within a block's nibbles, of the four words of one thread.
W4A16_HOST_DEVICE constexpr int words_offset(int half, int warp, int lane) {
  return half * (kNibbleBytes / 2) + (warp * 32 + lane) * 16;
}

// A row of scales holds the pair (channel, channel + 8) that one thread needs in one word.
W4A16_HOST_DEVICE constexpr int scale_index(int channel) {
  return channel / 16 * 16 + channel % 8 * 2 + channel / 8 % 2;
}

// The row of a block's scales that belongs to one k16 step: rows hold groups of 32, 64, or 128 k and more.
W4A16_HOST_DEVICE constexpr int scale_row(int half, int word, int rows) { return (2 * half + word / 2) * rows / 4; }

struct PackedLayout {
  int channel_blocks;
  int k_blocks;
  int scale_rows;  // per block: one per group of 128 k or more, two of 64, four of 32
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
