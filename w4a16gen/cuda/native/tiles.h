// Which tiles, and which part of K, each CTA works on. The functions also compile for the CPU: tests/cpp/host_tiles.cpp
// counts that all CTAs together sum every k block of every tile once.
#pragma once

#include "native/shape.h"

namespace w4a16::native {

constexpr int64_t kL2Bytes = 50'000'000;
constexpr int kRasterTokens = 8;              // token tiles that are swept together over all channels, to share L2
constexpr int kMostTiles = INT32_MAX - 4096;  // CTAs step past the last tile, by fewer than this

// Divides numbers below 2^31 by a positive one that the host knows. A multiplication and a shift take a few cycles; a
// division takes about 150, before the first copy of a launch (Granlund and Montgomery, "Division by invariant integers
// using multiplication", 1994, figure 4.1).
struct Divisor {
  uint32_t multiplier;
  int shift;

  static Divisor of(int number) {
    const auto divisor = static_cast<uint32_t>(number);
    int shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - divisor;
    return {static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
  }

  W4A16_HOST_DEVICE int quotient(int number) const {
    const auto dividend = static_cast<uint32_t>(number);
    const auto product = static_cast<uint32_t>(uint64_t{dividend} * multiplier >> 32);
    return static_cast<int>((product + dividend) >> shift);
  }
};

// How a problem is divided among CTAs. The first copies of a launch wait for the members up to `by_channel_tiles`,
// which come together: a line of constants takes 150 cycles to arrive.
struct Tiling {
  int k_blocks;
  int channel_tiles;  // of a whole cluster
  int token_tiles;
  int last_token;         // no tile begins later: the last one may overlap the previous one
  Divisor by_sweep;       // the tiles of kRasterTokens token tiles
  Divisor by_last_sweep;  // the token tiles of the last sweep
  Divisor by_channel_tiles;
  int split_tiles;   // stream-K: how many tiles, from the first on, are divided among clusters
  int heads;         // stream-K: how many of them have a cluster that sums their heads. All of them, or none
  int head_blocks;   // stream-K: k blocks of a head, 0 without heads
  int tail_blocks;   // stream-K: the other k blocks of a tile
  int unit_blocks;   // stream-K: k blocks of a work unit of tails
  int longer_units;  // stream-K: how many of them, from the first on, have one more
  int clusters;      // that have work
  Divisor by_tail_blocks;
  Divisor by_unit;                   // stream-K: by unit_blocks
  Divisor by_longer_unit;            // stream-K: by one more
  Divisor by_clusters;               // grouped
  int rotation;                      // grouped: see rotation_of
  Divisor by_tokens[kRasterTokens];  // grouped: by 1 and more token tiles
};

// By how many places clusters move on from one wave of a grouped product's tiles to the next. An expert's last tile
// takes less time than its others. With a prime number of places from tile to tile no cluster has the same tile of each
// expert.
constexpr int rotation_of(int clusters) {
  const auto is_prime = [](int number) {
    for (int divisor = 2; divisor * divisor <= number; ++divisor) {
      if (number % divisor == 0) return false;
    }
    return true;
  };
  int places = clusters;
  while (!is_prime(places)) ++places;
  return (places - clusters) % clusters;
}

// One output tile, and the range of k blocks that this CTA sums.
struct Tile {
  int channel_block;
  int token;
  int first_block;
  int blocks;
  int expert = 0;     // grouped: whose weights it needs
  int end_token = 0;  // grouped: the first token of the next expert
};

// An entry of a grouped product's list, which has one for each token tile. All entries of an expert are equal.
struct alignas(16) TokenTile {
  int expert;
  int first_entry;  // of this expert
  int first_token;  // of this expert
  int end_token;
};

// The list of a grouped product. Its memory has room for max_token_tiles entries.
struct alignas(16) TokenTiles {
  int count;
  TokenTile first;
};

// The tiles of a CTA, from the first to the end, and its rank in its cluster. Under stream-K also its work unit.
struct Work {
  int first_tile;
  int tile_step;  // of persistent kernels
  int end_tile;
  int rank;
  int unit;
  int first_expert = 0;  // grouped, of unsorted routes: that of the first tile
};

static_assert(sizeof(TokenTile) == kTokenTileBytes && sizeof(TokenTiles) == 2 * kTokenTileBytes,
              "the library knows the size of the list");

// The coordinates of a tile of clusters.
struct Place {
  int channel;
  int token;
};

// A sweep covers all channels for a few token tiles, which share activations and weights in L2.
W4A16_HOST_DEVICE inline Place place_in_sweeps(const Tiling& tiling, int token_tiles, const Divisor& by_last_sweep,
                                               int tile) {
  const int sweep = tiling.by_sweep.quotient(tile);
  const int within = tile - sweep * kRasterTokens * tiling.channel_tiles;
  const int tokens = min_of(token_tiles - sweep * kRasterTokens, kRasterTokens);
  const int of_full_sweep = static_cast<int>(static_cast<uint32_t>(within) / kRasterTokens);  // without a sign: a shift
  const int channel = tokens == kRasterTokens ? of_full_sweep : by_last_sweep.quotient(within);
  return {channel, sweep * kRasterTokens + within - channel * tokens};
}

// How many token tiles the last sweep has.
W4A16_HOST_DEVICE constexpr int tokens_of_last_sweep(int token_tiles) { return (token_tiles - 1) % kRasterTokens + 1; }

// The first k block of a stream-K work unit of tails, counted over the tails of all split tiles.
W4A16_HOST_DEVICE inline int unit_begin(const Tiling& tiling, int unit) {
  const int of_tails = unit - tiling.heads;
  return of_tails * tiling.unit_blocks + min_of(of_tails, tiling.longer_units);
}

// The stream-K work unit of tails that has a k block.
W4A16_HOST_DEVICE inline int unit_of(const Tiling& tiling, int block) {
  const int after = block - tiling.longer_units * (tiling.unit_blocks + 1);
  if (after < 0) return tiling.heads + tiling.by_longer_unit.quotient(block);
  return tiling.heads + tiling.longer_units + tiling.by_unit.quotient(after);
}

// The unit's partial sums of a split tile have this place among all. A unit of tails may give away sums of several
// tiles if these have heads, and otherwise of one.
W4A16_HOST_DEVICE inline int slot_of(const Tiling& tiling, int unit, int index) {
  return tiling.heads > 0 ? unit - tiling.heads + index : unit;
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
  static constexpr bool kGroups = false;

  static int64_t parts(int64_t tiles, int) { return tiles; }

  static void split(Tiling* tiling, int, int clusters, bool) { tiling->clusters = clusters; }

  template <class S>
  W4A16_HOST_DEVICE static Work work_of(const Tiling& tiling, int cta, int ctas, int rank) {
    const int tiles = tiling.channel_tiles * tiling.token_tiles;
    const int cluster = cta / S::ClusterSize;
    const int first = is_redundant_cta<S>(tiling, cta) ? cluster - tiles : cluster;
    return {first, ctas / S::ClusterSize, tiles, rank, 0};
  }

  W4A16_HOST_DEVICE static int next_tile(const Tiling&, const Work& work, int tile) { return tile + work.tile_step; }

  template <class S>
  W4A16_HOST_DEVICE static Tile tile_at(const Tiling& tiling, const Work& work, int index) {
    return tile_among<S>(tiling, tiling.token_tiles, tiling.by_last_sweep, work, index);
  }

  // The same among a number of token tiles.
  template <class S>
  W4A16_HOST_DEVICE static Tile tile_among(const Tiling& tiling, int token_tiles, const Divisor& by_last_sweep,
                                           const Work& work, int index) {
    int first = 0;
    int blocks = tiling.k_blocks;
    int channel_tile = index;
    int token_tile = 0;
    if constexpr (S::ClusterK > 1) {
      first = tiling.k_blocks * work.rank / S::ClusterK;
      blocks = tiling.k_blocks * (work.rank + 1) / S::ClusterK - first;
    }
    if (token_tiles > 1) {
      const Place place = place_in_sweeps(tiling, token_tiles, by_last_sweep, index);
      channel_tile = place.channel;
      token_tile = place.token;
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

// Whole waves of whole tiles. The rest, fewer tiles than clusters, is divided along K so that no cluster is idle. What
// a cluster divides with others is its work unit. The cluster with a tile's first k block adds the sums of later units,
// and stores the tile.
//
// Usually the rest and the tiles of one whole wave are divided equally. Two clusters at most share a tile, unless there
// are fewer tiles than clusters. Units come before whole tiles: a cluster that waits for sums of others then waits for
// what they did first.
//
// The units begin at different places of K. If L2 cannot keep the operands, each unit then reads them from memory. So
// other units are formed: each tile of the rest has a cluster that sums its head, the first k blocks. All heads have
// the same length. The other clusters sum equal numbers of k blocks of tails, one tail after the other. Whole tiles
// come first: all clusters are at the same place of K, and later those with heads. If a short tile of the rest had very
// many clusters, adding their sums would take longer than this saves.
struct streamk {
  static constexpr bool kSplitsTiles = true;
  static constexpr bool kGroups = false;
  static constexpr int kBlocksOfSums = 3;  // k blocks that take as long as handing over the sums of a tail

  static constexpr int most_clusters_per_head(int k_blocks) { return max_of(3, k_blocks / 16); }

  static int64_t parts(int64_t tiles, int k_blocks) { return tiles * k_blocks; }

  // Divides tiles among some clusters. Fewer have work if the heads leave fewer k blocks than there are other clusters.
  static void split(Tiling* tiling, int tiles, int clusters, bool fits_l2) {
    const int rest = tiles % clusters;
    const int k_blocks = tiling->k_blocks;
    if (fits_l2 || int64_t{rest} * most_clusters_per_head(k_blocks) < clusters) {
      tiling->split_tiles = rest == 0 || tiles < clusters ? rest : clusters + rest;
    } else {
      tiling->split_tiles = tiling->heads = rest;
      const int64_t share = (int64_t{rest} * (k_blocks + kBlocksOfSums) + clusters - 1) / clusters;
      tiling->head_blocks = static_cast<int>(min_of(share, int64_t{k_blocks}));
    }
    tiling->tail_blocks = k_blocks - tiling->head_blocks;
    const int tails = tiling->split_tiles * tiling->tail_blocks;
    if (tiles < clusters) clusters = min_of(clusters, tiling->heads + tails);
    tiling->clusters = clusters;
    const int units = clusters - tiling->heads;
    if (units > 0) {
      tiling->unit_blocks = tails / units;
      tiling->longer_units = tails % units;
    }
  }

  // The first tile that a cluster divides with others. Without one, no tile.
  W4A16_HOST_DEVICE static int first_split(const Tiling& tiling, int unit, int end_tile) {
    if (unit < tiling.heads) return unit;
    const int begin = unit_begin(tiling, unit);
    return begin < unit_begin(tiling, unit + 1) ? tiling.by_tail_blocks.quotient(begin) : end_tile;
  }

  template <class S>
  W4A16_HOST_DEVICE static Work work_of(const Tiling& tiling, int cta, int, int rank) {
    const int cluster = cta / S::ClusterSize;
    // A cluster waits for sums of the units after its own. They belong to clusters that started before it.
    const int unit = tiling.clusters - 1 - cluster;
    const int tiles = tiling.channel_tiles * tiling.token_tiles;
    const int whole = tiling.split_tiles + cluster;
    const bool begins_whole = tiling.split_tiles == 0 || (tiling.heads > 0 && whole < tiles);
    return {begins_whole ? whole : first_split(tiling, unit, tiles), 1, tiles, rank, unit};
  }

  W4A16_HOST_DEVICE static int next_tile(const Tiling& tiling, const Work& work, int tile) {
    if (tile >= tiling.split_tiles) {
      const int next = tile + tiling.clusters;
      return tiling.heads > 0 && next >= work.end_tile ? first_split(tiling, work.unit, work.end_tile) : next;
    }
    const int next = tile + 1;
    if (work.unit >= tiling.heads && next * tiling.tail_blocks < unit_begin(tiling, work.unit + 1)) return next;
    return tiling.heads > 0 ? work.end_tile : tiling.split_tiles + tiling.clusters - 1 - work.unit;
  }

  template <class S>
  W4A16_HOST_DEVICE static Tile tile_at(const Tiling& tiling, const Work& work, int index) {
    int first = 0;
    int end = tiling.k_blocks;
    if (index < tiling.split_tiles) {
      if (work.unit < tiling.heads) {
        end = tiling.head_blocks;
      } else {
        const int before = index * tiling.tail_blocks - tiling.head_blocks;
        first = max_of(unit_begin(tiling, work.unit) - before, tiling.head_blocks);
        end = min_of(unit_begin(tiling, work.unit + 1) - before, end);
      }
    }
    int channel_tile = index;
    int token_tile = 0;
    if (tiling.token_tiles > 1) {
      Place place = place_in_sweeps(tiling, tiling.token_tiles, tiling.by_last_sweep, index);
      if (tiling.heads == 0 && tiling.split_tiles == tiling.channel_tiles * tiling.token_tiles) {
        // Token tiles in turn: clusters a part of the grid apart then read the same weights at about the same time.
        place.token = tiling.by_channel_tiles.quotient(index);
        place.channel = index - place.token * tiling.channel_tiles;
      }
      channel_tile = place.channel;
      token_tile = place.token;
    }
    if constexpr (S::Multicasts) {
      channel_tile = channel_tile * S::ClusterChannels + work.rank % S::ClusterChannels;
      token_tile = token_tile * S::ClusterTokens + work.rank / S::ClusterChannels;
    }
    return {channel_tile * S::Blocks, token_tile * S::Tokens, first, end - first};
  }
};

// One wave of CTAs, each of which computes several whole tiles of several experts' products. A list on the device says
// which token tiles there are, and how many.
struct grouped {
  static constexpr bool kSplitsTiles = false;
  static constexpr bool kGroups = true;

  static int64_t parts(int64_t tiles, int) { return tiles; }

  static void split(Tiling* tiling, int, int clusters, bool) { tiling->clusters = clusters; }

  template <class S>
  W4A16_HOST_DEVICE static Work work_of(const Tiling& tiling, int cta, int, int rank, int token_tiles) {
    return {cta / S::ClusterSize, 0, tiling.channel_tiles * token_tiles, rank, 0};
  }

  // The entry of a CTA's first tile, if it has one. It lies in the memory of the list in any case.
  template <class S>
  W4A16_HOST_DEVICE static const TokenTile* first_entry(const Tiling& tiling, int cta, const TokenTiles& list) {
    return &list.first + tiling.by_channel_tiles.quotient(cta / S::ClusterSize);
  }

  W4A16_HOST_DEVICE static int next_tile(const Tiling& tiling, const Work&, int tile) {
    const int next_wave = (tiling.by_clusters.quotient(tile) + 1) * tiling.clusters;
    const int place = tile + tiling.clusters - next_wave + tiling.rotation;
    return next_wave + (place < tiling.clusters ? place : place - tiling.clusters);
  }

  // An expert's tiles follow one another, in sweeps as in an ordinary product: its weights are read once.
  template <class S>
  W4A16_HOST_DEVICE static Tile tile_at(const Tiling& tiling, const Work& work, int index, const TokenTiles& list) {
    const TokenTile entry = (&list.first)[tiling.by_channel_tiles.quotient(index)];
    const int token_tiles = (entry.end_token - entry.first_token + S::Tokens - 1) / S::Tokens;
    const int within = index - entry.first_entry * tiling.channel_tiles;
    const Divisor& by_last_sweep = tiling.by_tokens[tokens_of_last_sweep(token_tiles) - 1];
    Tile tile = persistent::tile_among<S>(tiling, token_tiles, by_last_sweep, work, within);
    tile.token += entry.first_token;
    tile.expert = entry.expert;
    tile.end_token = entry.end_token;
    return tile;
  }

  // The tile of unsorted routes: that of the expert with a number, which has kUnsortedTokens rows.
  template <class S>
  W4A16_HOST_DEVICE static Tile tile_of(const Tiling& tiling, const Work& work, int index, int number, int expert,
                                        int tokens) {
    const int within = index - number * tiling.channel_tiles;
    Tile tile = persistent::tile_among<S>(tiling, 1, tiling.by_tokens[0], work, within);
    tile.token = number * kUnsortedTokens;
    tile.expert = expert;
    tile.end_token = tile.token + tokens;
    return tile;
  }
};

}  // namespace scheduler

template <class S>
W4A16_HOST_DEVICE inline Work work_of(const Tiling& tiling, int cta, int ctas, int rank) {
  return S::Scheduler::template work_of<S>(tiling, cta, ctas, rank);
}

// The tile that a cluster works on after another one. There is none if it is not below `work.end_tile`.
template <class S>
W4A16_HOST_DEVICE inline int next_tile(const Tiling& tiling, const Work& work, int tile) {
  return S::Scheduler::next_tile(tiling, work, tile);
}

// The tile that a CTA computes when its cluster works on tile `index`.
template <class S>
W4A16_HOST_DEVICE inline Tile tile_at(const Tiling& tiling, const Work& work, int index) {
  return S::Scheduler::template tile_at<S>(tiling, work, index);
}

// Divides a problem among the CTAs that run at once. Returns how many CTAs have work, or 0 if the problem is too large
// or no cluster runs. Tiles may neither overlap nor be computed twice where a CTA reads what it overwrites: another
// would read the result.
template <class S>
int make_tiling(Tiling* tiling, int64_t m, int channel_blocks, int k_blocks, int clusters_at_once,
                bool may_overlap = true, int64_t l2_bytes = kL2Bytes) {
  const auto tiles_of = [](int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); };
  tiling->k_blocks = k_blocks;
  tiling->channel_tiles = tiles_of(channel_blocks, S::Blocks * S::ClusterChannels);
  tiling->token_tiles = tiles_of(m, int64_t{S::Tokens} * S::ClusterTokens);
  const int64_t tiles = int64_t{tiling->channel_tiles} * tiling->token_tiles;
  if (tiles > kMostTiles || clusters_at_once < 1) return 0;
  const int64_t parts = S::Scheduler::parts(tiles, k_blocks);
  if (parts > INT32_MAX) return 0;
  const bool overlaps = may_overlap && m > S::Tokens && (S::SkipsOutOfBoundsRows || parts <= clusters_at_once);
  const int last_token = may_overlap ? (tiling->token_tiles - 1) * S::Tokens : INT32_MAX;  // no tile twice
  tiling->last_token = overlaps ? static_cast<int>(m - S::Tokens) : last_token;
  const int clusters = parts < clusters_at_once ? static_cast<int>(parts) : clusters_at_once;
  const int64_t operand_bytes = k_blocks * int64_t{kBlockK} * (2 * m + channel_blocks * int64_t{kBlockChannels} / 2);
  const bool fits_l2 = tiling->token_tiles == 1 || operand_bytes <= l2_bytes;  // one token tile reads weights once
  S::Scheduler::split(tiling, static_cast<int>(tiles), clusters, fits_l2);
  tiling->by_last_sweep = Divisor::of(tokens_of_last_sweep(tiling->token_tiles));
  tiling->by_tail_blocks = Divisor::of(max_of(tiling->tail_blocks, 1));
  tiling->by_unit = Divisor::of(max_of(tiling->unit_blocks, 1));
  tiling->by_longer_unit = Divisor::of(tiling->unit_blocks + 1);
  tiling->by_channel_tiles = Divisor::of(tiling->channel_tiles);
  tiling->by_clusters = Divisor::of(tiling->clusters);
  tiling->rotation = S::Grouped ? rotation_of(tiling->clusters) : 0;
  tiling->by_sweep = Divisor::of(tiling->channel_tiles * kRasterTokens);
  for (int tokens = 1; tokens <= kRasterTokens; ++tokens) tiling->by_tokens[tokens - 1] = Divisor::of(tokens);
  return tiling->clusters * S::ClusterSize;
}

}  // namespace w4a16::native
