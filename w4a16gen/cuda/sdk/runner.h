// A C++ runner for C[m, n] = activation(alpha * A[m, k] x W[k, n] + bias[n]) + residual[m, n] with fp16 activations and
// 4-bit weights. It has the calls of TensorRT-LLM's CutlassFpAIntBGemmRunner. It needs the headers of the CUDA runtime,
// but neither Python nor CUTLASS.
//
//     w4a16::FinegrainedRunner runner;
//     const w4a16::GemmConfig config = runner.chooseConfig(m, n, k, group_size);
//     cudaMalloc(&packed, runner.getPackedSize(n, k, group_size));
//     runner.preprocess(packed, weights, scales, nullptr, n, k, group_size);           // once per weight
//     const size_t bytes = runner.getWorkspaceSize(m, n, k, config);
//     if (bytes > 0) cudaMalloc(&workspace, bytes);
//     runner.gemm(a, packed, scales, nullptr, nullptr, 1.0f, c, m, n, k, group_size, config, workspace, bytes, stream);
//
// Memory:     A, C, scales, zeros, bias, packed weights and workspaces are on the current device. Matrices are fp16 and
//             row-major. A and C are aligned to 16 bytes, packed weights and workspaces to 128, as from cudaMalloc.
// Sizes:      n and k are multiples of 8. A group size is k, or a multiple of 32 that divides k.
// Devices:    every call uses the current device. A runner may be used on several.
// Threads:    every call may be made from several threads. gemm takes a lock for a look-up of the weight.
// Allocation: preprocess and pack allocate device memory and synchronise the stream. The other calls do neither, so
//             gemm may be captured into a graph.
// Lifetime:   a runner remembers the address of a packed weight. Call forget() before the memory holds something else.
// Errors:     calls throw w4a16::Error, with a sentence that names the value, the rule and the way out.
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
#include "default_chooser.h"
#include "plain_weights.h"

namespace w4a16 {

// The quantisation mode; see w4a16_mode.
enum class QuantOp {
  PerColumnScaleOnly = W4A16_PER_COLUMN_SCALE_ONLY,
  FinegrainedScaleOnly = W4A16_FINEGRAINED_SCALE_ONLY,
  FinegrainedScaleAndZeros = W4A16_FINEGRAINED_SCALE_AND_ZEROS,
};

// Thrown by wrong calls and failures of CUDA.
class Error : public std::runtime_error {
 public:
  Error(w4a16_status code, const std::string& sentence) : std::runtime_error(sentence), status(code) {}
  w4a16_status status;
};

// One kernel of the library. The axes of info.cta and info.cluster are channels (n), tokens (m), k.
struct GemmConfig {
  int kernel = -1;
  w4a16_kernel_info info{};

  std::string name() const { return info.name == nullptr ? std::string() : info.name; }
};

// What follows the product and the bias, before the one rounding. The residual is fp16, of the shape of C, aligned to
// 16 bytes, and may be C itself. Gated activations (W4A16_SWIGLU and after) need a weight that was packed with gated =
// true; C then has n / 2 columns.
struct Epilogue {
  w4a16_activation activation = W4A16_NO_ACTIVATION;
  const void* residual = nullptr;

  bool is_gated() const { return activation >= W4A16_SWIGLU; }

  // The epilogue of the kernels that compute it, as `chooseConfig` takes it.
  w4a16_epilogue kernels() const {
    if (is_gated()) return W4A16_GATED;
    return activation == W4A16_NO_ACTIVATION && residual == nullptr ? W4A16_NO_EPILOGUE : W4A16_ELEMENTWISE;
  }
};

namespace detail {

struct Message {
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

// The kernels of one mode.
//
// Packed weights contain their scales and zeros, so that one copy fetches all. gemm takes scales and zeros as
// TensorRT-LLM's runner does, and checks that they are those of the packed weight. Null skips the check.
template <QuantOp Op>
class Runner {
 public:
  // Throws if the library holds no native kernel of this mode. Weights are packed in the layout of native kernels;
  // kernels of target cutlass need w4a16.h and weights packed by Python.
  Runner() {
    bool has_mode = false;
    for (int kernel = 0; kernel < w4a16_kernel_count(); ++kernel) {
      GemmConfig config{kernel, {}};
      w4a16_get_kernel_info(kernel, &config.info);
      if (config.info.mode != static_cast<int>(Op) || config.info.grouped != 0) continue;
      has_mode = true;
      if (std::string(config.info.target) == "native") configs_.push_back(config);
    }
    if (!configs_.empty()) return;
    const std::string what = has_mode ? " holds only cutlass kernels of mode " : " holds no kernel of mode ";
    throw Error(W4A16_UNSUPPORTED, "the library" + what + mode() + ": this runner needs a native one, as " +
                                       "`w4a16gen build` without --space builds; see w4a16_gemm for the others");
  }

  // The tag of the mode in kernel names.
  static std::string mode() {
    return Op == QuantOp::PerColumnScaleOnly ? "cs" : Op == QuantOp::FinegrainedScaleOnly ? "fgs" : "fgsz";
  }

  // Returns every native kernel of this mode; there is at least one.
  std::vector<GemmConfig> getConfigs() const { return configs_; }

  // Returns the kernel with this canonical name.
  GemmConfig getConfig(const std::string& name) const {
    for (const GemmConfig& config : configs_) {
      if (config.name() == name) return config;
    }
    throw Error(W4A16_INVALID_ARGUMENT,
                "'" + name + "' is no kernel of mode " + mode() + " in the library: getConfigs() lists its kernels");
  }

  // Returns the bytes of workspace that a kernel needs for a problem on the current device, or the most that any needs.
  size_t getWorkspaceSize(int m, int n, int k, const GemmConfig& config) const {
    const w4a16_problem problem{m, n, k, k};
    detail::Message message;
    size_t bytes = 0;
    message.check(w4a16_workspace_bytes(config.kernel, &problem, 0, &bytes, message.buffer, sizeof(message.buffer)));
    return bytes;
  }
  size_t getWorkspaceSize(int m, int n, int k) const {
    size_t most = 0;
    for (const GemmConfig& config : configs_) most = std::max(most, getWorkspaceSize(m, n, k, config));
    return most;
  }

  // Returns the bytes of a packed weight with its scales and zeros. Needs no GPU.
  size_t getPackedSize(int n, int k, int group_size) const {
    const w4a16_problem problem{0, n, k, group_size};
    detail::Message message;
    size_t bytes = 0;
    message.check(w4a16_packed_bytes(any().kernel, &problem, &bytes, message.buffer, sizeof(message.buffer)));
    return bytes;
  }

  // Packs plain 4-bit weights of k x n values, in host or device memory, into `packed`. A host thread reorders them;
  // `pack` needs none.
  //
  // scales is fp16 [k / group_size, n], or [n] in per-column mode, where group_size is k. zeros has the same shape, or
  // is null in modes without zeros. Both are on the device. A weight is (q - 8) * scale + zero with q from 0 to 15; a
  // zero point zp is zero = (8 - zp) * scale. With gated, the weight is for gated activations: its first n / 2 channels
  // are gates of the others, and n is a multiple of 16.
  void preprocess(void* packed, const void* weights, const void* scales, const void* zeros, int n, int k,
                  int group_size, WeightOrder order = WeightOrder::KByN, WeightBits bits = WeightBits::Signed,
                  cudaStream_t stream = nullptr, bool gated = false) {
    getPackedSize(n, k, group_size);  // checks the sizes
    if (weights == nullptr) throw Error(W4A16_INVALID_ARGUMENT, "weights must not be null");
    std::vector<uint8_t> nibbles(static_cast<size_t>(n) * static_cast<size_t>(k) / 2);
    detail::check_cuda(cudaMemcpyAsync(nibbles.data(), weights, nibbles.size(), cudaMemcpyDefault, stream),
                       "reading the weights");
    detail::check_cuda(cudaStreamSynchronize(stream), "reading the weights");
    const std::vector<uint8_t> values = unpack_weights(nibbles.data(), n, k, order, bits);
    const detail::Scratch q(values.size());
    detail::check_cuda(cudaMemcpyAsync(q.get(), values.data(), values.size(), cudaMemcpyHostToDevice, stream),
                       "copying the weights");
    pack(packed, q.get(), scales, zeros, n, k, group_size, stream, gated);
  }

  // Packs weights that are on the device: q is uint8 [n, k], one value from 0 to 15 per byte, aligned to 8 bytes.
  // The rest is as for `preprocess`.
  void pack(void* packed, const void* q, const void* scales, const void* zeros, int n, int k, int group_size,
            cudaStream_t stream = nullptr, bool gated = false) {
    const size_t bytes = getPackedSize(n, k, group_size);
    const detail::Scratch faults(sizeof(uint32_t));
    detail::check_cuda(cudaMemsetAsync(faults.get(), 0, sizeof(uint32_t), stream), "clearing");
    const w4a16_problem problem{0, n, k, group_size};
    const w4a16_pack_arguments arguments{q, scales, zeros, packed, bytes, faults.get(), stream, gated ? 1 : 0};
    detail::Message message;
    message.check(w4a16_pack(any().kernel, &problem, &arguments, message.buffer, sizeof(message.buffer)));
    uint32_t found = 0;
    detail::check_cuda(cudaMemcpyAsync(&found, faults.get(), sizeof(found), cudaMemcpyDeviceToHost, stream), "copying");
    detail::check_cuda(cudaStreamSynchronize(stream), "packing");
    check_faults(found);
    remember(packed, {n, k, group_size, scales, zeros, gated});
  }

  // Accepts a weight that was packed elsewhere, for example by w4a16gen.pack. Its layout cannot be recognised from its
  // bytes, so the caller passes the layout's name.
  void adopt(const void* packed, size_t packed_bytes, const std::string& packed_layout, int n, int k, int group_size) {
    const bool gated = packed_layout == gatedLayout();
    if (packed_layout != layout() && !gated) {
      throw Error(W4A16_UNSUPPORTED, "the weight is packed as " + packed_layout + ", but these kernels read " +
                                         layout() + " and " + gatedLayout() + ": pack it again");
    }
    if (packed_bytes != getPackedSize(n, k, group_size)) {
      throw Error(W4A16_INVALID_ARGUMENT, "packed weight of " + std::to_string(packed_bytes) + " bytes must be " +
                                              std::to_string(getPackedSize(n, k, group_size)) + " bytes");
    }
    remember(packed, {n, k, group_size, nullptr, nullptr, gated});
  }

  // Forgets a packed weight.
  void forget(const void* packed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    weights_.erase(packed);
  }

  // Returns the name of the packed layout that these kernels read.
  std::string layout() const { return any().info.layout; }

  // Returns the name of the layout of weights for gated activations.
  std::string gatedLayout() const { return layout() + "_gated"; }

  // Per-column mode without a bias: C = alpha * A x B, with scales [n].
  void gemm(const void* A, const void* B, const void* scales, float alpha, void* C, int m, int n, int k,
            const GemmConfig& config, void* workspace, size_t workspace_bytes, cudaStream_t stream) const {
    gemm(A, B, scales, nullptr, nullptr, alpha, C, m, n, k, k, config, workspace, workspace_bytes, stream);
  }
  void gemm(const void* A, const void* B, const void* scales, void* C, int m, int n, int k, const GemmConfig& config,
            void* workspace, size_t workspace_bytes, cudaStream_t stream) const {
    gemm(A, B, scales, 1.0f, C, m, n, k, config, workspace, workspace_bytes, stream);
  }

  // Every mode: C = activation(alpha * A x B + biases) + residual, with biases [n] or null. In per-column mode
  // group_size is k.
  //
  // dependent_launch is a w4a16_launch; true is W4A16_DEPENDENT_LAUNCH. A dependent launch may start, and fetch
  // weights, while earlier kernels of the stream still run. These must not write the packed weight; they may write A
  // and read or write C.
  void gemm(const void* A, const void* B, const void* scales, const void* zeros, const void* biases, float alpha,
            void* C, int m, int n, int k, int group_size, const GemmConfig& config, void* workspace,
            size_t workspace_bytes, cudaStream_t stream, int32_t dependent_launch = W4A16_ORDINARY_LAUNCH,
            const Epilogue& epilogue = {}) const {
    check_weight(B, {n, k, group_size, scales, zeros, epilogue.is_gated()});
    if (config.info.mode != static_cast<int>(Op)) {
      throw Error(W4A16_INVALID_ARGUMENT,
                  "kernel '" + config.name() + "' is not of mode " + mode() + ": take one of getConfigs()");
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
    arguments.dependent_launch = dependent_launch;
    arguments.activation = epilogue.activation;
    arguments.residual = epilogue.residual;
    detail::Message message;
    message.check(w4a16_gemm(config.kernel, &problem, &arguments, message.buffer, sizeof(message.buffer)));
  }
  void gemm(const void* A, const void* B, const void* scales, const void* zeros, const void* biases, void* C, int m,
            int n, int k, int group_size, const GemmConfig& config, void* workspace, size_t workspace_bytes,
            cudaStream_t stream, int32_t dependent_launch = W4A16_ORDINARY_LAUNCH,
            const Epilogue& epilogue = {}) const {
    gemm(A, B, scales, zeros, biases, 1.0f, C, m, n, k, group_size, config, workspace, workspace_bytes, stream,
         dependent_launch, epilogue);
  }

  // Returns the kernel for a problem on the current device. It is the one that w4a16gen.gemm takes in Python: by
  // W4A16GEN_KERNELS, the build's tuning table, measured times, or an estimate. Call it once per shape: it takes some
  // microseconds. The default chooser needs share/w4a16/choice.txt beside the library's folder.
  //
  // Calls with an activation or a residual need a kernel with their epilogue: pass Epilogue::kernels(). Throws if the
  // library was built without such kernels.
  GemmConfig chooseConfig(int m, int n, int k, int group_size, w4a16_epilogue epilogue = W4A16_NO_EPILOGUE) const {
    try {
      return chooseConfig(m, n, k, group_size, default_chooser(), epilogue);
    } catch (const ChoiceError& error) {
      throw Error(W4A16_INVALID_ARGUMENT, error.what());
    }
  }
  GemmConfig chooseConfig(int m, int n, int k, int group_size, const Chooser& chooser,
                          w4a16_epilogue epilogue = W4A16_NO_EPILOGUE) const {
    const w4a16_problem problem{m, n, k, group_size};
    char message[512] = "";
    const w4a16_status status = w4a16_can_implement(any().kernel, &problem, message, sizeof(message));
    if (status != W4A16_OK) throw Error(status, message);
    try {
      const char* const names[] = {"none", "elementwise", "gated"};
      if (epilogue < W4A16_NO_EPILOGUE || epilogue > W4A16_GATED) {
        throw Error(W4A16_INVALID_ARGUMENT, "epilogue of " + std::to_string(static_cast<int>(epilogue)) +
                                                " must be a w4a16_epilogue: pass Epilogue::kernels()");
      }
      const Choice choice =
          chooser.choose(mode(), m, n, k, group_size, current_gpu(), overrides_of_environment(), names[epilogue]);
      return getConfig(choice.kernel);
    } catch (const ChoiceError& error) {
      throw Error(W4A16_INVALID_ARGUMENT, error.what());
    }
  }

 private:
  struct Weight {
    int n;
    int k;
    int group_size;
    const void* scales;
    const void* zeros;
    bool gated;
  };

  const GemmConfig& any() const { return configs_.front(); }  // all read the same layout

  void check_faults(uint32_t faults) const {
    if ((faults & W4A16_FAULT_VALUE) != 0) throw Error(W4A16_INVALID_ARGUMENT, "q must hold values from 0 to 15");
    if ((faults & W4A16_FAULT_NOT_FINITE) != 0) {
      throw Error(W4A16_INVALID_ARGUMENT, "scales and zeros must be finite");
    }
    if (faults != 0) {
      throw Error(W4A16_UNSUPPORTED,
                  "scales or zeros lie too far below their channel's largest scale for layout " + layout());
    }
  }

  void remember(const void* packed, const Weight& weight) {
    const std::lock_guard<std::mutex> lock(mutex_);
    weights_[packed] = weight;
  }

  void check_weight(const void* packed, const Weight& asked) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = weights_.find(packed);
    if (found == weights_.end()) {
      throw Error(W4A16_INVALID_ARGUMENT,
                  "B was not packed by this runner: call preprocess or pack, or adopt a weight of layout " + layout());
    }
    const Weight& known = found->second;
    const auto text = [](const Weight& weight) {
      return "n = " + std::to_string(weight.n) + ", k = " + std::to_string(weight.k) + ", group size " +
             std::to_string(weight.group_size);
    };
    if (known.n != asked.n || known.k != asked.k || known.group_size != asked.group_size) {
      throw Error(W4A16_INVALID_ARGUMENT, "B was packed for " + text(known) + ", not for " + text(asked));
    }
    if (known.gated != asked.gated) {
      throw Error(W4A16_INVALID_ARGUMENT, known.gated ? "B was packed with gated = true: pass a gated activation"
                                                      : "a gated activation needs B packed with gated = true");
    }
    const bool same_scales = asked.scales == nullptr || known.scales == nullptr || asked.scales == known.scales;
    const bool same_zeros = asked.zeros == nullptr || known.zeros == nullptr || asked.zeros == known.zeros;
    if (!same_scales || !same_zeros) {
      throw Error(W4A16_INVALID_ARGUMENT,
                  "B was packed with other scales or zeros, which it contains: pack it again or pass null");
    }
  }

  std::vector<GemmConfig> configs_;
  mutable std::mutex mutex_;
  std::map<const void*, Weight> weights_;
};

using PerColumnRunner = Runner<QuantOp::PerColumnScaleOnly>;
using FinegrainedRunner = Runner<QuantOp::FinegrainedScaleOnly>;
using FinegrainedZerosRunner = Runner<QuantOp::FinegrainedScaleAndZeros>;

}  // namespace w4a16
