// Divides problems among CTAs with the native kernel's own functions, on the CPU, and counts what the CTAs would sum.
//
// host_tiles > a line per shape and problem: "ok", or what is wrong
#include <cstdio>
#include <map>
#include <tuple>

#include "native/tiles.h"

namespace native = w4a16::native;

// Every k block of every tile once; of stream-K also: what a CTA hands over is the first thing that it works on, and
// everything that is handed over belongs to a tile that an earlier share begins. A dependent launch may have CTAs more,
// each of which repeats one tile.
template <class S>
const char* what_is_wrong(int64_t m, int channel_blocks, int k_blocks, int clusters_at_once, bool is_dependent) {
  native::Tiling tiling{};
  const int ctas = native::divide<S>(&tiling, m, channel_blocks, k_blocks, clusters_at_once);
  if (ctas < 1 || ctas > clusters_at_once * S::ClusterSize || ctas % S::ClusterSize != 0) return "wrong number of CTAs";
  const int grid = is_dependent ? native::filled<S>(ctas, clusters_at_once) : ctas;
  if (grid < ctas || grid % S::ClusterSize != 0) return "wrong number of CTAs in the grid";
  if (grid > ctas && grid * 2 > clusters_at_once * S::ClusterSize) return "two grids do not fit";
  std::map<std::tuple<int, int, int>, int> sums;  // of channel block, token, k block
  std::map<int, int> worked_on;                   // tiles, by CTAs that have work of their own
  for (int cta = 0; cta < grid; ++cta) {
    const native::Work work = native::work_of<S>(tiling, cta, grid, cta % S::ClusterSize);
    if (native::is_repeat<S>(tiling, cta) != (cta >= ctas)) return "repeats what nobody works on, or only that";
    if (cta >= ctas) {
      if (worked_on[work.first_tile] != S::ClusterSize) return "repeats no tile";
      if (work.first_tile + work.tile_step < work.end_tile) return "repeats several tiles";
      continue;
    }
    for (int index = work.first_tile; index < work.end_tile; index += work.tile_step) {
      ++worked_on[index];
      const native::Tile tile = native::tile_at<S>(tiling, work, index);
      if (tile.blocks < 1 && !(S::ClusterK > 1 && tile.blocks == 0)) return "a tile of nothing";
      if (tile.first_block + tile.blocks > k_blocks) return "beyond K";
      for (int block = 0; block < tile.blocks; ++block) {
        ++sums[{tile.channel_block, tile.token, tile.first_block + block}];
      }
      if (!S::StreamK) continue;
      if (tile.first_block > 0 && index != work.first_tile) return "hands over late";
      const int begin = native::share_begin(tiling, work.share);
      if (index == work.first_tile && begin != index * k_blocks + tile.first_block) return "a share begins elsewhere";
      if (work.share + 1 < ctas && native::share_begin(tiling, work.share + 1) <= begin) return "shares out of order";
    }
  }
  // Tiles start where the one before ends, or where they overlap the last so that it ends where the tokens do, unless
  // these are fewer than a tile's. A cluster that shares weights may have one token tile too many: then it repeats the
  // last, or is beyond the tokens.
  const int64_t tokens = (m + S::Tokens - 1) / S::Tokens;
  const int channel_tiles = (channel_blocks + S::Blocks - 1) / S::Blocks;
  const bool overlaps = S::OverlapsTokens && (S::Channels == 64 || tokens * channel_tiles <= clusters_at_once);
  for (int channel = 0; channel < channel_blocks; channel += S::Blocks) {
    for (int64_t tile = 0; tile < tokens; ++tile) {
      const bool last = tile == tokens - 1;
      const int64_t token = last && tile > 0 && overlaps ? m - S::Tokens : tile * S::Tokens;
      for (int block = 0; block < k_blocks; ++block) {
        const auto found = sums.find({channel, static_cast<int>(token), block});
        if (found == sums.end()) return "left out";
        const bool repeats = overlaps && last && tokens % S::ClusterTokens != 0;
        if (found->second != (repeats ? 2 : 1)) return "summed twice";
        sums.erase(found);
      }
    }
  }
  for (const auto& [tile, count] : sums) {
    if (std::get<0>(tile) < channel_blocks && std::get<1>(tile) < m) return "a tile too many";
  }
  return "ok";
}

template <class S>
void check(const char* name) {
  for (int64_t m : {1, 64, 65, 1200}) {
    for (int channel_blocks : {1, 3, 64, 130}) {
      for (int k_blocks : {1, 2, 7, 16}) {
        for (int clusters_at_once : {1, 5, 132 * S::CtasPerSm / S::ClusterSize}) {
          for (bool is_dependent : {false, true}) {
            std::printf("%s m %d, %d channel blocks, %d k blocks, %d clusters%s: %s\n", name, static_cast<int>(m),
                        channel_blocks, k_blocks, clusters_at_once, is_dependent ? ", dependent" : "",
                        what_is_wrong<S>(m, channel_blocks, k_blocks, clusters_at_once, is_dependent));
          }
        }
      }
    }
  }
}

template <class S>
void check_filled(const char* name, int ctas, int clusters_at_once, int expected) {
  const bool fits = native::filled<S>(ctas, clusters_at_once) == expected;
  std::printf("%s, %d CTAs where %d clusters fit, filled: %s\n", name, ctas, clusters_at_once, fits ? "ok" : "wrong");
}

int main() {
  check<native::Shape<64, 64, 128, 2, 1, 1, 1, false, 1>>("persistent");
  check<native::Shape<64, 64, 128, 2, 1, 1, 1, true, 1>>("stream-K");
  check<native::Shape<256, 128, 64, 2, 1, 1, 1, true, 2>>("stream-K, large tiles");
  check<native::Shape<64, 64, 128, 2, 2, 1, 1, false, 0>>("cluster 2x1x1");
  check<native::Shape<128, 64, 64, 2, 1, 2, 1, false, 1>>("cluster 1x2x1");
  check<native::Shape<128, 128, 64, 2, 2, 2, 1, false, 1>>("cluster 2x2x1");
  check<native::Shape<64, 64, 64, 2, 1, 2, 1, false, 1>>("cluster 1x2x1, narrow");
  check<native::Shape<64, 16, 128, 4, 1, 1, 2, false, 1>>("cluster 1x1x2");
  check<native::Shape<64, 64, 128, 2, 1, 1, 4, false, 1>>("cluster 1x1x4");
  check<native::Shape<128, 128, 64, 2, 1, 1, 2, false, 1>>("cluster 1x1x2, wide");
  check<native::Shape<64, 8, 128, 2, 1, 1, 1, false, 1>>("two CTAs to an SM");
  check<native::Shape<64, 16, 128, 2, 1, 1, 2, false, 1>>("two CTAs to an SM, cluster 1x1x2");
  check<native::Shape<64, 8, 128, 2, 2, 1, 1, false, 1>>("two CTAs to an SM, cluster 2x1x1");
  check<native::Shape<64, 16, 128, 2, 1, 1, 1, true, 1>>("two CTAs to an SM, stream-K");
  using Two = native::Shape<64, 8, 128, 2, 1, 1, 1, false, 1>;
  check_filled<Two>("two CTAs to an SM", 128, 264, 132);
  check_filled<Two>("two CTAs to an SM", 67, 264, 132);
  check_filled<Two>("two CTAs to an SM", 66, 264, 66);
  check_filled<Two>("two CTAs to an SM", 200, 264, 200);
  check_filled<native::Shape<64, 16, 128, 2, 1, 1, 2, false, 1>>("cluster 1x1x2", 128, 132, 132);
  check_filled<native::Shape<64, 8, 128, 2, 1, 1, 1, true, 1>>("stream-K", 128, 264, 128);
  check_filled<native::Shape<64, 64, 128, 2, 1, 1, 1, false, 1>>("one CTA to an SM", 128, 132, 128);
}
