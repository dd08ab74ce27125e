// Checks and times every kernel of the library on one problem in all modes: minimal_test M N K. Also checks wrong
// calls.
//
// Exit codes: 0 success, 1 a wrong result or a failed call, 2 wrong usage, 3 no GPU: only wrong calls were checked.
#include <w4a16/runner.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

// Converts to fp16 bits, rounded to nearest even. The number is 0 or in the normal range of fp16.
uint16_t to_half(float value) {
  uint32_t bits;
  static_assert(sizeof(bits) == sizeof(value));
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) == 0) return 0;
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>((rounded >> 16 & 0x8000) | ((rounded & 0x7fffffff) - 0x38000000) >> 13);
}

double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

template <class Value>
Value* to_device(const std::vector<Value>& values) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, values.size() * sizeof(Value)));
  check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(Value), cudaMemcpyHostToDevice));
  return static_cast<Value*>(pointer);
}

// Returns whether weights of one byte each, on the device, are packed to the same bytes.
template <w4a16::QuantOp Op>
bool packs_the_same_on_the_device(w4a16::Runner<Op>& runner, const void* packed, const std::vector<uint8_t>& nibbles,
                                  const void* scales, const void* zeros, int n, int k, int group_size) {
  std::vector<uint8_t> q(nibbles.size() * 2);  // [n, k], 0 to 15
  for (size_t at = 0; at < q.size(); ++at) {
    q[at % n * k + at / n] = static_cast<uint8_t>((nibbles[at / 2] >> (at % 2 * 4) & 15) ^ 8);
  }
  std::vector<uint8_t> expected(runner.getPackedSize(n, k, group_size)), actual(expected.size());
  uint8_t* const device_q = to_device(q);
  uint8_t* const again = to_device(actual);
  runner.pack(again, device_q, scales, zeros, n, k, group_size);
  check(cudaMemcpy(expected.data(), packed, expected.size(), cudaMemcpyDeviceToHost));
  check(cudaMemcpy(actual.data(), again, actual.size(), cudaMemcpyDeviceToHost));
  runner.forget(again);
  check(cudaFree(again));
  check(cudaFree(device_q));
  if (actual != expected) std::printf("packing on the device writes other bytes\n");
  return actual == expected;
}

// Returns whether every kernel of a mode computes the product. Prints the fastest one.
template <w4a16::QuantOp Op>
bool run(int m, int n, int k, int group_size) {
  constexpr bool kZeros = Op == w4a16::QuantOp::FinegrainedScaleAndZeros;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<uint8_t> nibbles(static_cast<size_t>(n) * k / 2);  // [k, n], two's complement
  std::vector<uint16_t> a(static_cast<size_t>(m) * k), scales(static_cast<size_t>(k / group_size) * n),
      zeros(scales.size());
  std::vector<uint16_t> bias(static_cast<size_t>(n));
  for (auto& byte : nibbles) byte = static_cast<uint8_t>(random());
  for (auto& value : a) value = to_half(std::round(uniform(random) * 1024) / 1024);  // no subnormal numbers
  for (auto& value : bias) value = to_half(std::round(uniform(random) * 1024) / 1024);
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = to_half(0.01f + 0.005f * uniform(random));
    const int zero_point = static_cast<int>(random() % 16);
    zeros[i] = to_half(static_cast<float>((8 - zero_point) * from_half(scales[i])));
  }
  const uint16_t* const device_a = to_device(a);
  const uint16_t* const device_scales = to_device(scales);
  const uint16_t* const device_zeros = kZeros ? to_device(zeros) : nullptr;
  const uint16_t* const device_bias = to_device(bias);
  std::vector<uint16_t> c(static_cast<size_t>(m) * n);
  uint16_t* const device_c = to_device(c);

  w4a16::Runner<Op> runner;
  void* packed = nullptr;
  check(cudaMalloc(&packed, runner.getPackedSize(n, k, group_size)));
  runner.preprocess(packed, nibbles.data(), device_scales, device_zeros, n, k, group_size);
  bool ok = packs_the_same_on_the_device(runner, packed, nibbles, device_scales, device_zeros, n, k, group_size);
  const size_t workspace_bytes = runner.getWorkspaceSize(m, n, k);
  void* workspace = nullptr;
  if (workspace_bytes > 0) check(cudaMalloc(&workspace, workspace_bytes));

  std::vector<int> rows{0, m / 2, m - 1};
  std::vector<double> expected(rows.size() * n), bound(expected.size());
  std::vector<double> column(k);
  for (int channel = 0; channel < n; ++channel) {
    for (int at = 0; at < k; ++at) {
      const size_t place = static_cast<size_t>(at) * n + channel;
      const int value = (nibbles[place / 2] >> (place % 2 * 4) & 15) ^ 8;
      const size_t group = static_cast<size_t>(at / group_size) * n + channel;
      column[at] = (value - 8) * from_half(scales[group]) + (kZeros ? from_half(zeros[group]) : 0.0);
    }
    for (size_t row = 0; row < rows.size(); ++row) {
      double sum = 0, size = 0;
      for (int at = 0; at < k; ++at) {
        const double term = from_half(a[static_cast<size_t>(rows[row]) * k + at]) * column[at];
        sum += term;
        size += std::fabs(term);
      }
      const double with_bias = 0.5 * sum + from_half(bias[channel]);
      expected[row * n + channel] = with_bias;
      // Weights are rounded to fp16 once (2^-11), sums in fp32 (k roundings of 2^-24), the result to fp16.
      bound[row * n + channel] = 0.5 * size * (std::ldexp(1, -11) + k * std::ldexp(1, -24)) +
                                 std::fabs(with_bias) * std::ldexp(1, -10) + std::ldexp(1, -24);
    }
  }

  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  double best = 1e30;
  std::string fastest;
  int failed = 0;
  const std::vector<w4a16::GemmConfig> configs = runner.getConfigs();
  for (const w4a16::GemmConfig& config : configs) {
    if (config.info.epilogue == W4A16_GATED) continue;  // it computes no plain product
    const auto launch = [&](bool dependent, const w4a16::Epilogue& epilogue = {}) {
      runner.gemm(device_a, packed, device_scales, device_zeros, device_bias, 0.5f, device_c, m, n, k, group_size,
                  config, workspace, workspace_bytes, nullptr, dependent, epilogue);
    };
    const auto has_right_output = [&](bool with_silu) {
      check(cudaMemcpy(c.data(), device_c, c.size() * 2, cudaMemcpyDeviceToHost));
      for (size_t row = 0; row < rows.size(); ++row) {
        for (int channel = 0; channel < n; ++channel) {
          const double got = from_half(c[static_cast<size_t>(rows[row]) * n + channel]);
          const double x = expected[row * n + channel];
          const double wanted = with_silu ? x / (1 + std::exp(-x)) + 1 : x;  // and the residual of 1
          const double allowed =
              with_silu ? 1.2 * bound[row * n + channel] + std::ldexp(1, -11) : bound[row * n + channel];
          if (!(std::fabs(got - wanted) <= allowed)) return false;
        }
      }
      return true;
    };
    bool is_right = true;
    for (const bool dependent : {false, true}) {
      check(cudaMemset(device_c, 0xff, c.size() * 2));
      launch(dependent);
      is_right = has_right_output(false) && is_right;
    }
    if (config.info.epilogue == W4A16_ELEMENTWISE) {
      const std::vector<uint16_t> ones(c.size(), to_half(1));
      check(cudaMemcpy(device_c, ones.data(), ones.size() * 2, cudaMemcpyHostToDevice));
      launch(false, {W4A16_SILU, device_c});
      is_right = has_right_output(true) && is_right;
    }
    failed += !is_right;
    if (!is_right) std::printf("%s is wrong\n", config.name().c_str());
    constexpr int kLaunches = 10;
    check(cudaEventRecord(begin));
    for (int i = 0; i < kLaunches; ++i) launch(false);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (milliseconds / kLaunches < best) {
      best = milliseconds / kLaunches;
      fastest = config.name();
    }
  }
  std::printf("mode %-4s group size %5d: %zu kernels, %d wrong; fastest %8.2f us, %5.1f TFLOP/s with warm L2: %s\n",
              runner.mode().c_str(), group_size, configs.size(), failed, best * 1e3, 2e-9 * m * n * k / best,
              fastest.c_str());
  for (const void* pointer :
       {static_cast<const void*>(device_a), static_cast<const void*>(device_scales),
        static_cast<const void*>(device_zeros), static_cast<const void*>(device_bias),
        static_cast<const void*>(device_c), static_cast<const void*>(packed), static_cast<const void*>(workspace)}) {
    cudaFree(const_cast<void*>(pointer));
  }
  return ok && failed == 0;
}

// Returns whether a call throws an error whose sentence contains `expected`.
template <class Call>
bool is_refused(const char* expected, const Call& call) {
  try {
    call();
  } catch (const w4a16::Error& error) {
    if (std::string(error.what()).find(expected) != std::string::npos) return true;
    std::printf("expected \"%s\" in: %s\n", expected, error.what());
  }
  return false;
}

// Returns whether wrong calls are refused. None of them reaches a GPU.
bool refuses_what_is_wrong() {
  w4a16::FinegrainedRunner runner;
  const w4a16::GemmConfig config = runner.getConfigs().front();
  alignas(128) static char foreign[1024];
  bool ok = is_refused("B was not packed by this runner", [&] {
    runner.gemm(foreign, foreign, nullptr, nullptr, nullptr, foreign, 1, 64, 128, 128, config, nullptr, 0, nullptr);
  });
  ok &= is_refused("is packed as kmajor_s4_v1", [&] { runner.adopt(foreign, 1024, "kmajor_s4_v1", 64, 128, 128); });
  ok &= is_refused("must be", [&] { runner.adopt(foreign, 1024, runner.layout(), 64, 128, 128); });
  ok &= is_refused("group size 48 must be 128 (= k)", [&] { runner.getPackedSize(64, 128, 48); });
  ok &= is_refused("'fast' is no kernel of mode fgs", [&] { runner.getConfig("fast"); });
  runner.adopt(foreign, runner.getPackedSize(64, 128, 128), runner.layout(), 64, 128, 128);
  ok &= is_refused("B was packed for n = 64, k = 128, group size 128, not for n = 64, k = 256", [&] {
    runner.gemm(foreign, foreign, nullptr, nullptr, nullptr, foreign, 1, 64, 256, 128, config, nullptr, 0, nullptr);
  });
  const auto launch_gated = [&] {
    runner.gemm(foreign, foreign, nullptr, nullptr, nullptr, foreign, 1, 64, 128, 128, config, nullptr, 0, nullptr,
                false, {W4A16_SWIGLU, nullptr});
  };
  ok &= is_refused("a gated activation needs B packed with gated = true", launch_gated);
  if (config.info.epilogue == W4A16_NO_EPILOGUE) {
    ok &= is_refused("with epilogue none cannot: the call needs `w4a16gen build --epilogue none --epilogue", [&] {
      runner.gemm(foreign, foreign, nullptr, nullptr, nullptr, foreign, 1, 64, 128, 128, config, nullptr, 0, nullptr,
                  false, {W4A16_SILU, nullptr});
    });
  }
  runner.adopt(foreign, runner.getPackedSize(64, 128, 128), runner.gatedLayout(), 64, 128, 128);
  ok &= is_refused("B was packed with gated = true: pass a gated activation", [&] {
    runner.gemm(foreign, foreign, nullptr, nullptr, nullptr, foreign, 1, 64, 128, 128, config, nullptr, 0, nullptr);
  });
  w4a16::PerColumnRunner other;
  runner.adopt(foreign, runner.getPackedSize(64, 128, 128), runner.layout(), 64, 128, 128);
  ok &= is_refused("is not of mode fgs", [&] {
    runner.gemm(foreign, foreign, nullptr, nullptr, nullptr, foreign, 1, 64, 128, 128, other.getConfigs().front(),
                nullptr, 0, nullptr);
  });
  return ok;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s M N K\n", arguments[0]);
    return 2;
  }
  const int m = std::atoi(arguments[1]), n = std::atoi(arguments[2]), k = std::atoi(arguments[3]);
  try {
    if (!refuses_what_is_wrong()) return 1;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      std::printf("No CUDA GPU: argument checks passed, no GEMM was run\n");
      return 3;
    }
    bool ok = run<w4a16::QuantOp::PerColumnScaleOnly>(m, n, k, k);
    for (const int group_size : {64, 128, 256}) {
      ok &= run<w4a16::QuantOp::FinegrainedScaleOnly>(m, n, k, group_size);
      ok &= run<w4a16::QuantOp::FinegrainedScaleAndZeros>(m, n, k, group_size);
    }
    std::printf("%s\n", ok ? "all results are right" : "some results are WRONG");
    return ok ? 0 : 1;
  } catch (const w4a16::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
