// Chooses a kernel for a problem, exactly as `Library.choose` does in Python. Standard C++17 only: no CUDA, no library.
//
//   const w4a16::Chooser chooser = w4a16::Chooser::load("share/w4a16/choice.txt");
//   const w4a16::Gpu gpu{"NVIDIA H100 80GB HBM3", 132};
//   std::string name = chooser.choose("fgs", 16, 4096, 4096, 128, &gpu).kernel;
//
// Overrides come first, then the build's tuning table, and the estimate.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "choice_file.h"

namespace w4a16 {

// A kernel, the microseconds that it is expected to take (0 for an override), and the source of both.
struct Choice {
  std::string kernel;
  double microseconds;
  const char* source;  // "override", "tuning_table" or "estimate", as in Python
};

// The kernels named by the environment variable W4A16GEN_KERNELS, which is read once per process.
inline const std::vector<std::string>& overrides_of_environment() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    const char* text = std::getenv("W4A16GEN_KERNELS");
    std::istringstream list(text == nullptr ? "" : text);
    for (std::string name; std::getline(list, name, ',');) {
      const char* const spaces = " \t\r\n\v\f";
      const size_t begin = name.find_first_not_of(spaces);
      if (begin != std::string::npos) {
        found.push_back(name.substr(begin, name.find_last_not_of(spaces) + 1 - begin));
      }
    }
    return found;
  }();
  return names;
}

// Chooses among the native kernels of one exported build. Immutable, so several threads may use it.
class Chooser {
 public:
  // Reads a file that `w4a16gen export --prefix` wrote.
  static Chooser load(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    if (file) text << file.rdbuf();
    if (!file) throw ChoiceError(path + " cannot be read: run `w4a16gen export --prefix` again");
    try {
      return Chooser(text.str());
    } catch (const ChoiceError& error) {
      throw ChoiceError(path + " is damaged (" + error.what() + "): run `w4a16gen export --prefix` again");
    }
  }

  // Takes the file's text.
  explicit Chooser(const std::string& text) : file_(text) {}

  // Returns the kernel for a problem that native kernels of the mode can run.
  //
  // `mode` is cs, fgs or fgsz; group_size is k in mode cs. A null gpu accepts every tuning table and estimates for an
  // H100. The first override of this mode and epilogue counts; it must be in the build. `epilogue` is none, elementwise
  // or gated. Throws ChoiceError for sizes of no problem, and if the build has no kernel.
  Choice choose(const std::string& mode, int64_t m, int64_t n, int64_t k, int64_t group_size, const Gpu* gpu,
                const std::vector<std::string>& overrides = {}, const std::string& epilogue = "none") const {
    const choosing::Problem problem{m, n, k, group_size};
    if (m < 0 || n < 1 || k < 1 || group_size < 1) {
      throw ChoiceError("m of " + std::to_string(m) + " must be 0 or more, and n of " + std::to_string(n) + ", k of " +
                        std::to_string(k) + " and group size " + std::to_string(group_size) + " must be above 0");
    }
    for (const std::string& name : overrides) {
      if (!choosing::parse_kernel(name).is_grouped) continue;
      throw ChoiceError(name + " computes grouped products: name it in the call of grouped_gemm");
    }
    for (const std::string& name : overrides) {
      const choosing::Kernel kernel = choosing::parse_kernel(name);
      if (kernel.mode != mode || kernel.epilogue != epilogue || kernel.target != "native") continue;
      if (file_.find(name) < 0) throw ChoiceError(name + ", which W4A16GEN_KERNELS names, is not in the build");
      return {name, 0.0, "override"};
    }
    constexpr int kGatedMultiple = 16;
    if (epilogue == "gated" && n % kGatedMultiple != 0) {
      throw ChoiceError("n of " + std::to_string(n) + " must be a multiple of " + std::to_string(kGatedMultiple) +
                        " for gated activations: pad both halves with zeros");
    }
    Choice best{"", 0.0, ""};
    if (tuned(mode, epilogue, problem, gpu, &best)) return best;
    estimated(mode, epilogue, problem, card_of(gpu), &best);
    if (best.kernel.empty() && epilogue != "none") {
      throw ChoiceError("the build holds no kernel of mode " + mode + " with epilogue " + epilogue +
                        ": run `w4a16gen build --epilogue none --epilogue " + epilogue + "`");
    }
    if (best.kernel.empty() && has_mode(mode)) {
      throw ChoiceError("the build holds no kernel of mode " + mode + " without an epilogue: run `w4a16gen build`");
    }
    if (best.kernel.empty()) throw ChoiceError("the build holds no native kernel of mode " + mode);
    return best;
  }

 private:
  bool has_mode(const std::string& mode) const {
    return std::any_of(file_.kernels.begin(), file_.kernels.end(),
                       [&](const choosing::Kernel& kernel) { return kernel.mode == mode && !kernel.is_grouped; });
  }

  int64_t steps(int64_t m) const {
    const int64_t step = static_cast<int64_t>(file_.constants.token_step);
    return (m + step - 1) / step;
  }

  choosing::Card card_of(const Gpu* gpu) const {
    if (gpu == nullptr) return file_.h100;
    for (const choosing::Card& card : file_.cards) {
      if (card.describes(gpu->name)) return card.resized(gpu->sm_count);
    }
    return file_.h100.resized(gpu->sm_count);
  }

  // Keeps the nearest token count that makes the same number of tiles, then the larger; there the fastest kernel, then
  // the first.
  struct Nearest {
    int64_t m, distance = -1, tokens = 0;
    double microseconds = 0.0;
    int kernel = -1;

    void add(int64_t measured, double time, int at) {
      const int64_t gap = std::abs(measured - m);
      const bool is_nearer = distance < 0 || gap < distance || (gap == distance && measured > tokens);
      const bool is_same = gap == distance && measured == tokens;
      if (!is_nearer && !(is_same && (time < microseconds || (time == microseconds && at < kernel)))) return;
      distance = gap, tokens = measured, microseconds = time, kernel = at;
    }
  };

  bool tuned(const std::string& mode, const std::string& epilogue, const choosing::Problem& problem, const Gpu* gpu,
             Choice* best) const {
    if (gpu != nullptr && (gpu->name != file_.tuned_on.name || gpu->sm_count != file_.tuned_on.sm_count)) return false;
    Nearest nearest{problem.m};
    for (const choosing::Tuned& row : file_.tuned) {
      const choosing::Problem& at = row.problem;
      const choosing::Kernel& kernel = file_.kernels[row.kernel];
      if (kernel.mode == mode && kernel.epilogue == epilogue && !kernel.is_grouped && at.n == problem.n &&
          at.k == problem.k && at.group_size == problem.group_size && steps(at.m) == steps(problem.m)) {
        nearest.add(at.m, row.microseconds, row.kernel);
      }
    }
    if (nearest.kernel < 0) return false;
    *best = {file_.kernels[nearest.kernel].name, nearest.microseconds, "tuning_table"};
    return true;
  }

  void estimated(const std::string& mode, const std::string& epilogue, const choosing::Problem& problem,
                 const choosing::Card& card, Choice* best) const {
    const double oversized = 2 * std::max(static_cast<double>(problem.m), file_.constants.smallest_tile_tokens);
    bool best_is_oversized = true;
    for (const choosing::Kernel& kernel : file_.kernels) {
      if (kernel.mode != mode || kernel.epilogue != epilogue || kernel.is_grouped) continue;
      const double microseconds = choosing::estimate(file_.constants, file_.h100, kernel, problem, card);
      const bool is_oversized = kernel.cta[1] >= oversized;
      const bool is_better = is_oversized == best_is_oversized ? microseconds < best->microseconds : best_is_oversized;
      if (!best->kernel.empty() && !is_better) continue;
      *best = {kernel.name, microseconds, "estimate"};
      best_is_oversized = is_oversized;
    }
  }

  choosing::ChoiceFile file_;
};

}  // namespace w4a16
