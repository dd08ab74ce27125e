// Divides problems among CTAs with the native kernels' own functions, on the CPU, and counts what the CTAs would sum.
//
// Compiled with -DUNIT="file", a compile unit of kernels.
// host_tiles > lines about divisors and waves, and one per kernel and problem, which end in "ok" or in the fault
// host_tiles NAME > how stream-K divides some problems: "TILES CLUSTERS K_BLOCKS HEADS SPLIT_TILES HEAD_BLOCKS", where
// HEADS tells whether there may be heads
// host_tiles NAME problems < lines of "M CHANNEL_BLOCKS K_BLOCKS CLUSTERS" > how stream-K divides these on a GPU:
// "SPLIT_TILES HEAD_BLOCKS"
// host_tiles NAME CTAS CLUSTERS > the grid of a dependent launch with work for CTAS, where CLUSTERS run at once
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "native/launch.cuh"

namespace native = w4a16::native;

// Every k block of every tile is summed once. Under stream-K the CTA with a tile's first k block adds all partial sums
// that others give away, each in a place of its own. Only CTAs that started before may give sums to a CTA. All CTAs sum
// equally many k blocks but for one, and no tails take longer than a head. Sums are given away first, but where there
// are heads. Where there are more tiles than clusters, at most two of these share a tile that has no head. A dependent
// launch may have redundant CTAs, each of which computes one tile again.
template <class S>
const char* fault_of(int64_t m, int channel_blocks, int k_blocks, int clusters_at_once, bool is_dependent,
                     bool may_overlap, int64_t l2_bytes) {
  native::Tiling tiling{};
  const int ctas =
      native::make_tiling<S>(&tiling, m, channel_blocks, k_blocks, clusters_at_once, may_overlap, l2_bytes);
  if (ctas < 1 || ctas > clusters_at_once * S::ClusterSize || ctas % S::ClusterSize != 0) return "wrong number of CTAs";
  const int grid = is_dependent ? native::padded_grid<S>(ctas, clusters_at_once) : ctas;
  if (grid < ctas || grid % S::ClusterSize != 0) return "wrong number of CTAs in the grid";
  if (grid > ctas && grid * 2 > clusters_at_once * S::ClusterSize) return "two grids do not fit";
  // How often each k block of each tile is summed.
  std::unordered_map<int64_t, int> sums;
  const auto key = [](int64_t channel_block, int64_t token, int block) {
    return (channel_block << 40) + (token << 20) + block;
  };
  std::map<int, int> worked_on;              // tiles, by CTAs that have work of their own
  std::map<int, int> sharers;                // split tiles, by CTAs that sum a part
  std::map<int, int> places;                 // of partial sums, by how many they get
  std::map<std::pair<int, int>, int> given;  // partial sums of clusters, by tile and place: by which cluster
  int most = 0;
  int fewest = INT32_MAX;
  for (int cta = 0; cta < grid; ++cta) {
    const native::Work work = native::work_of<S>(tiling, cta, grid, cta % S::ClusterSize);
    if (native::is_redundant_cta<S>(tiling, cta) != (cta >= ctas)) return "the wrong CTAs are redundant";
    if (cta >= ctas) {
      if (worked_on[work.first_tile] != S::ClusterSize) return "a redundant CTA without a tile";
      if (native::next_tile<S>(tiling, work, work.first_tile) < work.end_tile)
        return "a redundant CTA with several tiles";
      continue;
    }
    if (work.first_tile >= work.end_tile) return "a CTA without a tile";
    int blocks = 0;
    bool stores = false;
    for (int index = work.first_tile; index < work.end_tile; index = native::next_tile<S>(tiling, work, index)) {
      ++worked_on[index];
      const native::Tile tile = native::tile_at<S>(tiling, work, index);
      if (tile.blocks < 1 && !(S::ClusterK > 1 && tile.blocks == 0)) return "a tile of nothing";
      if (tile.first_block + tile.blocks > k_blocks) return "beyond K";
      for (int block = 0; block < tile.blocks; ++block) {
        ++sums[key(tile.channel_block, tile.token, tile.first_block + block)];
      }
      blocks += tile.blocks;
      if (!S::StreamK) continue;
      if (index >= tiling.split_tiles) {
        if (tile.blocks != k_blocks) return "splits a whole tile";
        stores = true;
        continue;
      }
      const bool has_head = tiling.heads > 0;
      if (++sharers[index] > 2 * S::ClusterSize && !has_head &&
          tiling.channel_tiles * tiling.token_tiles > ctas / S::ClusterSize)
        return "three clusters share a tile";
      if (work.unit < tiling.heads && tile.blocks != tiling.head_blocks) return "a head of another length";
      if (tile.first_block > 0) {
        if (stores && !has_head) return "gives away sums after it stored a tile";
        if (index != work.first_tile && !has_head) return "gives away sums of a later tile";
        const int slot = native::slot_of(tiling, work.unit, index);
        if (slot < 0 || slot >= ctas / S::ClusterSize) return "sums without a place";
        if (cta % S::ClusterSize == 0) {
          if (++places[slot] > 1) return "two sums in one place";
          given[{index, slot}] = cta / S::ClusterSize;
        }
      }
      stores = stores || tile.first_block == 0;
    }
    if (S::StreamK && work.unit >= tiling.heads && tiling.heads > 0 &&
        native::unit_begin(tiling, work.unit + 1) - native::unit_begin(tiling, work.unit) > tiling.head_blocks)
      return "tails take longer than a head";
    most = blocks > most ? blocks : most;
    fewest = blocks < fewest ? blocks : fewest;
  }
  if (S::StreamK && tiling.heads == 0 && most > fewest + 1) return "CTAs work differently long";
  // What each cluster with a first k block adds, as the kernel does.
  for (int cluster = 0; S::StreamK && cluster < ctas / S::ClusterSize; ++cluster) {
    const native::Work work = native::work_of<S>(tiling, cluster * S::ClusterSize, grid, 0);
    for (int index = work.first_tile; index < work.end_tile; index = native::next_tile<S>(tiling, work, index)) {
      const native::Tile tile = native::tile_at<S>(tiling, work, index);
      if (index >= tiling.split_tiles || tile.first_block > 0) continue;
      const int begin = index * tiling.tail_blocks;
      int unit = tiling.heads > 0 ? native::unit_of(tiling, begin) : work.unit + 1;
      for (; native::unit_begin(tiling, unit) < begin + tiling.tail_blocks; ++unit) {
        const auto found = given.find({index, native::slot_of(tiling, unit, index)});
        if (found == given.end()) return "waits for sums that nobody gives away";
        if (found->second >= cluster) return "waits for a cluster that starts later";
        given.erase(found);
      }
    }
  }
  if (!given.empty()) return "sums that nobody adds";
  // Tiles start where the previous tile ends. The last one may start earlier, so that it ends where the tokens end. A
  // cluster that multicasts weights may have one token tile too many: it computes the last tile again, or, also where
  // tiles may not overlap, lies beyond the tokens.
  const int64_t tokens = (m + S::Tokens - 1) / S::Tokens;
  const int channel_tiles = (channel_blocks + S::Blocks - 1) / S::Blocks;
  const bool overlaps =
      may_overlap && S::OverlapsLastTile && (S::Channels == 64 || tokens * channel_tiles <= clusters_at_once);
  for (int channel = 0; channel < channel_blocks; channel += S::Blocks) {
    for (int64_t tile = 0; tile < tokens; ++tile) {
      const bool last = tile == tokens - 1;
      const int64_t token = last && tile > 0 && overlaps ? m - S::Tokens : tile * S::Tokens;
      for (int block = 0; block < k_blocks; ++block) {
        const auto found = sums.find(key(channel, token, block));
        if (found == sums.end()) return "left out";
        const bool is_again = overlaps && last && tokens % S::ClusterTokens != 0;
        if (found->second != (is_again ? 2 : 1)) return "summed twice";
        sums.erase(found);
      }
    }
  }
  for (const auto& [tile, count] : sums) {
    if ((tile >> 40) < channel_blocks && (tile >> 20 & 0xfffff) < m) return "a tile too many";
  }
  return "ok";
}

constexpr int64_t kLargeL2 = INT64_MAX;

// What a smaller L2 changes: stream-K forms other units. Counts the problems where it does.
template <class S>
const char* fault_with_heads(int* problems) {
  for (int64_t m : {65, 300, 1200, 2500}) {
    for (int channel_blocks : {1, 3, 5, 64, 130}) {
      for (int k_blocks : {1, 2, 7, 16, 37}) {
        for (int clusters_at_once : {2, 5, 61, 66, 132}) {
          native::Tiling tiling{};
          native::make_tiling<S>(&tiling, m, channel_blocks, k_blocks, clusters_at_once, true, 0);
          if (tiling.heads == 0) continue;
          ++*problems;
          const char* const fault = fault_of<S>(m, channel_blocks, k_blocks, clusters_at_once, false, true, 0);
          if (std::string(fault) != "ok") return fault;
        }
      }
    }
  }
  return "ok";
}

// The room for partial sums that the library asks for suffices if fewer clusters run at once than it expects.
template <class S>
const char* fault_of_fewer_clusters(int64_t l2_bytes) {
  for (int64_t m : {65, 1200}) {
    for (int channel_blocks : {1, 5, 64}) {
      for (int k_blocks : {1, 3, 16}) {
        int most = 0;
        for (int clusters = 1; clusters <= 140; ++clusters) {
          native::Tiling tiling{};
          const int ctas = native::make_tiling<S>(&tiling, m, channel_blocks, k_blocks, clusters, true, l2_bytes);
          if (ctas < most) return "more clusters need less room";
          most = ctas;
        }
      }
    }
  }
  return "ok";
}

// A problem of about as many parts as an int counts is divided. Refused are problems of more parts, also of more than
// 64 bits count, of tiles whose numbers overflow when all CTAs step past the last one, and those for which no cluster
// runs.
template <class S>
bool refuses_what_it_cannot_divide() {
  native::Tiling tiling{};
  const int64_t m = int64_t{S::Tokens} * S::ClusterTokens;
  const int blocks = S::Blocks * S::ClusterChannels;
  return native::make_tiling<S>(&tiling, m << 15, blocks * 65535, 1, 1) > 0 &&
         native::make_tiling<S>(&tiling, m << 15, blocks * 65536, 1, 1) == 0 &&
         native::make_tiling<S>(&tiling, m << 10, blocks * ((1 << 21) - 1), 1, 1024) == 0 &&
         native::make_tiling<S>(&tiling, int64_t{1} << 30, 1 << 24, 1 << 23, 132) == 0 &&
         native::make_tiling<S>(&tiling, m, blocks, 1, 0) == 0;
}

// Multiples of a divisor and their neighbours, up to the largest number.
bool divides_as_the_cpu(int number) {
  const native::Divisor divisor = native::Divisor::of(number);
  const int64_t step = number * (INT32_MAX / number / 1000 + int64_t{1});
  for (int64_t multiple = 0; multiple <= INT32_MAX; multiple += step) {
    for (int64_t dividend = multiple - 1; dividend <= multiple + 1; ++dividend) {
      if (dividend < 0 || dividend > INT32_MAX) continue;
      if (divisor.quotient(static_cast<int>(dividend)) != dividend / number) return false;
    }
  }
  return divisor.quotient(INT32_MAX) == INT32_MAX / number;
}

const char* fault_of_divisors() {
  for (int64_t number = 1; number <= INT32_MAX; number += number / 300 + 1) {
    if (!divides_as_the_cpu(static_cast<int>(number))) return "a wrong quotient";
  }
  return divides_as_the_cpu(INT32_MAX) ? "ok" : "a wrong quotient";
}

using Grouped = native::Shape<native::Cta<64, 64, 128>, native::Cluster<1, 1, 1>, native::schedule::warpgroups2,
                              native::scheduler::grouped, native::epilogue::none, w4a16::mode::fgs,
                              /*Stages=*/4, /*CtasPerSm=*/1, /*StoresThroughShared=*/false, /*TailTokens=*/64>;

// The clusters of a grouped product take each tile once, and about as many last tiles of experts as each other,
// whatever the number of token tiles of an expert.
const char* fault_of_waves(int clusters) {
  constexpr int kWaves = 24;
  native::Tiling tiling{};
  if (native::make_tiling<Grouped>(&tiling, int64_t{Grouped::Tokens} * clusters * kWaves, 1, 1, clusters) != clusters)
    return "wrong number of CTAs";
  constexpr int kMostTokenTiles = 12;
  std::vector<int> taken(static_cast<size_t>((kWaves + 1) * clusters));
  for (int cluster = 0; cluster < clusters; ++cluster) {
    int last_tiles[kMostTokenTiles + 1] = {};
    int tile = cluster;
    for (int wave = 0; wave <= kWaves; ++wave) {
      if (tile / clusters != wave) return "a tile of another wave";
      ++taken[static_cast<size_t>(tile)];
      for (int tokens = 2; tokens <= kMostTokenTiles && wave < kWaves; ++tokens) {
        if (tile % tokens == tokens - 1) ++last_tiles[tokens];
      }
      tile = native::scheduler::grouped::next_tile(tiling, {}, tile);
    }
    for (int tokens = 2; tokens <= kMostTokenTiles && clusters > kMostTokenTiles; ++tokens) {
      if (std::abs(last_tiles[tokens] - kWaves / tokens) > 3) return "unequal work";
    }
  }
  for (const int count : taken) {
    if (count != 1) return "a tile left out";
  }
  return "ok";
}

template <class S>
void check(const char* name) {
  std::printf("%s, too many parts: %s\n", name, refuses_what_it_cannot_divide<S>() ? "ok" : "not refused");
  int problems = 0;
  const char* const fault = fault_with_heads<S>(&problems);
  std::printf("%s, %s: %s\n", name, problems >= 50 ? "heads" : "no heads", fault);
  for (int64_t l2_bytes : {int64_t{0}, kLargeL2}) {
    std::printf("%s, fewer clusters: %s\n", name, fault_of_fewer_clusters<S>(l2_bytes));
  }
  for (int64_t m : {1, 64, 65, 1200}) {
    for (int channel_blocks : {1, 3, 64, 130}) {
      for (int k_blocks : {1, 2, 7, 16}) {
        for (int clusters_at_once : {1, 5, 132 * S::CtasPerSm / S::ClusterSize}) {
          for (bool is_dependent : {false, true}) {
            for (bool may_overlap : {true, false}) {
              std::printf(
                  "%s m %d, %d channel blocks, %d k blocks, %d clusters%s%s: %s\n", name, static_cast<int>(m),
                  channel_blocks, k_blocks, clusters_at_once, is_dependent ? ", dependent" : "",
                  may_overlap ? "" : ", in place",
                  fault_of<S>(m, channel_blocks, k_blocks, clusters_at_once, is_dependent, may_overlap, kLargeL2));
            }
          }
        }
      }
    }
  }
}

template <class S>
void print_splits() {
  for (int64_t l2_bytes : {int64_t{0}, kLargeL2}) {
    for (int64_t token_tiles = 2; token_tiles <= 60; token_tiles += 3) {
      for (int k_blocks : {1, 7, 40, 80, 253}) {
        for (int clusters : {13, 45, 66, 132}) {
          native::Tiling tiling{};
          native::make_tiling<S>(&tiling, token_tiles * S::Tokens, 3 * S::Blocks * S::ClusterChannels, k_blocks,
                                 clusters, true, l2_bytes);
          std::printf("%d %d %d %d %d %d\n", tiling.channel_tiles * tiling.token_tiles, clusters, k_blocks,
                      l2_bytes == 0 ? 1 : 0, tiling.split_tiles, tiling.head_blocks);
        }
      }
    }
  }
}

template <class S>
void print_splits_of_problems() {
  long long m;
  int channel_blocks, k_blocks, clusters;
  while (std::scanf("%lld %d %d %d", &m, &channel_blocks, &k_blocks, &clusters) == 4) {
    native::Tiling tiling{};
    native::make_tiling<S>(&tiling, m, channel_blocks, k_blocks, clusters);
    std::printf("%d %d\n", tiling.split_tiles, tiling.head_blocks);
  }
}

struct Entry {
  std::string name;
  void (*print_splits)();
  void (*print_splits_of_problems)();
  void (*check)(const char* name);
  int (*padded_grid)(int ctas, int clusters_at_once);
};

std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

template <class S>
void visit(const char* name) {
  entries().push_back({name, &print_splits<S>, &print_splits_of_problems<S>, &check<S>, &native::padded_grid<S>});
}

#include UNIT

int main(int count, char** arguments) {
  if (count == 1) {
    std::printf("divisors: %s\n", fault_of_divisors());
    for (int clusters : {1, 2, 5, 13, 33, 57, 64, 66, 78, 114, 131, 132, 156, 264}) {
      std::printf("waves of %d clusters: %s\n", clusters, fault_of_waves(clusters));
    }
  }
  for (const Entry& entry : entries()) {
    if (count == 1) entry.check(entry.name.c_str());
    if (count == 2 && entry.name == arguments[1]) entry.print_splits();
    if (count == 3 && entry.name == arguments[1]) entry.print_splits_of_problems();
    if (count == 4 && entry.name == arguments[1]) {
      std::printf("%d\n", entry.padded_grid(std::atoi(arguments[2]), std::atoi(arguments[3])));
    }
  }
}
