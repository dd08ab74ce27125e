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
  std::string shape;  // the name behind the mode
  int cta[3];         // channels, tokens, k
  int cluster[3];
  bool is_stream_k;
  int along_k = 1;      // warpgroups that divide K
  int ctas_per_sm = 1;  // CTAs that share an SM
  int timed = -1;       // place among the packaged times, or -1
};

// Throws ChoiceError unless the text is a kernel's name.
inline Kernel parse_kernel(const std::string& name) {
  Kernel kernel{};
  char target[8], mode[5], schedule[16], scheduler[16];
  int read = 0;
  const int fields =
      std::sscanf(name.c_str(), "w4a16_sm90_%7[a-z]_%4[a-z]_cta%9dx%9dx%9d_cluster%9dx%9dx%9d_%15[a-z0-9]_%15[a-z]%n",
                  target, mode, &kernel.cta[0], &kernel.cta[1], &kernel.cta[2], &kernel.cluster[0], &kernel.cluster[1],
                  &kernel.cluster[2], schedule, scheduler, &read);
  std::string shape;
  bool is_name = fields == 10 && read == static_cast<int>(name.size());
  if (is_name) {
    const auto triple = [](const int* at) {
      return std::to_string(at[0]) + "x" + std::to_string(at[1]) + "x" + std::to_string(at[2]);
    };
    shape = "cta" + triple(kernel.cta) + "_cluster" + triple(kernel.cluster) + "_" + schedule + std::string("_") +
            scheduler;
    const auto is_one_of = [](const std::string& word, std::initializer_list<const char*> words) {
      return std::find(words.begin(), words.end(), word) != words.end();
    };
    is_name = name == std::string("w4a16_sm90_") + target + "_" + mode + "_" + shape &&
              *std::min_element(kernel.cta, kernel.cta + 3) > 0 &&
              *std::min_element(kernel.cluster, kernel.cluster + 3) > 0 && is_one_of(target, {"cutlass", "native"}) &&
              is_one_of(mode, {"cs", "fgs", "fgsz"}) &&
              is_one_of(schedule, {"pingpong", "cooperative", "warpgroups2", "warpgroups4", "warps8"}) &&
              is_one_of(scheduler, {"persistent", "streamk"});
  }
  if (!is_name) {
    throw ChoiceError("'" + name + "' is not a kernel name such as " +
                      "w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent");
  }
  kernel.name = name;
  kernel.target = target;
  kernel.mode = mode;
  kernel.shape = shape;
  kernel.is_stream_k = scheduler == std::string("streamk");
  return kernel;
}

// A model of GPU; see w4a16gen/choose/cards.py.
struct Card {
  std::string name;
  int sm_count;
  double memory_bandwidth;
  double tensor_rate;

  bool describes(const std::string& device) const { return device == name || device.rfind(name + " ", 0) == 0; }
  Card resized(int sms) const {
    const double share = static_cast<double>(sms) / sm_count;
    return {name, sms, memory_bandwidth * share, tensor_rate * share};
  }
};

struct Problem {
  int64_t m, n, k, group_size;
};

// The constants of the estimates, under the names of choose/cost_model.py and choose/packaged_times.py.
// clang-format off
#define W4A16_CHOICE_CONSTANTS(X) \
  X(cycles_per_microsecond) X(clusters_of_4) X(launch_cycles) X(block_cycles) X(product_cycles) X(token_cycles) \
  X(tensor_cycles) X(sm_bytes_per_cycle) X(warpgroup_reduction_cycles) X(cluster_reduction_cycles) \
  X(cluster_reduction_token_cycles) X(fixup_cycles) X(fixup_token_cycles) X(paired_share) X(stream_k_loss) \
  X(packed_bytes_per_cycle) X(overlap_loss) X(multicast_cycles) X(long_flops) X(long_slowdown) \
  X(power_cycles_per_byte) X(layer_octaves) X(token_octaves) X(prior_weight) X(least_weight) X(same_memory) \
  X(token_step) X(smallest_tile_tokens) X(measured_group_size)
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

// The estimated microseconds of a native kernel: CostModel.native_cycles of choose/cost_model.py, line by line.
inline double estimate(const Constants& c, const Card& h100, const Kernel& kernel, const Problem& problem,
                       const Card& card) {
  const int *cta = kernel.cta, *cluster = kernel.cluster;
  const int size = cluster[0] * cluster[1] * cluster[2];
  const double m = static_cast<double>(problem.m), n = static_cast<double>(problem.n),
               k = static_cast<double>(problem.k), groups = static_cast<double>(problem.k / problem.group_size);
  const double tiles = divide_up(n, cta[0] * cluster[0]) * divide_up(m, cta[1] * cluster[1]);
  const double k_blocks = divide_up(k, 128);
  double at_once = std::max(1, card.sm_count / size);
  if (size == 4) at_once = std::max(1, static_cast<int>(c.clusters_of_4) * card.sm_count / h100.sm_count);
  double waves = kernel.is_stream_k ? 1 : std::max(1.0, divide_up(tiles, at_once));
  const bool is_paired = kernel.ctas_per_sm > 1 && waves > 1;
  if (is_paired) waves += c.paired_share * (2 * divide_up(tiles, 2 * at_once) - waves);
  const double per_cta =
      kernel.is_stream_k ? divide_up(tiles * k_blocks, card.sm_count) : divide_up(k_blocks, cluster[2]);
  const double block_bytes = 64 * 128 / 2 + 2 * 64;
  const double activation_bytes = 256.0 * cta[1] * 64 / cta[0];
  const double moved_bytes = activation_bytes / cluster[0] + block_bytes / cluster[1];
  const bool is_long = 2 * m * n * k > c.long_flops;
  const double memory = card.memory_bandwidth / h100.memory_bandwidth;
  const double tensor = card.tensor_rate / card.sm_count / (h100.tensor_rate / h100.sm_count);
  const double block =
      std::max({c.block_cycles, c.product_cycles + c.token_cycles * cta[1],
                c.tensor_cycles / tensor * cta[1] + (is_long ? c.power_cycles_per_byte * moved_bytes : 0.0),
                (activation_bytes + block_bytes) / c.sm_bytes_per_cycle});
  const double area = static_cast<double>(cta[1]) * (cta[0] / 64);
  double reduction = kernel.along_k > 1 ? c.warpgroup_reduction_cycles : 0.0;
  if (cluster[2] > 1) reduction += c.cluster_reduction_cycles + c.cluster_reduction_token_cycles * area;
  if (kernel.is_stream_k) {
    reduction += c.fixup_cycles + c.fixup_token_cycles * area * std::max(1.0, k_blocks / std::max(per_cta, 1.0));
  }
  const double slower = kernel.is_stream_k ? 1 + c.stream_k_loss : 1.0;
  const double working = waves * slower * per_cta * (cta[0] / 64) * block + reduction * (is_paired ? 1.0 : waves);
  const double reading = slower * (n * k / 2 + 2 * groups * n) / (c.packed_bytes_per_cycle * memory);
  double cycles = c.launch_cycles + std::max(working, reading) + c.overlap_loss * std::min(working, reading);
  if (size > cluster[2]) cycles += c.multicast_cycles;
  return cycles * (is_long ? c.long_slowdown : 1.0) / c.cycles_per_microsecond;
}

}  // namespace choosing

}  // namespace w4a16
