// Estimates how long native kernels take: what w4a16gen/choose/cost_model.py computes, with constants from a file.
// Standard C++17 only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>

namespace w4a16 {

// A file that cannot be used, or a kernel that cannot be chosen: a sentence with value, rule and way out.
class ChoiceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace choosing {

// A kernel's name, taken apart, and how the kernel uses an SM.
struct Kernel {
  std::string name;
  std::string target;
  std::string mode;
  std::string shape;     // the name from the CTA shape to the scheduler
  std::string epilogue;  // none, elementwise or gated: the end of the name
  int cta[3];            // channels, tokens, k
  int cluster[3];
  bool is_stream_k;
  bool is_grouped;      // computes the products of several experts, and is never chosen here
  int ctas_per_sm = 1;  // CTAs that share an SM
  // The kernel's measured constants: Rates of choose/cost_model.py.
  double launch_cycles = 0, tile_cycles = 0, block_cycles = 0, split_cycles = 0, long_factor = 1;
};

// Throws ChoiceError unless the text is a kernel's name.
inline Kernel parse_kernel(const std::string& name) {
  Kernel kernel{};
  kernel.epilogue = "none";
  std::string plain = name;  // the name without the epilogue
  for (const std::string epilogue : {"elementwise", "gated"}) {
    const std::string suffix = "_" + epilogue;
    if (name.size() <= suffix.size() || name.substr(name.size() - suffix.size()) != suffix) continue;
    kernel.epilogue = epilogue;
    plain.resize(name.size() - suffix.size());
  }
  char target[8], mode[5], schedule[16], scheduler[16];
  int read = 0;
  const int fields =
      std::sscanf(plain.c_str(), "w4a16_sm90_%7[a-z]_%4[a-z]_cta%9dx%9dx%9d_cluster%9dx%9dx%9d_%15[a-z0-9]_%15[a-z]%n",
                  target, mode, &kernel.cta[0], &kernel.cta[1], &kernel.cta[2], &kernel.cluster[0], &kernel.cluster[1],
                  &kernel.cluster[2], schedule, scheduler, &read);
  std::string shape;
  bool is_name = fields == 10 && read == static_cast<int>(plain.size());
  if (is_name) {
    const auto triple = [](const int* at) {
      return std::to_string(at[0]) + "x" + std::to_string(at[1]) + "x" + std::to_string(at[2]);
    };
    shape = "cta" + triple(kernel.cta) + "_cluster" + triple(kernel.cluster) + "_" + schedule + std::string("_") +
            scheduler;
    const auto is_one_of = [](const std::string& word, std::initializer_list<const char*> words) {
      return std::find(words.begin(), words.end(), word) != words.end();
    };
    is_name = plain == std::string("w4a16_sm90_") + target + "_" + mode + "_" + shape &&
              *std::min_element(kernel.cta, kernel.cta + 3) > 0 &&
              *std::min_element(kernel.cluster, kernel.cluster + 3) > 0 && is_one_of(target, {"cutlass", "native"}) &&
              is_one_of(mode, {"cs", "fgs", "fgsz"}) &&
              is_one_of(schedule, {"pingpong", "cooperative", "warpgroups2", "warpgroups4", "warps8"}) &&
              is_one_of(scheduler, {"persistent", "streamk", "grouped"});
  }
  if (!is_name) {
    throw ChoiceError("'" + name + "' is not a kernel name such as " +
                      "w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent");
  }
  const bool is_native = target == std::string("native");
  if (!is_native && scheduler == std::string("grouped")) {
    throw ChoiceError("'" + name + "' is no kernel: scheduler grouped: only native kernels compute the products of " +
                      "several experts");
  }
  if (!is_native && kernel.epilogue != "none") {
    throw ChoiceError("'" + name + "' is no kernel: epilogue " + kernel.epilogue +
                      ": only native kernels have epilogues, CUTLASS's compute the plain product");
  }
  kernel.name = name;
  kernel.target = target;
  kernel.mode = mode;
  kernel.shape = shape;
  kernel.is_stream_k = scheduler == std::string("streamk");
  kernel.is_grouped = scheduler == std::string("grouped");
  return kernel;
}

// A model of GPU; see w4a16gen/choose/cards.py.
struct Card {
  std::string name;
  int sm_count;
  double memory_bandwidth;
  double tensor_rate;  // of each SM

  bool describes(const std::string& device) const { return device == name || device.rfind(name + " ", 0) == 0; }
  Card resized(int sms) const {
    const double share = static_cast<double>(sms) / sm_count;
    return {name, sms, memory_bandwidth * share, tensor_rate};
  }
};

struct Problem {
  int64_t m, n, k, group_size;
};

// The constants that all kernels share, under the names of choose/cost_model.py.
// clang-format off
#define W4A16_CHOICE_CONSTANTS(X) \
  X(cycles_per_microsecond) X(clusters_of_4) X(paired_share) X(paired_share_of_clusters) \
  X(tensor_cycles) X(packed_bytes_per_cycle) X(l2_bytes) X(overlap_loss) X(long_flops) X(sustained_factor) \
  X(token_step) X(smallest_tile_tokens)
// clang-format on
struct Constants {
#define W4A16_MEMBER(name) double name;
  W4A16_CHOICE_CONSTANTS(W4A16_MEMBER)
#undef W4A16_MEMBER

  static const std::map<std::string, double Constants::*>& members() {
#define W4A16_PAIR(name) {#name, &Constants::name},
    static const std::map<std::string, double Constants::*> all{W4A16_CHOICE_CONSTANTS(W4A16_PAIR)};
#undef W4A16_PAIR
    return all;
  }
};
#undef W4A16_CHOICE_CONSTANTS

// Exact for quotients of whole numbers below 2^53.
inline double divide_up(double value, double by) { return std::ceil(value / by); }

// How stream-K divides tiles along K; see scheduler::streamk in native/tiles.h.
struct Split {
  double tiles = 0;              // how many it divides
  double clusters_per_tile = 0;  // that share one of them
  double head_blocks = 0;        // k blocks of a head, 0 without heads
};

inline Split split_of(double tiles, double clusters, double k_blocks, bool fits_l2) {
  clusters = std::max(1.0, std::min(clusters, tiles * k_blocks));  // those that have work
  const double rest = std::fmod(tiles, clusters);
  if (rest == 0) return {};
  constexpr double kFewestClustersPerHead = 3, kBlocksPerClusterOfHead = 16, kBlocksOfSums = 3;
  const double most_clusters_per_head =
      std::max(kFewestClustersPerHead, std::floor(k_blocks / kBlocksPerClusterOfHead));
  if (!fits_l2 && rest * most_clusters_per_head >= clusters) {
    const double head_blocks = std::min(k_blocks, divide_up(rest * (k_blocks + kBlocksOfSums), clusters));
    return {rest, clusters / rest, head_blocks};
  }
  if (tiles < clusters) return {tiles, clusters / tiles, 0};
  return {clusters + rest, 2, 0};
}

// The bytes that split tiles of stream-K read from memory although other tiles read them too.
inline double read_apart(const Constants& c, const Kernel& kernel, const Problem& problem, double tiles,
                         double k_blocks, const Split& split) {
  if (split.tiles == 0) return 0;
  const double m = static_cast<double>(problem.m), n = static_cast<double>(problem.n),
               k = static_cast<double>(problem.k) * (1 - split.head_blocks / k_blocks);
  const double activations = 2 * m * k, weight = n * k / 2;
  if (activations == 0) return 0;
  const double activations_of_tile = 2.0 * kernel.cta[1] * kernel.cluster[1] * k - activations / tiles;
  const double weight_of_tile = kernel.cta[0] * kernel.cluster[0] * k / 2 - weight / tiles;
  const double missed_activations = std::max(0.0, 1 - c.l2_bytes / activations);
  const double missed_weight = std::max(0.0, 1 - c.l2_bytes / (activations + weight));
  return split.tiles * (missed_activations * activations_of_tile + missed_weight * weight_of_tile);
}

// The size of a block of packed weights: values of K, and channels.
constexpr int kPackedBlockK = 128, kPackedBlockChannels = 64;

// The estimated microseconds of a native kernel: CostModel.microseconds of choose/cost_model.py, line by line.
inline double estimate(const Constants& c, const Card& h100, const Kernel& kernel, const Problem& problem,
                       const Card& card) {
  const int *cta = kernel.cta, *cluster = kernel.cluster;
  const int size = cluster[0] * cluster[1] * cluster[2];
  const double m = static_cast<double>(problem.m), n = static_cast<double>(problem.n),
               k = static_cast<double>(problem.k), groups = static_cast<double>(problem.k / problem.group_size);
  const double tiles = divide_up(n, cta[0] * cluster[0]) * divide_up(m, cta[1] * cluster[1]);
  const double k_blocks = divide_up(k, kPackedBlockK);
  double at_once = std::max(1, card.sm_count / size);
  if (size == 4) at_once = std::max(1, static_cast<int>(c.clusters_of_4) * card.sm_count / h100.sm_count);
  double own_tiles, blocks, sharing = 0, apart = 0;
  if (kernel.is_stream_k) {
    own_tiles = std::max(1.0, tiles / at_once);
    blocks = tiles * k_blocks / at_once;
    const double clusters = at_once * kernel.ctas_per_sm;
    const double channels = kPackedBlockChannels * divide_up(n, kPackedBlockChannels);
    const double operand_bytes = kPackedBlockK * k_blocks * (2 * m + channels / 2);
    const bool fits_l2 = m <= cta[1] * cluster[1] || operand_bytes <= c.l2_bytes;
    const Split split = split_of(tiles, clusters, k_blocks, fits_l2);
    if (split.head_blocks > 0) {
      blocks = kernel.ctas_per_sm * (std::floor(tiles / clusters) * k_blocks + split.head_blocks);
    }
    sharing = split.clusters_per_tile;
    apart = read_apart(c, kernel, problem, tiles, k_blocks, split);
  } else {
    own_tiles = std::max(1.0, divide_up(tiles, at_once));
    if (kernel.ctas_per_sm > 1 && own_tiles > 1) {
      const double share = size == 1 ? c.paired_share : c.paired_share_of_clusters;
      own_tiles += share * (2 * divide_up(tiles, 2 * at_once) - own_tiles);
    }
    blocks = own_tiles * divide_up(k_blocks, cluster[2]);
  }
  const double area = static_cast<double>(cta[1]) * (cta[0] / kPackedBlockChannels);
  const double tensor = card.tensor_rate / h100.tensor_rate;
  const double block = std::max(kernel.block_cycles, tensor < 1 ? c.tensor_cycles / tensor * area : 0.0);
  double working = own_tiles * kernel.tile_cycles + blocks * block;
  working += kernel.split_cycles * sharing;
  if (2 * m * n * k > c.long_flops) working *= kernel.long_factor * c.sustained_factor;
  const double memory = card.memory_bandwidth / h100.memory_bandwidth;
  const double reading = (n * k / 2 + 2 * groups * n + apart) / (c.packed_bytes_per_cycle * memory);
  const double cycles = kernel.launch_cycles + std::max(working, reading) + c.overlap_loss * std::min(working, reading);
  return cycles / c.cycles_per_microsecond;
}

}  // namespace choosing

}  // namespace w4a16
