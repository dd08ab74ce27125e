// Who computes what: which tiles, and which part of K, each CTA works on. Also compiled for the CPU, where a test
// counts that all CTAs together sum every k block of every tile once.
#pragma once

#include "native/shape.h"

namespace w4a16::native {

constexpr int kRasterTokens = 8;  // token tiles that are swept together over all channels, to share L2

// What is to be divided among the CTAs.
struct Tiling {
  int k_blocks;
  int channel_tiles;  // of a whole cluster
  int token_tiles;
  int last_token;  // where the last token tile starts: if it overlaps the one before, where the tokens end with it
  int share;       // of stream-K: k blocks of a CTA, and one more of the first few
  int longer_shares;
};

// One output tile, and the range of k blocks that this CTA sums.
struct Tile {
  int channel_block;
  int token;
  int first_block;
  int blocks;
};

// Which tiles a CTA works on, and its rank in its cluster. Of stream-K also the number of its share, which begins and
// ends within its first and its last tile.
struct Work {
  int first_tile;
  int tile_step;
  int end_tile;
  int rank;
  int share;
  int first_block;
  int end_block;
};

// The first k block of a share, counted over all tiles one after the other.
W4A16_HOST_DEVICE inline int share_begin(const Tiling& tiling, int share) {
  return share * tiling.share + min_of(share, tiling.longer_shares);
}

// How many CTAs a dependent launch has. Where SMs hold two and two grids fit at once, every SM gets one: those without
// work of their own repeat others' and store nothing. Otherwise two CTAs of the next launch meet on an SM that this one
// left empty, and take twice as long. What they read of the weights is in L2, or on its way there.
template <class S>
int filled(int ctas, int clusters_at_once) {
  const int one_each = clusters_at_once / S::CtasPerSm * S::ClusterSize;
  return S::Repeats && ctas < one_each && one_each < 2 * ctas ? one_each : ctas;
}

template <class S>
W4A16_HOST_DEVICE inline bool is_repeat(const Tiling& tiling, int cta) {
  return S::Repeats && cta / S::ClusterSize >= tiling.channel_tiles * tiling.token_tiles;
}

template <class S>
W4A16_HOST_DEVICE inline Work work_of(const Tiling& tiling, int cta, int ctas, int rank) {
  if constexpr (S::StreamK) {
    // A CTA waits for sums of the shares after its own: they are those of CTAs that started before it.
    const int share = ctas - 1 - cta;
    const int begin = share_begin(tiling, share);
    const int end = share_begin(tiling, share + 1);
    const int first = begin / tiling.k_blocks;
    const int last = (end - 1) / tiling.k_blocks;
    return {first, 1, last + 1, 0, share, begin - first * tiling.k_blocks, end - last * tiling.k_blocks};
  } else {
    const int tiles = tiling.channel_tiles * tiling.token_tiles;
    const int cluster = cta / S::ClusterSize;
    return {is_repeat<S>(tiling, cta) ? cluster - tiles : cluster, ctas / S::ClusterSize, tiles, rank, 0, 0, 0};
  }
}

// The tile that a CTA computes when its cluster works on tile `index`.
template <class S>
W4A16_HOST_DEVICE inline Tile tile_at(const Tiling& tiling, const Work& work, int index) {
  int first = 0;
  int blocks = tiling.k_blocks;
  int channel_tile = index;
  int token_tile = 0;
  if constexpr (S::StreamK) {
    if (index == work.first_tile) first = work.first_block;
    blocks = (index == work.end_tile - 1 ? work.end_block : tiling.k_blocks) - first;
    // Token tiles in turn: CTAs a part of the grid apart then meet the same weights at about the same time.
    if (tiling.token_tiles > 1) {
      token_tile = index / tiling.channel_tiles;
      channel_tile = index - token_tile * tiling.channel_tiles;
    }
  } else {
    if constexpr (S::ClusterK > 1) {
      first = tiling.k_blocks * work.rank / S::ClusterK;
      blocks = tiling.k_blocks * (work.rank + 1) / S::ClusterK - first;
    }
    // Divisions cost hundreds of cycles before the first copy: with few tokens there is nothing to divide.
    if (tiling.token_tiles > 1) {
      const int per_sweep = kRasterTokens * tiling.channel_tiles;
      const int sweep = index / per_sweep;
      const int within = index - sweep * per_sweep;
      const int tokens = min_of(tiling.token_tiles - sweep * kRasterTokens, kRasterTokens);
      channel_tile = within / tokens;
      token_tile = sweep * kRasterTokens + within - channel_tile * tokens;
    }
    if constexpr (S::Multicasts) {
      channel_tile = channel_tile * S::ClusterChannels + work.rank % S::ClusterChannels;
      token_tile = token_tile * S::ClusterTokens + work.rank / S::ClusterChannels;
    }
  }
  int token = token_tile * S::Tokens;
  if constexpr (S::OverlapsTokens) token = min_of(token, tiling.last_token);
  return {channel_tile * S::Blocks, token, first, blocks};
}

// Divides a problem among as many CTAs as run at once, and returns how many there is work for.
template <class S>
int divide(Tiling* tiling, int64_t m, int channel_blocks, int k_blocks, int clusters_at_once) {
  const auto tiles_of = [](int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); };
  tiling->k_blocks = k_blocks;
  tiling->channel_tiles = tiles_of(channel_blocks, S::Blocks * S::ClusterChannels);
  tiling->token_tiles = tiles_of(m, int64_t{S::Tokens} * S::ClusterTokens);
  int64_t parts = int64_t{tiling->channel_tiles} * tiling->token_tiles;
  if (S::StreamK) parts *= k_blocks;
  if (parts > INT32_MAX) return 0;
  const bool overlaps = m > S::Tokens && (S::AvoidsAbsentTokens || parts <= clusters_at_once);
  tiling->last_token = overlaps ? static_cast<int>(m - S::Tokens) : (tiling->token_tiles - 1) * S::Tokens;
  const int clusters = parts < clusters_at_once ? static_cast<int>(parts) : clusters_at_once;
  tiling->share = static_cast<int>(parts) / clusters;
  tiling->longer_shares = static_cast<int>(parts) % clusters;
  return clusters * S::ClusterSize;
}

}  // namespace w4a16::native
