// The rule that decides which problems a kernel can run, for callers without Python. w4a16gen/kernels/problem.py states
// it in the same words; a test compares the two.
#pragma once

#include <cstdint>
#include <string>

#include "w4a16.h"

namespace w4a16 {

constexpr int64_t kDimensionMultiple = 8;            // TMA needs row strides of a multiple of 16 bytes
constexpr int64_t kMaxDimension = int64_t{1} << 30;  // CUTLASS counts in int32 and rounds up to whole tiles

// Returns why the kernel cannot run the problem, or an empty string if it can.
inline std::string why_not(const w4a16_kernel_info& kernel, const w4a16_problem& problem) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  const struct {
    const char* name;
    int64_t value;
  } m{"m", problem.m}, n{"n", problem.n}, k{"k", problem.k};
  for (const auto& dimension : {n, k}) {
    if (dimension.value <= 0 || dimension.value % kDimensionMultiple != 0) {
      return std::string(dimension.name) + " of " + text(dimension.value) + " must be a positive multiple of " +
             text(kDimensionMultiple) + ": pad the layer with zeros";
    }
  }
  if (problem.m < 0) return "m of " + text(problem.m) + " must be 0 or more";
  for (const auto& dimension : {m, n, k}) {
    if (dimension.value > kMaxDimension) {
      return std::string(dimension.name) + " of " + text(dimension.value) + " must be at most " + text(kMaxDimension) +
             ": split the problem";
    }
  }
  const int64_t group = problem.group_size;
  if (group == problem.k) return {};
  const std::string must_be = "group size " + text(group) + " must be " + text(problem.k) + " (= k)";
  if (kernel.mode == W4A16_PER_COLUMN_SCALE_ONLY) return must_be + ": per-column mode has one scale per channel";
  if (group <= 0 || group % kernel.group_multiple != 0 || problem.k % group != 0) {
    return must_be + " or a multiple of " + text(kernel.group_multiple) + " that divides k";
  }
  return {};
}

}  // namespace w4a16
