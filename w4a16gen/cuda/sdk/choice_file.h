// Reads the file by which C++ chooses kernels; w4a16gen/choose/choice_file.py writes it. Standard C++17 only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <locale>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cost_model.h"

namespace w4a16 {

// A GPU, as the CUDA runtime describes it.
struct Gpu {
  std::string name;
  int sm_count;
};

namespace choosing {

// A line of the build's tuning table.
struct Tuned {
  int kernel;  // its place among the built kernels
  Problem problem;
  double microseconds;
};

// The content of a file. Every line is checked, so that nothing later can be out of range.
struct ChoiceFile {
  // Takes the file's text. Throws ChoiceError if it is damaged.
  explicit ChoiceFile(const std::string& text) {
    check_end(text);
    std::istringstream lines(text);
    std::string line;
    std::getline(lines, line);
    require(line == "w4a16gen.choice/4", "schema '" + line + "' must be 'w4a16gen.choice/4'");
    std::map<std::string, double> values;
    while (std::getline(lines, line) && line.rfind("end ", 0) != 0) {
      std::istringstream fields(line);
      std::string word, name;
      fields >> word;
      if (word == "constant") {
        fields >> name;
        values[name] = number(fields, line);
      } else if (word == "h100" || word == "card") {
        Card card{"", static_cast<int>(whole(fields, line, 1)), number(fields, line), number(fields, line)};
        card.name = rest(fields);
        (word == "h100" ? h100 : cards.emplace_back()) = card;
      } else if (word == "kernel") {
        fields >> name;
        Kernel kernel = parse_kernel(name);
        kernel.ctas_per_sm = static_cast<int>(whole(fields, line, 1));
        for (double* rate : {&kernel.launch_cycles, &kernel.tile_cycles, &kernel.block_cycles, &kernel.split_cycles,
                             &kernel.long_factor}) {
          *rate = number(fields, line);
        }
        require(kernel.target == "native", name + " is not native");
        kernels.push_back(kernel);
      } else if (word == "tuned_on") {
        tuned_on.sm_count = static_cast<int>(whole(fields, line, 1));
        tuned_on.name = rest(fields);
      } else if (word == "tuned") {
        tuned.push_back(tuned_row(fields, line));
      } else {
        throw ChoiceError("'" + word + "' is not a kind of line");
      }
      require(fields.eof() || (fields >> std::ws).eof(), "'" + line + "' has too many fields");
    }
    set_constants(values);
  }

  // Returns the place of a built kernel, or -1.
  int find(const std::string& name) const {
    const auto found =
        std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& kernel) { return kernel.name == name; });
    return found == kernels.end() ? -1 : static_cast<int>(found - kernels.begin());
  }

  Constants constants{};
  Card h100{};
  std::vector<Card> cards;
  std::vector<Kernel> kernels;  // the built kernels
  Gpu tuned_on{};               // the GPU of the tuning table
  std::vector<Tuned> tuned;

 private:
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
    std::istringstream digits(word);
    digits.imbue(std::locale::classic());  // a program's own locale may have a decimal comma
    double value = 0.0;
    const bool is_number = digits >> value && digits.peek() == std::istringstream::traits_type::eof();
    require(is_number && value >= 0 && std::isfinite(value), "'" + line + "' lacks a number");
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

  Tuned tuned_row(std::istream& fields, const std::string& line) const {
    std::string name;
    fields >> name;
    Tuned row{find(name), {}, 0.0};
    require(row.kernel >= 0, "'" + line + "' names no kernel of the file");
    for (int64_t* value : {&row.problem.m, &row.problem.n, &row.problem.k, &row.problem.group_size}) {
      *value = whole(fields, line, 1);
    }
    row.microseconds = number(fields, line);
    return row;
  }

  void set_constants(const std::map<std::string, double>& values) {
    for (const auto& [name, member] : Constants::members()) {
      const auto found = values.find(name);
      require(found != values.end(), "it has no constant " + name);
      constants.*member = found->second;
    }
    require(values.size() == Constants::members().size(), "it has an unknown constant");
    require(constants.token_step >= 1 && constants.cycles_per_microsecond > 0 && constants.packed_bytes_per_cycle > 0,
            "a constant is 0");
    require(h100.sm_count > 0 && h100.memory_bandwidth > 0 && h100.tensor_rate > 0, "it does not describe the H100");
  }
};

}  // namespace choosing
}  // namespace w4a16
