// Which tiles, and which part of K, each CTA works on. The functions also compile for the CPU: tests/cpp/host_tiles.cpp
// counts that all CTAs together sum every k block of every tile once.
#pragma once

#include "native/shape.h"

namespace w4a16::native {

constexpr int kRasterTokens = 8;  // token tiles that are swept together over all channels, to share L2

// How a problem is divided among CTAs.
struct Tiling {
  int k_blocks;
  int channel_tiles;  // of a whole cluster
  int token_tiles;
  int last_token;    // first token of the last tile, which may overlap the previous tile
  int unit_blocks;   // stream-K: k blocks of a work unit
  int longer_units;  // stream-K: how many units, from the first on, have one more
};

// One output tile, and the range of k blocks that this CTA sums.
struct Tile {
  int channel_block;
  int token;
  int first_block;
  int blocks;
};

// The tiles of a CTA, and its rank in its cluster. Under stream-K also its work unit, which begins and ends within the
// first and the last tile.
struct Work {
  int first_tile;
  int tile_step;
  int end_tile;
  int rank;
  int unit;
  int first_block;
  int end_block;
};

// The first k block of a stream-K work unit, counted over all tiles.
W4A16_HOST_DEVICE inline int unit_begin(const Tiling& tiling, int unit) {
  return unit * tiling.unit_blocks + min_of(unit, tiling.longer_units);
}

// The grid of a dependent launch. Where two CTAs share an SM and two grids fit at once, the grid is padded with
// redundant CTAs, which compute a tile again and store nothing, so that every SM gets one. Otherwise the next launch
// may place two CTAs on an SM that this one left idle, which doubles their time.
template <class S>
int padded_grid(int ctas, int clusters_at_once) {
  const int one_per_sm = clusters_at_once / S::CtasPerSm * S::ClusterSize;
  return S::PadsGrid && ctas < one_per_sm && one_per_sm < 2 * ctas ? one_per_sm : ctas;
}

template <class S>
W4A16_HOST_DEVICE inline bool is_redundant_cta(const Tiling& tiling, int cta) {
  return S::PadsGrid && cta / S::ClusterSize >= tiling.channel_tiles * tiling.token_tiles;
}

// Schedulers, by the names that kernels have. A scheduler says whether it splits tiles along K, how many parts a
// problem has that can be given to different CTAs, what work a CTA has, and which tile it computes at a step.
namespace scheduler {

// One wave of CTAs, each of which computes several whole tiles.
struct persistent {
  static constexpr bool kSplitsTiles = false;

  static int64_t parts(int64_t tiles, int) { return tiles; }

  template <class S>
  W4A16_HOST_DEVICE static Work work_of(const Tiling& tiling, int cta, int ctas, int rank) {
    const int tiles = tiling.channel_tiles * tiling.token_tiles;
    const int cluster = cta / S::ClusterSize;
    return {is_redundant_cta<S>(tiling, cta) ? cluster - tiles : cluster, ctas / S::ClusterSize, tiles, rank, 0, 0, 0};
  }

  template <class S>
  W4A16_HOST_DEVICE static Tile tile_at(const Tiling& tiling, const Work& work, int index) {
    int first = 0;
    int blocks = tiling.k_blocks;
    int channel_tile = index;
    int token_tile = 0;
    if constexpr (S::ClusterK > 1) {
      first = tiling.k_blocks * work.rank / S::ClusterK;
      blocks = tiling.k_blocks * (work.rank + 1) / S::ClusterK - first;
    }
    // A division takes hundreds of cycles before the first copy, and one token tile needs none.
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
    int token = token_tile * S::Tokens;
    if constexpr (S::OverlapsLastTile) token = min_of(token, tiling.last_token);
    return {channel_tile * S::Blocks, token, first, blocks};
  }
};

// All CTAs get an equal number of k blocks, one work unit each. A unit may begin and end within a tile.
struct streamk {
  static constexpr bool kSplitsTiles = true;

  static int64_t parts(int64_t tiles, int k_blocks) { return tiles * k_blocks; }

  template <class S>
  W4A16_HOST_DEVICE static Work work_of(const Tiling& tiling, int cta, int ctas, int) {
    // A CTA waits for sums of the units after its own. They belong to CTAs that started before it.
    const int unit = ctas - 1 - cta;
    const int begin = unit_begin(tiling, unit);
    const int end = unit_begin(tiling, unit + 1);
    const int first = begin / tiling.k_blocks;
    const int last = (end - 1) / tiling.k_blocks;
    return {first, 1, last + 1, 0, unit, begin - first * tiling.k_blocks, end - last * tiling.k_blocks};
  }

  template <class S>
  W4A16_HOST_DEVICE static Tile tile_at(const Tiling& tiling, const Work& work, int index) {
    int first = 0;
    int channel_tile = index;
    int token_tile = 0;
    if (index == work.first_tile) first = work.first_block;
    const int blocks = (index == work.end_tile - 1 ? work.end_block : tiling.k_blocks) - first;
    // Token tiles in turn: CTAs a part of the grid apart then read the same weights at about the same time.
    if (tiling.token_tiles > 1) {
      token_tile = index / tiling.channel_tiles;
      channel_tile = index - token_tile * tiling.channel_tiles;
    }
    int token = token_tile * S::Tokens;
    if constexpr (S::OverlapsLastTile) token = min_of(token, tiling.last_token);
    return {channel_tile * S::Blocks, token, first, blocks};
  }
};

}  // namespace scheduler

template <class S>
W4A16_HOST_DEVICE inline Work work_of(const Tiling& tiling, int cta, int ctas, int rank) {
  return S::Scheduler::template work_of<S>(tiling, cta, ctas, rank);
}

// The tile that a CTA computes when its cluster works on tile `index`.
template <class S>
W4A16_HOST_DEVICE inline Tile tile_at(const Tiling& tiling, const Work& work, int index) {
  return S::Scheduler::template tile_at<S>(tiling, work, index);
}

// Divides a problem among the CTAs that run at once. Returns how many CTAs have work, or 0 if the problem is too large.
template <class S>
int make_tiling(Tiling* tiling, int64_t m, int channel_blocks, int k_blocks, int clusters_at_once) {
  const auto tiles_of = [](int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); };
  tiling->k_blocks = k_blocks;
  tiling->channel_tiles = tiles_of(channel_blocks, S::Blocks * S::ClusterChannels);
  tiling->token_tiles = tiles_of(m, int64_t{S::Tokens} * S::ClusterTokens);
  const int64_t parts = S::Scheduler::parts(int64_t{tiling->channel_tiles} * tiling->token_tiles, k_blocks);
  if (parts > INT32_MAX) return 0;
  const bool overlaps = m > S::Tokens && (S::SkipsOutOfBoundsRows || parts <= clusters_at_once);
  tiling->last_token = overlaps ? static_cast<int>(m - S::Tokens) : (tiling->token_tiles - 1) * S::Tokens;
  const int clusters = parts < clusters_at_once ? static_cast<int>(parts) : clusters_at_once;
  tiling->unit_blocks = static_cast<int>(parts) / clusters;
  tiling->longer_units = static_cast<int>(parts) % clusters;
  return clusters * S::ClusterSize;
}

}  // namespace w4a16::native
