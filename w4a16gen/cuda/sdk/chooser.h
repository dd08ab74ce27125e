// Chooses a kernel for a problem, exactly as w4a16gen.choose does in Python. Standard C++17 only: no CUDA, no library.
//
//   const w4a16::Chooser chooser = w4a16::Chooser::load("share/w4a16/choice.txt");
//   const w4a16::Gpu gpu{"NVIDIA H100 80GB HBM3", 132};
//   std::string name = chooser.choose("fgs", 16, 4096, 4096, 128, &gpu).kernel;
//
// Overrides come first, then the build's tuning table, the packaged times, and the estimate.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cost_model.h"

namespace w4a16 {

// A GPU, as the CUDA runtime describes it.
struct Gpu {
  std::string name;
  int sm_count;
};

// A kernel, the microseconds that it is expected to take (0 for an override), and the source of both.
struct Choice {
  std::string kernel;
  double microseconds;
  const char* source;  // "override", "tuning_table", "packaged_times" or "estimate", as in Python
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
  explicit Chooser(const std::string& text) { parse(text); }

  // Returns the kernel for a problem that native kernels of the mode can run.
  //
  // `mode` is cs, fgs or fgsz; group_size is k in mode cs. A null gpu accepts every tuning table and estimates for an
  // H100. The first override of this mode counts; it must be in the build.
  Choice choose(const std::string& mode, int64_t m, int64_t n, int64_t k, int64_t group_size, const Gpu* gpu,
                const std::vector<std::string>& overrides = {}) const {
    const choosing::Problem problem{m, n, k, group_size};
    for (const std::string& name : overrides) choosing::parse_kernel(name);
    for (const std::string& name : overrides) {
      const choosing::Kernel kernel = choosing::parse_kernel(name);
      if (kernel.mode != mode || kernel.target != "native") continue;
      if (find(kernels_, name) < 0) throw ChoiceError(name + ", which W4A16GEN_KERNELS names, is not in the build");
      return {name, 0.0, "override"};
    }
    Choice best{"", 0.0, ""};
    if (tuned(mode, problem, gpu, &best) || packaged(mode, problem, gpu, &best)) return best;
    estimated(mode, problem, card_of(gpu), &best);
    if (best.kernel.empty()) throw ChoiceError("the build holds no native kernel of mode " + mode);
    return best;
  }

 private:
  using Kernels = std::vector<choosing::Kernel>;

  struct Packaged {
    choosing::Problem problem;
    std::vector<double> microseconds;  // by timed kernel; 0 where not measured
    std::vector<double> residuals;     // logarithm of measured over estimated time
  };
  struct Tuned {
    int kernel;
    choosing::Problem problem;
    double microseconds;
  };

  static int find(const Kernels& kernels, const std::string& name) {
    const auto found = std::find_if(kernels.begin(), kernels.end(),
                                    [&](const choosing::Kernel& kernel) { return kernel.name == name; });
    return found == kernels.end() ? -1 : static_cast<int>(found - kernels.begin());
  }

  int64_t steps(int64_t m) const {
    const int64_t step = static_cast<int64_t>(constants_.token_step);
    return (m + step - 1) / step;
  }

  choosing::Card card_of(const Gpu* gpu) const {
    if (gpu == nullptr) return h100_;
    for (const choosing::Card& card : cards_) {
      if (card.describes(gpu->name)) return card.resized(gpu->sm_count);
    }
    return h100_.resized(gpu->sm_count);
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

  bool tuned(const std::string& mode, const choosing::Problem& problem, const Gpu* gpu, Choice* best) const {
    if (gpu != nullptr && (gpu->name != tuned_on_.name || gpu->sm_count != tuned_on_.sm_count)) return false;
    Nearest nearest{problem.m};
    for (const Tuned& row : tuned_) {
      const choosing::Problem& at = row.problem;
      if (kernels_[row.kernel].mode == mode && at.n == problem.n && at.k == problem.k &&
          at.group_size == problem.group_size && steps(at.m) == steps(problem.m)) {
        nearest.add(at.m, row.microseconds, row.kernel);
      }
    }
    if (nearest.kernel < 0) return false;
    *best = {kernels_[nearest.kernel].name, nearest.microseconds, "tuning_table"};
    return true;
  }

  bool packaged(const std::string& mode, const choosing::Problem& problem, const Gpu* gpu, Choice* best) const {
    const choosing::Card card = card_of(gpu);
    const double ratio = card.memory_bandwidth / h100_.memory_bandwidth;
    if (card.sm_count != h100_.sm_count || std::abs(ratio - 1) > constants_.same_memory) return false;
    Nearest nearest{problem.m};
    for (const Packaged& row : packaged_) {
      if (row.problem.n != problem.n || row.problem.k != problem.k || steps(row.problem.m) != steps(problem.m))
        continue;
      for (size_t at = 0; at < kernels_.size(); ++at) {
        const choosing::Kernel& kernel = kernels_[at];
        if (kernel.mode != mode || kernel.timed < 0 || row.microseconds[kernel.timed] == 0) continue;
        nearest.add(row.problem.m, row.microseconds[kernel.timed], static_cast<int>(at));
      }
    }
    if (nearest.kernel < 0) return false;
    *best = {kernels_[nearest.kernel].name, nearest.microseconds, "packaged_times"};
    return true;
  }

  void estimated(const std::string& mode, const choosing::Problem& problem, const choosing::Card& card,
                 Choice* best) const {
    std::vector<std::pair<double, const Packaged*>> near;
    if (problem.m > 0 && card.sm_count == h100_.sm_count) {
      for (const Packaged& row : packaged_) {
        const double weight = weight_of(problem, row.problem);
        if (weight >= constants_.least_weight) near.emplace_back(weight, &row);
      }
    }
    const double oversized = 2 * std::max(static_cast<double>(problem.m), constants_.smallest_tile_tokens);
    bool best_is_oversized = true;
    for (const choosing::Kernel& kernel : kernels_) {
      if (kernel.mode != mode) continue;
      double total = 0.0, weights = constants_.prior_weight;
      for (const auto& [weight, row] : near) {
        if (kernel.timed < 0 || row->microseconds[kernel.timed] == 0) continue;
        total += weight * row->residuals[kernel.timed];
        weights += weight;
      }
      const double plain = choosing::estimate(constants_, h100_, kernel, problem, card);
      const double microseconds = plain * std::exp(total / weights);
      const bool is_oversized = kernel.cta[1] >= oversized;
      const bool is_better = is_oversized == best_is_oversized ? microseconds < best->microseconds : best_is_oversized;
      if (!best->kernel.empty() && !is_better) continue;
      *best = {kernel.name, microseconds, "estimate"};
      best_is_oversized = is_oversized;
    }
  }

  double weight_of(const choosing::Problem& here, const choosing::Problem& there) const {
    const auto octaves = [](int64_t a, int64_t b) {
      return std::log2(static_cast<double>(a) / static_cast<double>(b));
    };
    const double tokens = octaves(here.m, there.m) / constants_.token_octaves;
    const double channels = octaves(here.n, there.n) / constants_.layer_octaves;
    const double k = octaves(here.k, there.k) / constants_.layer_octaves;
    return std::exp(-0.5 * (tokens * tokens + channels * channels + k * k));
  }

  // Reads the file. Every line is checked, so that nothing later can be out of range.
  void parse(const std::string& text) {
    check_end(text);
    std::istringstream lines(text);
    std::string line;
    std::getline(lines, line);
    require(line == "w4a16gen.choice/1", "schema '" + line + "' must be 'w4a16gen.choice/1'");
    std::map<std::string, double> constants;
    while (std::getline(lines, line) && line.rfind("end ", 0) != 0) {
      std::istringstream fields(line);
      std::string word, name;
      fields >> word;
      if (word == "constant") {
        fields >> name;
        constants[name] = number(fields, line);
      } else if (word == "h100" || word == "card") {
        choosing::Card card{"", static_cast<int>(whole(fields, line, 1)), number(fields, line), number(fields, line)};
        card.name = rest(fields);
        (word == "h100" ? h100_ : cards_.emplace_back()) = card;
      } else if (word == "timed" || word == "kernel") {
        fields >> name;
        choosing::Kernel kernel = choosing::parse_kernel(name);
        kernel.along_k = static_cast<int>(whole(fields, line, 1));
        kernel.ctas_per_sm = static_cast<int>(whole(fields, line, 1));
        require(kernel.target == "native", name + " is not native");
        (word == "timed" ? timed_ : kernels_).push_back(kernel);
      } else if (word == "packaged") {
        packaged_.push_back(packaged_row(fields, line));
      } else if (word == "tuned_on") {
        tuned_on_.sm_count = static_cast<int>(whole(fields, line, 1));
        tuned_on_.name = rest(fields);
      } else if (word == "tuned") {
        tuned_.push_back(tuned_row(fields, line));
      } else {
        throw ChoiceError("'" + word + "' is not a kind of line");
      }
      require(fields.eof() || (fields >> std::ws).eof(), "'" + line + "' has too many fields");
    }
    set_constants(constants);
    finish();
  }

  static void require(bool is_right, const std::string& sentence) {
    if (!is_right) throw ChoiceError(sentence);
  }

  static std::string rest(std::istream& fields) {
    std::string text;
    std::getline(fields >> std::ws, text);
    return text;
  }

  static double number(std::istream& fields, const std::string& line) {
    std::string word;
    fields >> word;
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    require(!word.empty() && *end == '\0' && value >= 0 && std::isfinite(value), "'" + line + "' lacks a number");
    return value;
  }

  static int64_t whole(std::istream& fields, const std::string& line, int64_t least) {
    const double value = number(fields, line);
    require(value == std::floor(value) && value >= least && value <= 1 << 30, "'" + line + "' lacks a whole number");
    return static_cast<int64_t>(value);
  }

  // The last line counts the lines before it and holds their 64-bit FNV-1a hash.
  static void check_end(const std::string& text) {
    const size_t end = text.size() < 2 ? std::string::npos : text.rfind('\n', text.size() - 2);
    require(end != std::string::npos, "it has no end line");
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i <= end; ++i) hash = (hash ^ static_cast<unsigned char>(text[i])) * 0x100000001b3u;
    char expected[64];
    const auto count = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(end) + 1, '\n');
    std::snprintf(expected, sizeof(expected), "end %lld %016llx\n", static_cast<long long>(count),
                  static_cast<unsigned long long>(hash));
    require(text.substr(end + 1) == expected, "its end line does not match its content");
  }

  Packaged packaged_row(std::istream& fields, const std::string& line) const {
    Packaged row{};
    row.problem.n = whole(fields, line, 1);
    row.problem.k = whole(fields, line, 1);
    row.problem.m = whole(fields, line, 1);
    for (size_t i = 0; i < timed_.size(); ++i) {
      const bool is_missing = (fields >> std::ws).peek() == '-';
      if (is_missing) fields.get();
      row.microseconds.push_back(is_missing ? 0.0 : number(fields, line));
    }
    return row;
  }

  Tuned tuned_row(std::istream& fields, const std::string& line) const {
    std::string name;
    fields >> name;
    Tuned row{find(kernels_, name), {}, 0.0};
    require(row.kernel >= 0, "'" + line + "' names no kernel of the file");
    for (int64_t* value : {&row.problem.m, &row.problem.n, &row.problem.k, &row.problem.group_size}) {
      *value = whole(fields, line, 1);
    }
    row.microseconds = number(fields, line);
    return row;
  }

  void set_constants(const std::map<std::string, double>& values) {
    for (const auto& [name, member] : choosing::Constants::members()) {
      const auto found = values.find(name);
      require(found != values.end(), "it has no constant " + name);
      constants_.*member = found->second;
    }
    require(values.size() == choosing::Constants::members().size(), "it has an unknown constant");
    require(constants_.token_step >= 1 && constants_.measured_group_size >= 1, "a constant is 0");
    require(h100_.sm_count > 0 && h100_.memory_bandwidth > 0 && h100_.tensor_rate > 0, "it does not describe the H100");
  }

  // Fills what follows from the lines: which kernels were timed, and how far their estimates are off.
  void finish() {
    for (choosing::Kernel& kernel : kernels_) {
      for (size_t at = 0; at < timed_.size(); ++at) {
        if (timed_[at].shape == kernel.shape) kernel.timed = static_cast<int>(at);
      }
    }
    for (Packaged& row : packaged_) {
      row.problem.group_size = static_cast<int64_t>(constants_.measured_group_size);
      for (size_t at = 0; at < timed_.size(); ++at) {
        const double plain = choosing::estimate(constants_, h100_, timed_[at], row.problem, h100_);
        row.residuals.push_back(row.microseconds[at] == 0 ? 0.0 : std::log(row.microseconds[at] / plain));
      }
    }
  }

  choosing::Constants constants_{};
  choosing::Card h100_{};
  std::vector<choosing::Card> cards_;
  Kernels timed_, kernels_;
  std::vector<Packaged> packaged_;
  Gpu tuned_on_{};
  std::vector<Tuned> tuned_;
};

}  // namespace w4a16
