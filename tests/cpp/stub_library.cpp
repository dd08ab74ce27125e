// A kernel library that launches nothing. It records the arguments of its last launch for a test.
#include <cstring>

#include "w4a16.h"

extern "C" {

struct Recorded {
  int64_t launches, kernel;
  w4a16_problem problem;
  w4a16_gemm_arguments arguments;
};
W4A16_API Recorded stub_recorded{};

int w4a16_abi_version(void) { return W4A16_ABI_VERSION; }
int w4a16_kernel_count(void) { return 2; }
w4a16_status w4a16_get_kernel_info(int, w4a16_kernel_info*) { return W4A16_OK; }
w4a16_status w4a16_can_implement(int, const w4a16_problem*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_packed_bytes(int, const w4a16_problem*, size_t*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_workspace_bytes(int, const w4a16_problem*, int, size_t*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_pack(int, const w4a16_problem*, const w4a16_pack_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_probe_read(const void*, size_t, int32_t, void*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_probe_multiply(int32_t, void*, int64_t*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_route(const w4a16_route_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_list_token_tiles(const w4a16_listing_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_gather_rows(const w4a16_gather_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_activate_rows(const w4a16_activate_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_combine_rows(const w4a16_combine_arguments*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_token_tiles_bytes(int64_t, int64_t, int64_t, size_t*, char*, size_t) { return W4A16_OK; }
w4a16_status w4a16_grouped_gemm(int, const w4a16_problem*, const w4a16_gemm_arguments*, const w4a16_experts*, char*,
                                size_t) {
  return W4A16_OK;
}

w4a16_status w4a16_gemm(int kernel, const w4a16_problem* problem, const w4a16_gemm_arguments* arguments, char*,
                        size_t) {
  stub_recorded = {stub_recorded.launches + 1, kernel, *problem, *arguments};
  return arguments->alpha == 13.0f ? W4A16_CUDA_ERROR : W4A16_OK;
}

}  // extern "C"
