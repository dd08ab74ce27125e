// Runs the native kernels' own epilogues on the CPU, thread by thread, from sums that are known, and compares outputs
// with float64.
//
// Compiled with -DUNIT="file", a compile unit of kernels.
// host_epilogues > a line per kernel, activation and residual, which ends in "ok" or in the fault
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "library/epilogue.h"
#include "native/launch.cuh"
//
#include "native/epilogue.cuh"

namespace native = w4a16::native;

namespace {

constexpr int kKBlocks = 4;
constexpr uint16_t kPoison = 0x7e01;  // NaN: every output must be written
const char* const kResiduals[] = {"no residual", "a residual", "a residual in place"};

uint16_t bits_of(half value) {
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

double value_of(uint16_t bits) {
  half value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return static_cast<double>(__half2float(value));
}

// A number from -2 to 2 that depends on all arguments.
float drawn(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t hash = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  return static_cast<float>(hash & 0xffff) / 16384.f - 2.f;
}

double activated(int activation, double x) {
  switch (activation) {
    case W4A16_SILU:
    case W4A16_SWIGLU:
      return x / (1 + std::exp(-x));
    case W4A16_GELU_TANH:
    case W4A16_GEGLU_TANH:
      return x / (1 + std::exp(-2 * std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case W4A16_GELU_ERF:
    case W4A16_GEGLU_ERF:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case W4A16_RELU2:
      return x > 0 ? x * x : 0;
    default:
      return x;
  }
}

// One problem of a kernel, with its arrays.
template <class S>
struct Run {
  Run(int tokens, int channels, int activation_number, int residual_kind)
      : m(tokens), n(channels), activation(activation_number), residual(residual_kind) {
    columns = static_cast<int>(w4a16::output_channels(n, activation));
    const auto size = static_cast<size_t>(m) * static_cast<size_t>(columns);
    for (int channel = 0; channel < n + 256; ++channel) {
      factors.push_back(0.5f + 0.125f * drawn(1, static_cast<uint32_t>(channel), 0));
    }
    for (int channel = 0; channel < n; ++channel) {
      bias.push_back(__float2half(drawn(2, static_cast<uint32_t>(channel), 0)));
    }
    for (size_t i = 0; i < size; ++i) added.push_back(bits_of(__float2half(drawn(3, static_cast<uint32_t>(i), 0))));
    output = residual == 2 ? added : std::vector<uint16_t>(size, kPoison);
    set_parameters();
  }

  void set_parameters() {
    const bool gated = w4a16::is_gated(activation);
    auto* const residual_matrix = residual == 0 ? nullptr : residual == 1 ? added.data() : output.data();
    const int box_columns = gated ? 32 : 64;
    const native::HostTensor out{output.data(), m, columns, S::StoredTokens, box_columns};
    const native::HostTensor in{residual_matrix, m, columns, S::StoredTokens, box_columns};
    std::memcpy(static_cast<void*>(&p.output), &out, sizeof(out));
    std::memcpy(static_cast<void*>(&p.residual), &in, sizeof(in));
    p.channel_factors = factors.data();
    p.bias = bias.data();
    p.output_pointer = reinterpret_cast<half*>(output.data());
    p.residual_pointer = reinterpret_cast<const half*>(residual_matrix);
    p.m = m;
    p.n = n;
    p.channel_blocks = (n + native::kBlockChannels - 1) / native::kBlockChannels;
    p.alpha = 0.75f;
    p.activation = native::activation_of(activation);
  }

  // The work of one consumer thread after the main loop.
  void consume(native::HostCta& cta, int thread, const native::Tile& tile, int rank) {
    native::this_cta = &cta;
    native::this_warp = cta.warps[static_cast<size_t>(thread / native::kWarp)].get();
    native::this_lane = thread % native::kWarp;
    const int warpgroup = thread / native::kWarpgroup;
    const native::Consumer me{warpgroup % S::WarpgroupsM, warpgroup / S::WarpgroupsM, thread / native::kWarp % 4,
                              thread % native::kWarp};
    native::Accumulators<S> sum;
    for (int f = 0; f < S::Fragments; ++f) {
      for (int i = 0; i < S::Tokens / 2; ++i) {
        const int channel = native::first_channel<S>(tile, me, f) + me.warp * 16 + i / 2 % 2 * 8 + me.lane / 4;
        const int token = tile.token + i / 4 * 8 + me.lane % 4 * 2 + i % 2;
        const bool is_mine = native::stores_piece<S>(me, rank, f, i / 4);
        sum[f][i] = is_mine ? drawn(4, static_cast<uint32_t>(channel), static_cast<uint32_t>(token)) : NAN;
      }
    }
    native::ChannelFactors<S> of_channels;
    of_channels.load(p, tile, me);
    const native::Shared<S> shared(nullptr);
    if constexpr (S::HasEpilogue && S::StoresThroughShared) native::request_residual<S>(p, shared, tile, rank, me);
    native::named_barrier(native::kFixupBarrier + 1, S::Consumers);  // the copies of the residual have ended
    native::store<S>(p, shared, tile, rank, me, of_channels, sum);
  }

  void run_tile(const native::Tile& tile, int rank) {
    native::HostCta cta;
    for (int warp = 0; warp < S::Consumers / native::kWarp; ++warp) {
      cta.warps.push_back(std::make_unique<native::HostWarp>());
    }
    std::vector<std::thread> threads;
    for (int thread = 0; thread < S::Consumers; ++thread) {
      threads.emplace_back([&, thread] { consume(cta, thread, tile, rank); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  void run() {
    constexpr int kClustersAtOnce = 3;
    const int ctas = native::make_tiling<S>(&p.tiling, m, p.channel_blocks, kKBlocks, kClustersAtOnce,
                                            /*may_overlap=*/residual != 2);
    for (int cta = 0; cta < ctas; ++cta) {
      const native::Work work = native::work_of<S>(p.tiling, cta, ctas, cta % S::ClusterSize);
      for (int index = work.first_tile; index < work.end_tile; index = native::next_tile<S>(p.tiling, work, index)) {
        const native::Tile tile = native::tile_at<S>(p.tiling, work, index);
        if (S::StreamK && tile.first_block > 0) continue;  // another CTA stores it
        run_tile(tile, work.rank);
      }
    }
  }

  double expected(int token, int column) const {
    const auto x = [&](int packed, int canonical) {
      const float sum = drawn(4, static_cast<uint32_t>(packed), static_cast<uint32_t>(token));
      return 0.75 * factors[static_cast<size_t>(packed)] * sum +
             static_cast<double>(__half2float(bias[static_cast<size_t>(canonical)]));
    };
    double result = 0;
    if (w4a16::is_gated(activation)) {
      const int packed = column / 8 * 16 + column % 8;
      result = activated(activation, x(packed, column)) * x(packed + 8, n / 2 + column);
    } else {
      result = activated(activation, x(column, column));
    }
    const auto place = static_cast<size_t>(token) * static_cast<size_t>(columns) + static_cast<size_t>(column);
    return result + (residual == 0 ? 0 : value_of(added[place]));
  }

  std::string fault() const {
    for (int token = 0; token < m; ++token) {
      for (int column = 0; column < columns; ++column) {
        const double wanted = expected(token, column);
        const double got =
            value_of(output[static_cast<size_t>(token) * static_cast<size_t>(columns) + static_cast<size_t>(column)]);
        if (!(std::fabs(got - wanted) <= std::ldexp(std::fabs(wanted), -10) + 1e-4)) {
          return "token " + std::to_string(token) + ", column " + std::to_string(column) + ": " + std::to_string(got) +
                 " instead of " + std::to_string(wanted);
        }
      }
    }
    return "ok";
  }

  int m, n, activation, residual;
  int columns = 0;
  std::vector<float> factors;
  std::vector<half> bias;
  std::vector<uint16_t> added, output;
  native::Parameters p{};
};

}  // namespace

template <class S>
void visit(const char* name) {
  // The last tile has three tokens, and of its channels some.
  const int m = S::Tokens + 3;
  const int n = S::Channels + 48;
  const int runs[][2] = {{W4A16_NO_ACTIVATION, 0}, {W4A16_NO_ACTIVATION, 1}, {W4A16_NO_ACTIVATION, 2},
                         {W4A16_SILU, 0},          {W4A16_SILU, 2},          {W4A16_GELU_TANH, 1},
                         {W4A16_GELU_ERF, 0},      {W4A16_RELU2, 2},         {W4A16_SWIGLU, 0},
                         {W4A16_SWIGLU, 1},        {W4A16_SWIGLU, 2},        {W4A16_GEGLU_ERF, 0}};
  for (const auto& [activation, residual] : runs) {
    const int needed = w4a16::needed_epilogue(activation, residual != 0);
    const bool is_plain = needed == W4A16_NO_EPILOGUE;
    if (w4a16::is_gated(activation) != S::Gates || (!is_plain && !S::HasEpilogue)) continue;
    Run<S> run(m, n, activation, residual);
    run.run();
    std::printf("%s, activation %d, %s: %s\n", name, activation, kResiduals[residual], run.fault().c_str());
  }
}

#include UNIT

int main() {}
