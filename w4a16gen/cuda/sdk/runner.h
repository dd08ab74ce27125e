// C++ on top of w4a16.h: a runner for half x uint4, one per quant mode, with the calls that users of TensorRT-LLM's
// CutlassFpAIntBGemmRunner know. Needs the CUDA runtime's headers; neither Python nor CUTLASS.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../w4a16.h"

namespace w4a16 {

// How a weight is scaled; see w4a16_mode.
enum class QuantOp {
  PerColumnScaleOnly = W4A16_PER_COLUMN_SCALE_ONLY,
  FinegrainedScaleOnly = W4A16_FINEGRAINED_SCALE_ONLY,
  FinegrainedScaleAndZeros = W4A16_FINEGRAINED_SCALE_AND_ZEROS,
};

// Which way the plain weights lie in memory, two to a byte, the first in the low four bits.
enum class WeightOrder {
  KByN,  // k rows of n: what TensorRT-LLM's quantiser gives
  NByK,  // n rows of k: a row for each output channel
};

// What four bits mean: 0 to 15 for -8 to 7, or two's complement.
enum class WeightBits { Unsigned, Signed };

// What a wrong call or a failing GPU throws: a sentence that names the value, the rule and the way out.
class Error : public std::runtime_error {
 public:
  Error(w4a16_status code, const std::string& sentence) : std::runtime_error(sentence), status(code) {}
  w4a16_status status;
};

// One of a library's kernels: the axis order of triples is channels (n), tokens (m), k.
struct GemmConfig {
  int kernel = -1;
  w4a16_kernel_info info{};

  std::string name() const { return info.name == nullptr ? std::string() : info.name; }
};

namespace detail {

struct Text {
  char buffer[512] = "";

  void check(w4a16_status status) const {
    if (status != W4A16_OK) throw Error(status, buffer);
  }
};

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw Error(W4A16_CUDA_ERROR, std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Device memory for the length of a scope.
class Scratch {
 public:
  explicit Scratch(size_t bytes) { check_cuda(cudaMalloc(&pointer_, std::max<size_t>(bytes, 1)), "cudaMalloc"); }
  ~Scratch() { cudaFree(pointer_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return pointer_; }

 private:
  void* pointer_ = nullptr;
};

}  // namespace detail

// Runs the native kernels of one mode. May be used from several threads.
//
// Scales and zeros are packed with the weights, so that one copy fetches both. The calls take them all the same, where
// TensorRT-LLM's do, and check that they are those of the packing; null means so too.
template <QuantOp Op>
class Runner {
 public:
  Runner() {
    for (int kernel = 0; kernel < w4a16_kernel_count(); ++kernel) {
      GemmConfig config{kernel, {}};
      w4a16_get_kernel_info(kernel, &config.info);
      const bool is_native = std::string(config.info.target) == "native";
      if (is_native && config.info.mode == static_cast<int>(Op)) configs_.push_back(config);
    }
  }

  // Every kernel of this mode in the library.
  std::vector<GemmConfig> getConfigs() const { return configs_; }

  // The kernel of this canonical name.
  GemmConfig getConfig(const std::string& name) const {
    for (const GemmConfig& config : configs_) {
      if (config.name() == name) return config;
    }
    throw Error(W4A16_INVALID_ARGUMENT, name + " is no kernel of this mode in the library: getConfigs() lists them");
  }

  // Bytes of workspace for a problem on the current device: exactly what a kernel needs, or the most that any does.
  size_t getWorkspaceSize(int m, int n, int k, const GemmConfig& config) const {
    const w4a16_problem problem{m, n, k, k};
    detail::Text text;
    size_t bytes = 0;
    text.check(w4a16_workspace_bytes(config.kernel, &problem, 0, &bytes, text.buffer, sizeof(text.buffer)));
    return bytes;
  }
  size_t getWorkspaceSize(int m, int n, int k) const {
    size_t most = 0;
    for (const GemmConfig& config : configs_) most = std::max(most, getWorkspaceSize(m, n, k, config));
    return most;
  }

  // Bytes of a packed weight, scales and zeros included. Needs no GPU.
  size_t getPackedSize(int n, int k, int group_size) const {
    const w4a16_problem problem{0, n, k, group_size};
    detail::Text text;
    size_t bytes = 0;
    text.check(w4a16_packed_bytes(any().kernel, &problem, &bytes, text.buffer, sizeof(text.buffer)));
    return bytes;
  }

  // Packs plain weights, which are in host memory, into `packed` on the current device; returns when it is done.
  //
  // scales is half [k / group_size, n] ([n] in per-column mode, where group_size is k), zeros the same or null, both on
  // the device: a weight is (q - 8) * scale + zero, q being 0 to 15. A zero point zp means zero = (8 - zp) * scale.
  void preprocess(void* packed, const void* weights, const void* scales, const void* zeros, int n, int k,
                  int group_size, WeightOrder order = WeightOrder::KByN, WeightBits bits = WeightBits::Signed,
                  cudaStream_t stream = nullptr) {
    const size_t bytes = getPackedSize(n, k, group_size);  // checks the numbers
    if (weights == nullptr) throw Error(W4A16_INVALID_ARGUMENT, "weights must not be null");
    const std::vector<uint8_t> values = spread(static_cast<const uint8_t*>(weights), n, k, order, bits);
    const detail::Scratch on_device(values.size());
    const detail::Scratch faults(sizeof(uint32_t));
    detail::check_cuda(cudaMemcpyAsync(on_device.get(), values.data(), values.size(), cudaMemcpyHostToDevice, stream),
                       "copying the weights");
    detail::check_cuda(cudaMemsetAsync(faults.get(), 0, sizeof(uint32_t), stream), "clearing");
    const w4a16_problem problem{0, n, k, group_size};
    const w4a16_pack_arguments arguments{on_device.get(), scales, zeros, packed, bytes, faults.get(), stream};
    detail::Text text;
    text.check(w4a16_pack(any().kernel, &problem, &arguments, text.buffer, sizeof(text.buffer)));
    uint32_t found = 0;
    detail::check_cuda(cudaMemcpyAsync(&found, faults.get(), sizeof(found), cudaMemcpyDeviceToHost, stream), "copying");
    detail::check_cuda(cudaStreamSynchronize(stream), "packing");
    if ((found & W4A16_FAULT_NOT_FINITE) != 0) {
      throw Error(W4A16_INVALID_ARGUMENT, "scales and zeros must be finite");
    }
    if (found != 0) {
      throw Error(W4A16_UNSUPPORTED,
                  "scales or zeros lie too far below their channel's largest scale for layout " + layout());
    }
    remember(packed, {n, k, group_size, scales, zeros});
  }

  // Takes a weight that was packed elsewhere, such as by w4a16gen.pack, for what its layout's name says it is.
  void adopt(const void* packed, size_t packed_bytes, const std::string& packed_layout, int n, int k, int group_size) {
    if (packed_layout != layout()) {
      throw Error(W4A16_UNSUPPORTED, "the weight is packed as " + packed_layout + ", but these kernels read " +
                                         layout() + ": pack it again");
    }
    if (packed_bytes != getPackedSize(n, k, group_size)) {
      throw Error(W4A16_INVALID_ARGUMENT, "packed weight of " + std::to_string(packed_bytes) + " bytes must be " +
                                              std::to_string(getPackedSize(n, k, group_size)) + " bytes");
    }
    remember(packed, {n, k, group_size, nullptr, nullptr});
  }

  // Forgets a packed weight, before its memory holds something else.
  void forget(const void* packed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    weights_.erase(packed);
  }

  // The name of the layout that these kernels read.
  std::string layout() const { return any().info.layout; }

  // C[m, n] = alpha * A[m, k] x B + bias, per-column: scales [n].
  void gemm(const void* A, const void* B, const void* scales, float alpha, void* C, int m, int n, int k,
            const GemmConfig& config, void* workspace, size_t workspace_bytes, cudaStream_t stream) const {
    gemm(A, B, scales, nullptr, nullptr, alpha, C, m, n, k, k, config, workspace, workspace_bytes, stream);
  }
  void gemm(const void* A, const void* B, const void* scales, void* C, int m, int n, int k, const GemmConfig& config,
            void* workspace, size_t workspace_bytes, cudaStream_t stream) const {
    gemm(A, B, scales, 1.0f, C, m, n, k, config, workspace, workspace_bytes, stream);
  }

  // The same, fine-grained: scales and zeros [k / group_size, n], bias [n] or null; in per-column mode with k as the
  // group size, to have a bias there too.
  void gemm(const void* A, const void* B, const void* scales, const void* zeros, const void* biases, float alpha,
            void* C, int m, int n, int k, int group_size, const GemmConfig& config, void* workspace,
            size_t workspace_bytes, cudaStream_t stream) const {
    check_weight(B, {n, k, group_size, scales, zeros});
    if (config.info.mode != static_cast<int>(Op)) {
      throw Error(W4A16_INVALID_ARGUMENT, config.name() + " is of another mode than this runner: see getConfigs()");
    }
    const w4a16_problem problem{m, n, k, group_size};
    w4a16_gemm_arguments arguments{};
    arguments.activations = A;
    arguments.packed = B;
    arguments.packed_bytes = getPackedSize(n, k, group_size);
    arguments.bias = biases;
    arguments.output = C;
    arguments.workspace = workspace;
    arguments.workspace_bytes = workspace_bytes;
    arguments.stream = stream;
    arguments.alpha = alpha;
    detail::Text text;
    text.check(w4a16_gemm(config.kernel, &problem, &arguments, text.buffer, sizeof(text.buffer)));
  }
  void gemm(const void* A, const void* B, const void* scales, const void* zeros, const void* biases, void* C, int m,
            int n, int k, int group_size, const GemmConfig& config, void* workspace, size_t workspace_bytes,
            cudaStream_t stream) const {
    gemm(A, B, scales, zeros, biases, 1.0f, C, m, n, k, group_size, config, workspace, workspace_bytes, stream);
  }

 private:
  struct Weight {
    int n;
    int k;
    int group_size;
    const void* scales;
    const void* zeros;
  };

  const GemmConfig& any() const {
    if (configs_.empty()) throw Error(W4A16_UNSUPPORTED, "the library holds no native kernel of this mode");
    return configs_.front();
  }

  void remember(const void* packed, const Weight& weight) {
    const std::lock_guard<std::mutex> lock(mutex_);
    weights_[packed] = weight;
  }

  void check_weight(const void* packed, const Weight& asked) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = weights_.find(packed);
    if (found == weights_.end()) {
      throw Error(
          W4A16_INVALID_ARGUMENT,
          "B was not packed by this runner: preprocess plain weights, or adopt() a weight of layout " + layout());
    }
    const Weight& known = found->second;
    const auto text = [](const Weight& weight) {
      return "n = " + std::to_string(weight.n) + ", k = " + std::to_string(weight.k) + ", group size " +
             std::to_string(weight.group_size);
    };
    if (known.n != asked.n || known.k != asked.k || known.group_size != asked.group_size) {
      throw Error(W4A16_INVALID_ARGUMENT, "B was packed for " + text(known) + ", not for " + text(asked));
    }
    const bool same_scales = asked.scales == nullptr || known.scales == nullptr || asked.scales == known.scales;
    const bool same_zeros = asked.zeros == nullptr || known.zeros == nullptr || asked.zeros == known.zeros;
    if (!same_scales || !same_zeros) {
      throw Error(W4A16_INVALID_ARGUMENT, "B was packed with other scales or zeros: they are in it, pack it again");
    }
  }

  // One byte for each value of 0 to 15, [n, k].
  static std::vector<uint8_t> spread(const uint8_t* weights, int n, int k, WeightOrder order, WeightBits bits) {
    const int64_t rows = order == WeightOrder::KByN ? k : n;
    const int64_t columns = order == WeightOrder::KByN ? n : k;
    const uint8_t flip = bits == WeightBits::Signed ? 8 : 0;  // two's complement to offset by 8
    std::vector<uint8_t> values(static_cast<size_t>(rows * columns));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t at = row * columns + column;  // n and k are even
        const uint8_t value = (weights[at / 2] >> (at % 2 * 4) & 15) ^ flip;
        values[static_cast<size_t>(order == WeightOrder::KByN ? column * rows + row : at)] = value;
      }
    }
    return values;
  }

  std::vector<GemmConfig> configs_;
  mutable std::mutex mutex_;
  std::map<const void*, Weight> weights_;
};

using PerColumnRunner = Runner<QuantOp::PerColumnScaleOnly>;
using FinegrainedRunner = Runner<QuantOp::FinegrainedScaleOnly>;
using FinegrainedZerosRunner = Runner<QuantOp::FinegrainedScaleAndZeros>;

}  // namespace w4a16
