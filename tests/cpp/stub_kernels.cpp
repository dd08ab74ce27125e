// A kernel library without kernels: it lists the names in the file that W4A16_STUB_KERNELS names, and states the rule
// of which problems they can run.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "library/problem.h"
#include "sdk/cost_model.h"
#include "w4a16.h"

namespace {

const std::vector<w4a16::choosing::Kernel>& kernels() {
  static const std::vector<w4a16::choosing::Kernel> all = [] {
    std::vector<w4a16::choosing::Kernel> found;
    std::ifstream names(std::getenv("W4A16_STUB_KERNELS"));
    for (std::string name; std::getline(names, name);) found.push_back(w4a16::choosing::parse_kernel(name));
    return found;
  }();
  return all;
}

}  // namespace

extern "C" {

int w4a16_kernel_count(void) { return static_cast<int>(kernels().size()); }

w4a16_status w4a16_get_kernel_info(int index, w4a16_kernel_info* info) {
  const w4a16::choosing::Kernel& kernel = kernels()[static_cast<size_t>(index)];
  *info = {};
  info->name = kernel.name.c_str();
  info->target = kernel.target.c_str();
  info->layout = "a layout";
  info->mode = kernel.mode == "cs" ? 0 : kernel.mode == "fgs" ? 1 : 2;
  info->group_multiple = 32;
  info->epilogue = kernel.epilogue == "gated" ? 2 : kernel.epilogue == "elementwise" ? 1 : 0;
  info->grouped = kernel.is_grouped ? 1 : 0;
  return W4A16_OK;
}

w4a16_status w4a16_can_implement(int index, const w4a16_problem* problem, char* message, size_t message_bytes) {
  w4a16_kernel_info info{};
  w4a16_get_kernel_info(index, &info);
  const std::string why = w4a16::why_not(info, *problem);
  std::strncpy(message, why.c_str(), message_bytes - 1);
  return why.empty() ? W4A16_OK : W4A16_UNSUPPORTED;
}

w4a16_status w4a16_packed_bytes(int, const w4a16_problem*, size_t*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_workspace_bytes(int, const w4a16_problem*, int, size_t*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_pack(int, const w4a16_problem*, const w4a16_pack_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_gemm(int, const w4a16_problem*, const w4a16_gemm_arguments*, char*, size_t) { return W4A16_OK; }

}  // extern "C"
